//! Configurations that were read lately. One never changes under its image and revision, unless the database goes back and gives
//! the revision again.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use quick_cache::{Weighter, sync::Cache};

use crate::{
    error::Error,
    image::{Configuration, ImageId},
    store::Store,
};

/// An image and a revision of its configuration.
pub(super) type Key = (ImageId, i64);

/// A configuration, and what the transport has made of it.
#[derive(Debug)]
pub(crate) struct CachedConfiguration {
    pub(crate) configuration: Configuration,
    /// As it is stored. Bytes.
    size: usize,
    encoded: OnceLock<Bytes>,
}

impl CachedConfiguration {
    /// Returns what the transport has made of it, which it does once.
    pub(crate) fn encoded(&self, encode: impl FnOnce(&Configuration) -> Bytes) -> &Bytes {
        self.encoded.get_or_init(|| encode(&self.configuration))
    }
}

/// A bounded cache before the database.
#[derive(Debug)]
pub(super) struct Configurations(Cache<Key, Arc<CachedConfiguration>, BySize>);

#[derive(Clone, Debug)]
struct BySize;

impl Weighter<Key, Arc<CachedConfiguration>> for BySize {
    fn weight(&self, _: &Key, cached: &Arc<CachedConfiguration>) -> u64 {
        /// The memory that it takes beside its texts, which are there twice: as they are, and encoded.
        const FIXED: usize = 600;
        (FIXED + 2 * cached.size) as u64
    }
}

impl Configurations {
    /// The most memory that the cache takes. Bytes.
    const MEMORY: u64 = 192 * 1024 * 1024;
    /// The number of configurations that are expected in it.
    const EXPECTED: usize = 100_000;

    pub(super) fn new() -> Self {
        Self(Cache::with_weighter(Self::EXPECTED, Self::MEMORY, BySize))
    }

    /// Removes all of them from the cache.
    pub(super) fn clear(&self) {
        self.0.clear();
    }

    /// Returns those of the configurations that are kept.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub(super) async fn get(
        &self,
        store: &Store,
        keys: impl IntoIterator<Item = Key>,
    ) -> Result<HashMap<Key, Arc<CachedConfiguration>>, Error> {
        let mut found = HashMap::new();
        let mut missing = Vec::new();
        for key in keys {
            match self.0.get(&key) {
                Some(cached) => {
                    found.insert(key, cached);
                }
                None => missing.push(key),
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
        for (key, (configuration, size)) in store.configurations(&missing).await? {
            let cached = Arc::new(CachedConfiguration { configuration, size, encoded: OnceLock::new() });
            self.0.insert(key, Arc::clone(&cached));
            found.insert(key, cached);
        }
        Ok(found)
    }
}
