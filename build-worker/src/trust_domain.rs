//! Trust domains: builds of different domains share neither results of steps nor cache mounts.

use std::fmt;

use proto::dispatch::NamedSecret;
use ring::digest::{Context, SHA256};

/// The name that the service gives the trust domain of a build: 16 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrustDomain(String);

impl TrustDomain {
    /// Parses a name; returns `None` for anything else, which must not become part of a path.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        const DIGITS: usize = 16;
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (name.len() == DIGITS && name.bytes().all(is_digit)).then(|| Self(name.to_owned()))
    }
}

impl TrustDomain {
    /// Returns the domain of builds with these secrets: the engine knows the results of steps by neither their
    /// values nor their names.
    pub(crate) fn with_secrets(&self, secrets: &[NamedSecret], agents: &[NamedSecret]) -> Self {
        if secrets.is_empty() && agents.is_empty() {
            return self.clone();
        }
        let mut hashing = Context::new(&SHA256);
        hashing.update(self.0.as_bytes());
        for (kind, list) in [("secret", secrets), ("agent", agents)] {
            // Neither ids nor names have white space.
            let mut lines: Vec<String> =
                list.iter().map(|NamedSecret { id, name }| format!("\n{kind} {id} {name}")).collect();
            lines.sort();
            hashing.update(lines.concat().as_bytes());
        }
        Self(hex::encode(&hashing.finish().as_ref()[..8]))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_make_another_domain() {
        let named = |id: &str, name: &str| NamedSecret { id: id.to_owned(), name: name.to_owned() };
        let (a, b) = (named("a", "x"), named("b", "y"));
        let domain = TrustDomain::parse("0123456789abcdef").expect("a domain");
        let of = |secrets: &[NamedSecret], agents: &[NamedSecret]| domain.with_secrets(secrets, agents).0;
        assert_eq!(of(&[], &[]), domain.0);
        let domains = [
            of(&[], &[]),
            of(std::slice::from_ref(&a), &[]),
            of(&[], std::slice::from_ref(&a)),
            of(&[named("a", "y")], &[]),
            of(&[a.clone(), b.clone()], &[]),
        ];
        let distinct: std::collections::BTreeSet<_> = domains.iter().collect();
        assert_eq!(distinct.len(), domains.len());
        assert!(domains.iter().all(|domain| TrustDomain::parse(domain).is_some()));
        assert_eq!(of(&[a.clone(), b.clone()], &[]), of(&[b, a], &[]));
    }

    #[test]
    fn a_domain_is_sixteen_digits() {
        for (name, is_domain) in [
            ("0123456789abcdef", true),
            ("0123456789ABCDEF", false),
            ("0123456789abcde", false),
            ("0123456789abcdef0", false),
            ("../../../../../..", false),
            ("", false),
        ] {
            assert_eq!(TrustDomain::parse(name).is_some(), is_domain, "{name}");
        }
    }
}
