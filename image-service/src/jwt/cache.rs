//! A cache of verified tokens, so that a signature is checked once and not at every call.

use std::collections::HashMap;

use ring::digest::{SHA256, digest};

use crate::access::Principal;

/// The SHA-256 of a token, so that the cache contains no tokens.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint([u8; 32]);

/// The principals of verified tokens, in two generations.
///
/// When the recent generation is full, it becomes the older one, and the previous older one is dropped.
/// Neither the size limit nor the eviction needs a search.
#[derive(Debug, Default)]
pub(super) struct TokenCache {
    recent: HashMap<Fingerprint, Principal>,
    older: HashMap<Fingerprint, Principal>,
}

impl Fingerprint {
    pub(super) fn new(token: &str) -> Self {
        let digest = digest(&SHA256, token.as_bytes());
        Self(digest.as_ref().try_into().expect("a SHA-256 has 32 bytes"))
    }
}

impl TokenCache {
    /// Maximum size of a generation. Two generations, of 10,000 tokens, take about 2 MiB.
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
        let mut verified = TokenCache::default();
        for number in 0..30_000 {
            let principal = Principal::new(number.to_string(), Vec::new(), Timestamp::from_micros(0));
            verified.insert(Fingerprint::new(&number.to_string()), principal);
            assert!(verified.recent.len() + verified.older.len() <= 10_000);
        }
        for number in 25_000..30_000 {
            let found = verified.get(&Fingerprint::new(&number.to_string()));
            assert_eq!(found.map(Principal::subject), Some(number.to_string().as_str()));
        }
        assert_eq!(verified.get(&Fingerprint::new("0")), None);
    }
}
