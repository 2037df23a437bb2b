//! What verified tokens said, so that a signature is checked once and not at every call.

use std::collections::HashMap;

use ring::digest::{SHA256, digest};

use crate::access::Principal;

/// A token by its SHA-256: who reads the memory finds no tokens in it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint([u8; 32]);

/// The principals of verified tokens, in two generations: when the recent one is full, it becomes the older one, and
/// what was older is forgotten. So neither a bound nor the forgetting needs a search.
#[derive(Debug, Default)]
pub(super) struct Verified {
    recent: HashMap<Fingerprint, Principal>,
    older: HashMap<Fingerprint, Principal>,
}

impl Fingerprint {
    pub(super) fn of(token: &str) -> Self {
        let digest = digest(&SHA256, token.as_bytes());
        Self(digest.as_ref().try_into().expect("a SHA-256 has 32 bytes"))
    }
}

impl Verified {
    /// Half of what is kept at most: 10,000 tokens are about 2 MiB.
    const GENERATION: usize = 5_000;

    pub(super) fn get(&self, token: &Fingerprint) -> Option<&Principal> {
        self.recent.get(token).or_else(|| self.older.get(token))
    }

    pub(super) fn insert(&mut self, token: Fingerprint, principal: Principal) {
        if self.recent.len() >= Self::GENERATION {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(token, principal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timestamp::Timestamp;

    #[test]
    fn the_newest_are_kept_and_the_memory_is_bounded() {
        let mut verified = Verified::default();
        for number in 0..30_000 {
            let principal = Principal::new(number.to_string(), Vec::new(), Timestamp::from_micros(0));
            verified.insert(Fingerprint::of(&number.to_string()), principal);
            assert!(verified.recent.len() + verified.older.len() <= 10_000);
        }
        for number in 25_000..30_000 {
            let found = verified.get(&Fingerprint::of(&number.to_string()));
            assert_eq!(found.map(Principal::subject), Some(number.to_string().as_str()));
        }
        assert_eq!(verified.get(&Fingerprint::of("0")), None);
    }
}
