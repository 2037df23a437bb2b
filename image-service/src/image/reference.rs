//! The Docker reference that an image writes: `repository:tag`, in the namespace of its creator.

use std::{cmp::Ordering, fmt, str::FromStr};

use oci_spec::distribution;
use serde::{Deserialize, Serialize};

pub(super) use self::namespace::slug;
pub(crate) use self::namespace::{Namespace, RepositoryPrefixes};

mod namespace;

/// A repository and a tag that the Docker Engine accepts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Reference {
    repository: String,
    tag: String,
}

/// A reference that can be pulled from a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PulledReference(Reference);

impl Reference {
    pub(super) const DEFAULT_TAG: &str = "latest";
    const MAX_REPOSITORY: usize = 255;
    const COMPONENTS: &str = "it must have components of letters and digits, with single `.`, `_`, `__` or `-` between \
                              them, that are separated by `/`";
    /// Beginning of the names that artifacts have in their engines.
    pub(super) const ARTIFACTS: &str = "trailer.invalid/artifact/";

    /// Creates a reference from a repository and a tag; an empty tag means `latest`.
    ///
    /// # Errors
    ///
    /// Returns [`ReferenceError`] with the part that is invalid.
    pub(crate) fn new(repository: &str, tag: &str) -> Result<Self, ReferenceError> {
        let tag = if tag.is_empty() { Self::DEFAULT_TAG } else { tag };
        if !is_tag(tag) {
            return Err(ReferenceError::Tag);
        }
        if repository.chars().any(char::is_uppercase) {
            return Err(ReferenceError::Repository("it must be in lower case".to_owned()));
        }
        if repository.len() > Self::MAX_REPOSITORY {
            return Err(ReferenceError::Repository("it must have at most 255 characters".to_owned()));
        }
        let parsed = distribution::Reference::from_str(&format!("{repository}:{tag}"))
            .map_err(|_| ReferenceError::Repository(Self::COMPONENTS.to_owned()))?;
        if parsed.tag() != Some(tag)
            || parsed.digest().is_some()
            || repository.contains(['@', ':']) && !has_registry_port(repository)
        {
            return Err(ReferenceError::Repository("it must have neither a tag nor a digest".to_owned()));
        }
        let repository = familiar(&parsed);
        if is_image_id(&repository) {
            return Err(ReferenceError::Repository("it must not look like the id of an image".to_owned()));
        }
        Ok(Self { repository, tag: tag.to_owned() })
    }

    /// Restores a reference that was checked before it was stored.
    pub(crate) fn from_stored(repository: String, tag: String) -> Self {
        Self { repository, tag }
    }

    /// Returns the reference with a number after its repository.
    pub(crate) fn numbered(&self, number: u64) -> Self {
        Self { repository: format!("{}-{number}", self.repository), tag: self.tag.clone() }
    }

    /// Reports whether a name is reserved for what workers do in their engines, so that no image may be given
    /// it.
    pub(crate) fn is_reserved(name: &str) -> bool {
        const OTHERS: [&str; 2] = ["trailer.invalid/attempt/", "trailer.invalid/base/"];
        name.starts_with(Self::ARTIFACTS) || OTHERS.iter().any(|others| name.starts_with(others))
    }

    pub(crate) fn repository(&self) -> &str {
        &self.repository
    }

    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// Compares two references as they are displayed.
    pub(crate) fn compare_shown(&self, other: &Self) -> Ordering {
        let common = self.repository.len().min(other.repository.len());
        let [ours, others] = [self, other].map(|reference| &reference.repository.as_bytes()[..common]);
        ours.cmp(others).then_with(|| {
            let [ours, others] =
                [self, other].map(|reference| reference.shown().into_iter().flat_map(str::bytes));
            ours.cmp(others)
        })
    }

    /// Returns the parts of the displayed reference, in order.
    pub(crate) fn shown(&self) -> [&str; 3] {
        [&self.repository, self.separator(), &self.tag]
    }

    /// Returns the separator before the tag. An image that is pulled by digest has no tag.
    fn separator(&self) -> &'static str {
        if self.tag.is_empty() { "" } else { ":" }
    }
}

impl PulledReference {
    /// Parses a reference; without a tag or a digest it means `latest`. Returns `None` if it is invalid.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let parsed = distribution::Reference::from_str(text).ok()?;
        let is_bounded =
            parsed.repository().len() <= Reference::MAX_REPOSITORY && parsed.tag().is_none_or(is_tag);
        let tag = match (parsed.tag(), parsed.digest()) {
            (Some(tag), _) => tag,
            (None, Some(_)) => "",
            (None, None) => Reference::DEFAULT_TAG,
        };
        // Engines take digests in lower case only.
        let has_plain_digest = parsed.digest().is_none_or(|digest| !digest.contains(char::is_uppercase));
        (is_bounded && has_plain_digest && text.trim() == text && !is_image_id(&familiar(&parsed)))
            .then(|| Self(Reference { repository: familiar(&parsed), tag: tag.to_owned() }))
    }

    pub(crate) fn reference(&self) -> &Reference {
        &self.0
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}{}", self.repository, self.separator(), self.tag)
    }
}

/// The part of a reference that is invalid, and the reason.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReferenceError {
    Repository(String),
    Tag,
}

impl ReferenceError {
    /// Returns the violated rule in words.
    pub(crate) fn rule(&self) -> String {
        match self {
            Self::Repository(reason) => format!("must be a Docker repository: {reason}"),
            Self::Tag => "must be a Docker tag: 1 to 128 letters, digits, `_`, `.` and `-`, \
                          beginning with none of the last two"
                .to_owned(),
        }
    }
}

/// Returns the short form of a repository that Docker displays.
///
/// It makes different spellings of one repository equal.
pub(super) fn familiar(parsed: &distribution::Reference) -> String {
    match (parsed.registry(), parsed.repository()) {
        ("docker.io" | "index.docker.io", repository) => {
            let short = repository.strip_prefix("library/").filter(|short| !short.contains('/'));
            short.unwrap_or(repository).to_owned()
        }
        (registry, repository) => format!("{registry}/{repository}"),
    }
}

/// Reports whether Docker would take a repository for an image id, which is 64 hexadecimal digits.
fn is_image_id(repository: &str) -> bool {
    repository.len() == 64 && repository.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c))
}

fn is_tag(tag: &str) -> bool {
    let mut chars = tag.chars();
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    tag.len() <= 128 && chars.next().is_some_and(word) && chars.all(|c| word(c) || c == '.' || c == '-')
}

/// Reports whether the only colon of a repository is the one before its registry's port.
fn has_registry_port(repository: &str) -> bool {
    repository
        .split_once('/')
        .is_some_and(|(registry, path)| registry.matches(':').count() == 1 && !path.contains([':', '@']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_docker_references_are_refused() {
        for repository in
            ["", "Trailer/a", "trailer//a", "trailer/a:b", "trailer/a@sha256:00", "a b", "/a", "trailer/"]
        {
            assert!(Reference::new(repository, "").is_err(), "{repository}");
        }
        for tag in [".a", "-a", "a b", "a/b", "ä", &"a".repeat(129)] {
            assert_eq!(Reference::new("trailer/a", tag), Err(ReferenceError::Tag), "{tag}");
        }
        for repository in ["trailer/a", "trailer/a/b_c", "localhost:5000/a", "registry.example/a"] {
            assert!(Reference::new(repository, "v1.0").is_ok(), "{repository}");
        }
    }

    #[test]
    fn one_repository_has_one_spelling() {
        for (given, short) in [
            ("docker.io/trailer/a", "trailer/a"),
            ("index.docker.io/trailer/a", "trailer/a"),
            ("docker.io/library/ubuntu", "ubuntu"),
            ("library/ubuntu", "ubuntu"),
            ("ubuntu", "ubuntu"),
            ("localhost:5000/a", "localhost:5000/a"),
            ("quay.io/library/a", "quay.io/library/a"),
        ] {
            assert_eq!(Reference::new(given, "").expect("a reference").repository(), short);
        }
    }

    #[test]
    fn a_pulled_reference_has_a_tag_or_a_digest() {
        let pulled = |text: &str| PulledReference::parse(text).map(|pulled| pulled.reference().to_string());
        let digest = format!("sha256:{}", "0".repeat(64));
        assert_eq!(pulled("nginx").as_deref(), Some("nginx:latest"));
        assert_eq!(pulled("quay.io/a/b:1").as_deref(), Some("quay.io/a/b:1"));
        assert_eq!(pulled(&format!("nginx@{digest}")).as_deref(), Some("nginx"));
        assert_eq!(pulled(&format!("nginx:1@{digest}")).as_deref(), Some("nginx:1"));
        assert_eq!(pulled(&format!("nginx@sha256:{}", "A".repeat(64))), None);
        assert_eq!(pulled(&"a1".repeat(32)), None);
        for bad in ["", " nginx", "nginx ", "Nginx", "a b", "nginx:", "nginx@sha256:00", "a\nb", "-x"] {
            assert_eq!(pulled(bad), None, "{bad:?}");
        }
    }
}
