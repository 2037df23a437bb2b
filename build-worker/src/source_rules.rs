//! The operator's rules on the sources of builds.

use crate::reference;

/// Images and hosts that builds may use beside the catalogue's.
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceRules {
    /// Patterns of images that builds may use from registries.
    pub(crate) registries: Vec<Pattern>,
    /// Patterns of images that builds may use although only the engine has them.
    pub(crate) local: Vec<Pattern>,
    /// Hosts from which ADD may fetch files and Git repositories.
    pub(crate) hosts: Vec<Pattern>,
    /// Patterns of images that builds may run as frontends.
    pub(crate) frontends: Vec<Pattern>,
}

/// A pattern in which `*` stands for any characters but `/`, and at the end for any characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern(String);

impl SourceRules {
    /// Reports whether a build may use an image of this canonical reference from a registry.
    pub(crate) fn allow_from_registry(&self, canonical: &str) -> bool {
        allows(&self.registries, canonical)
    }

    /// Reports whether a build may use an image of this canonical reference that only the engine has.
    pub(crate) fn allow_local(&self, canonical: &str) -> bool {
        allows(&self.local, canonical)
    }

    /// Reports whether a build may run an image of this canonical reference as its frontend.
    pub(crate) fn allow_frontend(&self, canonical: &str) -> bool {
        allows(&self.frontends, canonical)
    }
}

/// Compares with and without what Docker leaves out of a reference.
fn allows(patterns: &[Pattern], canonical: &str) -> bool {
    let familiar = reference::familiar(canonical);
    patterns.iter().any(|pattern| pattern.matches(canonical) || pattern.matches(familiar))
}

impl Pattern {
    pub(crate) fn new(pattern: &str) -> Self {
        Self(pattern.to_owned())
    }

    pub(crate) fn matches(&self, text: &str) -> bool {
        matches(&self.0, text)
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }
}

fn matches(pattern: &str, text: &str) -> bool {
    let Some((literal, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(text) = text.strip_prefix(literal) else { return false };
    if rest.is_empty() {
        return true;
    }
    let component = text.find('/').unwrap_or(text.len());
    (0..=component).filter(|&end| text.is_char_boundary(end)).any(|end| matches(rest, &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything_in_a_component_or_at_the_end() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("*", "docker.io/library/ubuntu:24.04", true),
            ("a*", "ab/c", true),
            ("a*", "ba", false),
            ("*a", "ba", true),
            ("a*b*c", "a-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a*a", "a", false),
            ("a", "a", true),
            ("a", "ab", false),
            ("*.example.com/*", "a.example.com/b/c:1", true),
            ("*.example.com/*", "127.0.0.1:5000/a.example.com/b:1", false),
            ("*a", "b/a", false),
            ("*/a/*", "b/a/c", true),
            ("*/a/*", "b/b/a/c", false),
            ("é*é/*", "éüé/b", true),
        ] {
            assert_eq!(Pattern::new(pattern).matches(text), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn an_image_is_named_as_docker_shows_it_or_in_full() {
        let rules = SourceRules {
            local: vec![Pattern::new("ubuntu:*"), Pattern::new("docker.io/a/*")],
            ..SourceRules::default()
        };
        for (image, is_allowed) in [
            ("docker.io/library/ubuntu:24.04", true),
            ("docker.io/a/b:1", true),
            ("docker.io/b/ubuntu:1", false),
            ("quay.io/a/b:1", false),
        ] {
            assert_eq!(rules.allow_local(image), is_allowed, "{image}");
        }
    }
}
