//! Trust domains: builds of different domains share neither results of steps nor cache mounts.

use std::fmt;

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

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
