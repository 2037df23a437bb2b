//! Trust domains: builds of different domains share neither results of steps nor cache mounts.

use std::fmt;

use ring::digest::{SHA256, digest};

/// The domain of all builds of one creator's images that one caller has requested.
///
/// Both count, because both decide what runs: the creator writes what is built, and the caller what it may
/// read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrustDomain(String);

impl TrustDomain {
    pub(crate) fn new(creator: &str, requested_by: &str) -> Self {
        // Subjects have no control characters.
        let digest = digest(&SHA256, format!("{creator}\n{requested_by}").as_bytes());
        Self(hex::encode(&digest.as_ref()[..8]))
    }
}

impl fmt::Display for TrustDomain {
    /// Writes 16 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_callers_count() {
        let all = [("alice", "alice"), ("alice", "bob"), ("bob", "alice"), ("bob", "bob"), ("a", "liceb")];
        let domains: std::collections::BTreeSet<String> =
            all.iter().map(|(creator, requester)| TrustDomain::new(creator, requester).to_string()).collect();
        assert_eq!(domains.len(), all.len());
        assert!(domains.iter().all(|domain| domain.len() == 16), "{domains:?}");
    }
}
