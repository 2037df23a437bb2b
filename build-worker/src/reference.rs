//! References to images, as Docker writes them.

/// Key of Docker Hub in Docker's configuration.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Splits a reference into its repository and its tag or digest; `latest` if it has neither.
pub(crate) fn parts(reference: &str) -> (&str, &str) {
    if let Some(parts) = reference.split_once('@') {
        return parts;
    }
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        // The colon precedes a port.
        Some(_) | None => (reference, "latest"),
    }
}

/// Returns the repository of a reference, which may have a tag and a digest.
pub(crate) fn repository(reference: &str) -> &str {
    let (named, _) = reference.split_once('@').unwrap_or((reference, ""));
    parts(named).0
}

/// Returns the registry of a reference, by its key in Docker's configuration.
///
/// It is the first part, if that cannot be a folder of Docker Hub.
pub(crate) fn registry(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => registry_of_host(host),
        Some(_) | None => DOCKER_HUB,
    }
}

/// Returns the key of a registry in Docker's configuration, by its host.
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
    fn a_repository_has_neither_tag_nor_digest() {
        for reference in ["h:5000/x", "h:5000/x:1", "h:5000/x@sha256:0", "h:5000/x:1@sha256:0"] {
            assert_eq!(repository(reference), "h:5000/x");
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
