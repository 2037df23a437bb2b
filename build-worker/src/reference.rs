//! References to images, as Docker writes them.

/// The key by which Docker configures Docker Hub.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The repository, and the tag or digest; `latest` when it has neither.
pub(crate) fn parts(reference: &str) -> (&str, &str) {
    if let Some(parts) = reference.split_once('@') {
        return parts;
    }
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        // The colon is that of a port.
        Some(_) | None => (reference, "latest"),
    }
}

/// The registry, by the name that it is configured by: a first part that cannot be a folder of Docker Hub.
pub(crate) fn registry(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => registry_of_host(host),
        Some(_) | None => DOCKER_HUB,
    }
}

/// Returns the name that a registry is configured by, by the host that it is reached at.
pub(crate) fn registry_of_host(host: &str) -> &str {
    match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_has_a_repository_and_a_tag_or_digest() {
        for (reference, expected) in [
            ("x", ("x", "latest")),
            ("x/y:1", ("x/y", "1")),
            ("127.0.0.1:5000/x", ("127.0.0.1:5000/x", "latest")),
            ("127.0.0.1:5000/x:1", ("127.0.0.1:5000/x", "1")),
            ("x@sha256:0", ("x", "sha256:0")),
        ] {
            assert_eq!(parts(reference), expected, "{reference}");
        }
    }

    #[test]
    fn a_reference_names_its_registry() {
        for (reference, expected) in [
            ("ubuntu:24.04", DOCKER_HUB),
            ("library/ubuntu", DOCKER_HUB),
            ("docker.io/library/ubuntu", DOCKER_HUB),
            ("quay.io/x/y:1", "quay.io"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000"),
            ("localhost/x", "localhost"),
            ("x@sha256:0", DOCKER_HUB),
        ] {
            assert_eq!(registry(reference), expected, "{reference}");
        }
    }
}
