//! Grantees: the subjects and groups that images can be granted to, and everybody.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A subject or group that images can be granted to, or everybody. The creator of an image is a grantee, too.
///
/// Stored and serialised as a kind and a name, `subject:alice`, or as a kind alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) enum Grantee {
    /// The subject of a token.
    Subject(String),
    /// A group that tokens name.
    Group(String),
    /// Every caller with a token.
    Everybody,
}

impl Grantee {
    const SUBJECT: &str = "subject:";
    const GROUP: &str = "group:";
    const EVERYBODY: &str = "everybody";
}

impl fmt::Display for Grantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Subject(subject) => write!(f, "{}{subject}", Self::SUBJECT),
            Self::Group(group) => write!(f, "{}{group}", Self::GROUP),
            Self::Everybody => f.write_str(Self::EVERYBODY),
        }
    }
}

impl From<Grantee> for String {
    fn from(grantee: Grantee) -> Self {
        grantee.to_string()
    }
}

impl TryFrom<String> for Grantee {
    type Error = String;

    fn try_from(stored: String) -> Result<Self, String> {
        if stored == Self::EVERYBODY {
            return Ok(Self::Everybody);
        }
        let of_kind = |kind| stored.strip_prefix(kind).map(str::to_owned);
        let named =
            of_kind(Self::SUBJECT).map(Self::Subject).or_else(|| of_kind(Self::GROUP).map(Self::Group));
        named.ok_or_else(|| format!("{stored:?} is no grantee"))
    }
}

/// Compact identifier of a grantee: 128 bits of the SHA-256 of its stored form.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GranteeDigest([u8; 16]);

impl GranteeDigest {
    pub(crate) fn new(grantee: &Grantee) -> Self {
        Self::of_stored(&grantee.to_string())
    }

    /// Returns the digest of a subject.
    pub(crate) fn from_subject(subject: &str) -> Self {
        Self::new(&Grantee::Subject(subject.to_owned()))
    }

    /// Returns the digest of the grantee with this stored form.
    pub(crate) fn of_stored(stored: &str) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, stored.as_bytes());
        let mut first = [0; 16];
        first.copy_from_slice(&digest.as_ref()[..16]);
        Self(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grantee_reads_back_from_its_stored_form() {
        for grantee in [
            Grantee::Subject("alice:bob".to_owned()),
            Grantee::Subject("everybody".to_owned()),
            Grantee::Subject("group:a".to_owned()),
            Grantee::Group("subject:a".to_owned()),
            Grantee::Everybody,
        ] {
            assert_eq!(Grantee::try_from(grantee.to_string()), Ok(grantee));
        }
        for stored in ["alice", "everybody:", "Group:a", ""] {
            assert!(Grantee::try_from(stored.to_owned()).is_err(), "{stored}");
        }
    }
}
