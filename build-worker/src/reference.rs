//! References to images, as Docker writes them.

use std::{borrow::Cow, str::FromStr};

use oci_spec::distribution;

/// Key of Docker Hub in Docker's configuration.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// Host of Docker Hub in references.
const DOCKER_HUB_HOST: &str = "docker.io";

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

/// Returns a reference in the full form of the engine, such as `docker.io/library/ubuntu:24.04`.
///
/// Returns `None` if it is no reference to an image, as the ID of one is not.
pub(crate) fn canonical(reference: &str) -> Option<String> {
    let is_id = reference.len() == 64 && reference.bytes().all(|byte| byte.is_ascii_hexdigit());
    distribution::Reference::from_str(reference).ok().filter(|_| !is_id).map(|parsed| parsed.to_string())
}

/// Returns the short form in which Docker shows a canonical reference, such as `ubuntu:24.04`.
pub(crate) fn familiar(canonical: &str) -> &str {
    let Some(short) = canonical.strip_prefix("docker.io/") else { return canonical };
    short.strip_prefix("library/").filter(|official| !official.contains('/')).unwrap_or(short)
}

/// Reports whether a canonical reference is a name of ours, which no registry can answer for.
pub(crate) fn is_ours(canonical: &str) -> bool {
    canonical.starts_with("trailer.invalid/") || canonical.starts_with("trailer.invalid:")
}

/// Splits a reference into the host of its registry and the path of its repository there.
///
/// The host is the first part, if that cannot be a folder of Docker Hub.
pub(crate) fn host_and_path(reference: &str) -> (&str, Cow<'_, str>) {
    let repository = repository(reference);
    let (host, path) = match repository.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => {
            (canonical_host(host), path)
        }
        Some(_) | None => (DOCKER_HUB_HOST, repository),
    };
    let is_official = host == DOCKER_HUB_HOST && !path.contains('/');
    (host, if is_official { format!("library/{path}").into() } else { path.into() })
}

/// Returns the host by which references name a registry; Docker Hub has others, too.
pub(crate) fn canonical_host(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB_HOST,
        host => host,
    }
}

/// Returns the name of a registry in Docker's configuration, by its canonical host.
pub(crate) fn server(host: &str) -> &str {
    if host == DOCKER_HUB_HOST { DOCKER_HUB } else { host }
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
    fn a_reference_has_a_full_form_and_a_short_one() {
        for (reference, full, short) in [
            ("ubuntu", "docker.io/library/ubuntu:latest", "ubuntu:latest"),
            ("docker.io/library/ubuntu:24.04", "docker.io/library/ubuntu:24.04", "ubuntu:24.04"),
            ("a/b:1", "docker.io/a/b:1", "a/b:1"),
            ("h:5000/x", "h:5000/x:latest", "h:5000/x:latest"),
            ("trailer.invalid/a-0/b", "trailer.invalid/a-0/b:latest", "trailer.invalid/a-0/b:latest"),
        ] {
            assert_eq!(canonical(reference).as_deref(), Some(full));
            assert_eq!(familiar(full), short);
        }
        assert_eq!(canonical("A b"), None);
        assert_eq!(canonical(&"0a".repeat(32)), None);
    }

    #[test]
    fn a_repository_has_neither_tag_nor_digest() {
        for reference in ["h:5000/x", "h:5000/x:1", "h:5000/x@sha256:0", "h:5000/x:1@sha256:0"] {
            assert_eq!(repository(reference), "h:5000/x");
        }
    }

    #[test]
    fn a_reference_names_its_registry() {
        for (reference, host, path) in [
            ("ubuntu:24.04", "docker.io", "library/ubuntu"),
            ("library/ubuntu", "docker.io", "library/ubuntu"),
            ("docker.io/library/ubuntu", "docker.io", "library/ubuntu"),
            ("index.docker.io/a/b:1", "docker.io", "a/b"),
            ("quay.io/x/y:1@sha256:0", "quay.io", "x/y"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000", "x"),
            ("localhost/x", "localhost", "x"),
            ("x@sha256:0", "docker.io", "library/x"),
        ] {
            assert_eq!(host_and_path(reference), (host, path.into()), "{reference}");
        }
        assert_eq!(server(canonical_host("registry-1.docker.io")), DOCKER_HUB);
        assert_eq!(server(canonical_host("quay.io")), "quay.io");
    }
}
