//! References to images by which a build names what it starts from or copies from.

use std::str::FromStr;

use oci_spec::distribution;

use super::{Artifact, ImageId, reference::familiar};

/// A reference in the words of a Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceReference {
    /// Repository in the form in which the catalogue writes it.
    pub(crate) repository: String,
    pub(crate) version: SourceVersion,
}

/// The image of a repository that a reference names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SourceVersion {
    Tag(String),
    /// Digest in the registry, which counts more than a tag beside it.
    Digest(String),
}

/// The meaning of a reference to the requester of a build.
#[derive(Clone, Debug)]
pub(crate) enum ResolvedSource {
    /// No image of the catalogue: whatever the worker's own rules say.
    Foreign,
    /// Nothing that exists for the requester.
    Missing {
        /// Set if the repository lies outside of the catalogue's prefixes.
        is_elsewhere: bool,
    },
    /// The artifact of an image that the requester can see.
    Artifact {
        image: ImageId,
        artifact: Box<Artifact>,
        /// Set if the worker that holds the artifact may take the build.
        worker_may_build: bool,
    },
}

impl SourceReference {
    /// Parses a reference; returns `None` if it is no reference to an image.
    ///
    /// Different spellings of one repository are equal: the case of its registry, zeros before its port, the
    /// port of HTTPS, and what Docker leaves out.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        const DEFAULT_TAG: &str = "latest";
        const HTTPS: &str = ":443";
        /// Names of the registry that Docker writes as `docker.io`.
        const DOCKER_HUB: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];
        let text = match text.split_once('/') {
            Some((registry, rest))
                if registry.contains(['.', ':']) || registry.eq_ignore_ascii_case("localhost") =>
            {
                let registry = registry.to_ascii_lowercase();
                let registry = plain_port(&registry);
                let registry = registry.strip_suffix(HTTPS).unwrap_or(&registry);
                let registry = if DOCKER_HUB.contains(&registry) { "docker.io" } else { registry };
                format!("{registry}/{rest}")
            }
            Some(_) | None => text.to_owned(),
        };
        let parsed = distribution::Reference::from_str(&text).ok()?;
        let version = match (parsed.digest(), parsed.tag()) {
            (Some(digest), _) => SourceVersion::Digest(digest.to_ascii_lowercase()),
            (None, tag) => SourceVersion::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Some(Self { repository: familiar(&parsed), version })
    }

    /// Reports whether the reference has the digest of this artifact, in a registry or in an engine, or of its
    /// configuration.
    pub(crate) fn has_digest_of(&self, artifact: &Artifact) -> bool {
        match &self.version {
            SourceVersion::Tag(_) => false,
            SourceVersion::Digest(digest) => {
                let digests = [&artifact.repo_digest, &artifact.config_digest];
                artifact.image_id == *digest || digests.contains(&&Some(digest.clone()))
            }
        }
    }

    /// Reports whether the reference stands for this artifact.
    pub(crate) fn names(&self, artifact: &Artifact) -> bool {
        let Some(reference) = &artifact.reference else { return false };
        let is_version = match &self.version {
            SourceVersion::Tag(tag) => reference.tag() == tag,
            SourceVersion::Digest(digest) => artifact.repo_digest.as_ref() == Some(digest),
        };
        !artifact.pulled && reference.repository() == self.repository && is_version
    }
}

/// Returns a registry without zeros before its port.
fn plain_port(registry: &str) -> String {
    match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => format!("{host}:{}", port.trim_start_matches('0')),
        Some(_) | None => registry.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_repository_has_one_spelling() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, expected) in [
            ("ubuntu", Some("ubuntu:latest")),
            ("docker.io/library/ubuntu:24.04", Some("ubuntu:24.04")),
            ("Registry.Example:443/a/b:1", Some("registry.example/a/b:1")),
            ("registry.example:5000/a", Some("registry.example:5000/a:latest")),
            ("registry-1.docker.io/library/ubuntu", Some("ubuntu:latest")),
            ("registry.example:05000/a", Some("registry.example:5000/a:latest")),
            ("registry.example:000443/a", Some("registry.example/a:latest")),
            ("Index.Docker.io:443/team/a:1", Some("team/a:1")),
            ("LOCALHOST/a", Some("localhost/a:latest")),
            ("trailer.invalid/alice-2bd806c9/a", Some("trailer.invalid/alice-2bd806c9/a:latest")),
            ("a/b:1@sha256:", None),
            ("A", None),
            ("", None),
        ] {
            let parsed = SourceReference::parse(text).map(|parsed| match parsed.version {
                SourceVersion::Tag(tag) => format!("{}:{tag}", parsed.repository),
                SourceVersion::Digest(digest) => format!("{}@{digest}", parsed.repository),
            });
            assert_eq!(parsed.as_deref(), expected, "{text}");
        }
        let version = SourceReference::parse(&format!("a/b:1@{digest}")).map(|parsed| parsed.version);
        assert_eq!(version, Some(SourceVersion::Digest(digest)));
    }
}
