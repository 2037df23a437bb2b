//! Namespaces: the repositories that belong to one creator for ever, so that nobody takes a name that others
//! build from.

use std::fmt;

use ring::digest::{SHA256, digest};

use super::{Reference, ReferenceError};
use crate::image::Name;

/// Prefixes of repositories that the operator leaves to creators, such as `trailer.invalid/`.
#[derive(Clone, Debug)]
pub(crate) struct RepositoryPrefixes(Vec<String>);

/// The repositories that an image may be given: below a prefix and the creator's own directory, as in
/// `trailer.invalid/alice-2bd806c9/go-tools`. Admins may give any.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    /// The prefixes with the creator's directory, each ending in `/`; at least one.
    directories: Vec<String>,
    is_unlimited: bool,
}

impl RepositoryPrefixes {
    /// Checks that repositories can begin with each of the prefixes.
    ///
    /// # Errors
    ///
    /// Returns the violated rule if a prefix is invalid or there is none.
    pub(crate) fn parse(prefixes: &[String]) -> Result<Self, String> {
        const MAX_BYTES: usize = 80;
        for prefix in prefixes {
            if !prefix.ends_with('/') {
                return Err(format!("the repository prefix {prefix:?} must end with `/`"));
            }
            if prefix.len() > MAX_BYTES {
                return Err(format!("the repository prefix {prefix:?} must have at most {MAX_BYTES} bytes"));
            }
            let below = Reference::new(&format!("{prefix}a/b"), "")
                .map_err(|_| format!("no Docker repository can begin with the prefix {prefix:?}"))?;
            if !below.repository().starts_with(prefix.as_str()) {
                return Err(format!(
                    "the repository prefix {prefix:?} must be in the short form that Docker shows"
                ));
            }
        }
        if prefixes.is_empty() {
            return Err("at least one repository prefix is needed".to_owned());
        }
        Ok(Self(prefixes.to_vec()))
    }

    /// Reports whether a repository lies below one of the prefixes, so that no other image than the
    /// catalogue's has it.
    ///
    /// A registry that is named by an address counts as the registry of every prefix with its port.
    pub(crate) fn contain(&self, repository: &str) -> bool {
        self.0.iter().any(|prefix| {
            repository.starts_with(prefix.as_str())
                || by_name(repository, prefix).is_some_and(|named| named.starts_with(prefix.as_str()))
        })
    }

    /// Returns the namespace of an image of `creator`, which is unlimited if an admin names the image.
    pub(crate) fn namespace(&self, creator: &str, is_unlimited: bool) -> Namespace {
        let directory = directory(creator);
        let directories = self.0.iter().map(|prefix| format!("{prefix}{directory}/")).collect();
        Namespace { directories, is_unlimited }
    }
}

impl Namespace {
    /// Maximum length of the part of a repository that is derived from a name.
    const MAX_SLUG: usize = 100;

    /// Derives the reference of an image that was given only a name.
    ///
    /// # Errors
    ///
    /// Returns [`ReferenceError`] if the tag is invalid.
    pub(crate) fn derive(&self, name: &Name, tag: &str) -> Result<Reference, ReferenceError> {
        let first = self.directories.first().map(String::as_str).unwrap_or_default();
        Reference::new(&format!("{first}{}", slug(name.as_str())), tag)
    }

    /// Reports whether a reference lies in the namespace.
    pub(crate) fn contains(&self, reference: &Reference) -> bool {
        let is_below = |directory: &String| reference.repository().starts_with(directory.as_str());
        let is_reserved = Reference::is_reserved(reference.repository());
        !is_reserved && (self.is_unlimited || self.directories.iter().any(is_below))
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.directories.join(", "))
    }
}

/// Returns the directory of a creator: readable, and different from that of any other.
fn directory(creator: &str) -> String {
    const MAX_SLUG: usize = 40;
    let digest = digest(&SHA256, creator.as_bytes());
    let distinct = hex::encode(&digest.as_ref()[..4]);
    format!("{}-{distinct}", words(creator, MAX_SLUG, "creator"))
}

/// Returns a repository with the registry of a prefix, if its own is an address that may be that registry's.
fn by_name(repository: &str, prefix: &str) -> Option<String> {
    let ((address, path), (registry, _)) = (repository.split_once('/')?, prefix.split_once('/')?);
    let is_registry = registry.contains(['.', ':']) || registry == "localhost";
    // This top-level domain has no addresses.
    let has_address = is_registry && !host_and_port(registry).0.ends_with(".invalid");
    let ((host, port), (_, wanted_port)) = (host_and_port(address), host_and_port(registry));
    (has_address && is_address(host) && port == wanted_port).then(|| format!("{registry}/{path}"))
}

fn host_and_port(registry: &str) -> (&str, &str) {
    const HTTPS: &str = "443";
    match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        Some(_) | None => (registry, HTTPS),
    }
}

/// Reports whether a host is no name but an address, in any of the forms that resolvers accept, or this host.
fn is_address(host: &str) -> bool {
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    let is_number = last.starts_with(|first: char| first.is_ascii_digit());
    host.starts_with('[') || is_number || last == "localhost"
}

/// Returns the part of a repository that is derived from a name.
pub(in crate::image) fn slug(name: &str) -> String {
    words(name, Namespace::MAX_SLUG, "image")
}

/// Transliterates a text to lower-case ASCII words joined by `-`; `nothing` if there are none.
fn words(text: &str, max: usize, nothing: &str) -> String {
    let mut words = String::new();
    for c in deunicode::deunicode(text).chars() {
        let c = c.to_ascii_lowercase();
        if c.is_ascii_alphanumeric() {
            words.push(c);
        } else if !words.is_empty() && !words.ends_with('-') {
            words.push('-');
        }
        if words.len() == max {
            break;
        }
    }
    let words = words.trim_end_matches('-');
    if words.is_empty() { nothing } else { words }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefixes() -> RepositoryPrefixes {
        let prefixes = ["trailer.invalid/", "registry.example/team/"].map(str::to_owned);
        RepositoryPrefixes::parse(&prefixes).expect("prefixes")
    }

    fn derived(creator: &str, name: &str) -> String {
        let name = Name::parse(name).expect("a name");
        let derived = prefixes().namespace(creator, false).derive(&name, "");
        derived.expect("a reference").to_string()
    }

    #[test]
    fn a_reference_is_derived_from_any_name() {
        for (name, slug) in [
            ("Go Tools 1.24 (beta)", "go-tools-1-24-beta"),
            ("—", "image"),
            ("Größe", "grosse"),
            ("Ärger", "arger"),
            ("日本語", "ri-ben-yu"),
            ("Привет, мир", "privet-mir"),
        ] {
            assert_eq!(derived("alice", name), format!("trailer.invalid/alice-2bd806c9/{slug}:latest"));
        }
        assert!(derived("alice", &"a b".repeat(40)).len() < 140);
    }

    #[test]
    fn every_creator_has_a_directory() {
        for (creator, directory) in [
            ("alice", "alice-2bd806c9"),
            ("Alice", "alice-3bc51062"),
            ("auth0|5f7c8ec7c33c6c004bbafe82", "auth0-5f7c8ec7c33c6c004bbafe82-"),
            ("日本", "ri-ben-"),
            ("//", "creator-"),
        ] {
            let derived = derived(creator, "a");
            assert!(derived.starts_with(&format!("trailer.invalid/{directory}")), "{derived}");
        }
        assert!(derived(&"x/".repeat(127), &"y".repeat(120)).len() < 255);
    }

    #[test]
    fn a_namespace_ends_where_another_begins() {
        let [alice, admin] = [false, true].map(|is_unlimited| prefixes().namespace("alice", is_unlimited));
        for (repository, is_contained) in [
            ("trailer.invalid/alice-2bd806c9/a", true),
            ("registry.example/team/alice-2bd806c9/a/b", true),
            ("trailer.invalid/alice-2bd806c9", false),
            ("trailer.invalid/alice-2bd806c90/a", false),
            ("trailer.invalid/bob-81b637d8/a", false),
            ("trailer.invalid/a", false),
            ("alice-2bd806c9/a", false),
        ] {
            let reference = Reference::new(repository, "").expect("a reference");
            assert_eq!(alice.contains(&reference), is_contained, "{repository}");
            assert!(admin.contains(&reference));
        }
        let reserved = Reference::new("trailer.invalid/artifact/a", "").expect("a reference");
        assert!(!admin.contains(&reserved));
    }

    #[test]
    fn a_registry_may_be_named_by_its_address() {
        let prefixes =
            ["trailer.invalid/", "registry.example/team/", "localhost:5000/", "hub/"].map(str::to_owned);
        let prefixes = RepositoryPrefixes::parse(&prefixes).expect("prefixes");
        for (repository, is_contained) in [
            ("registry.example/team/a", true),
            ("192.0.2.1/team/a", true),
            ("192.0.2.1:443/team/a", true),
            ("[2001:db8::1]/team/a", true),
            ("192.0.2.1/other/a", false),
            ("192.0.2.1:444/team/a", false),
            ("127.0.0.1:5000/a", true),
            ("0x7f000001:5000/a", true),
            ("127.1:5000/a", true),
            ("[::1]:5000/a", true),
            ("localhost:5000/a", true),
            ("127.0.0.1:5001/a", false),
            ("mirror.example:5000/a", false),
            ("192.0.2.1/hub/a", false),
            ("a", false),
        ] {
            assert_eq!(prefixes.contain(repository), is_contained, "{repository}");
        }
    }

    #[test]
    fn a_prefix_is_a_whole_path_component() {
        for bad in ["trailer", "TRAILER/", "docker.io/acme/", "/", &format!("{}/", "a".repeat(80))] {
            assert!(RepositoryPrefixes::parse(&[bad.to_owned()]).is_err(), "{bad}");
        }
        assert!(RepositoryPrefixes::parse(&[]).is_err());
    }
}
