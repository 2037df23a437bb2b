//! A cache of recently read configurations.
//!
//! The configuration of an image at a revision never changes, unless the database is restored from a backup
//! and reuses the revision.

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

/// An image and the revision of its configuration.
pub(super) type Key = (ImageId, i64);

/// A configuration and its encoding by the transport.
#[derive(Debug)]
pub(crate) struct CachedConfiguration {
    pub(crate) configuration: Configuration,
    /// Size as stored, in bytes.
    size: usize,
    encoded: OnceLock<Bytes>,
}

impl CachedConfiguration {
    /// Returns the encoding by the transport, which is computed on first use.
    pub(crate) fn encoded(&self, encode: impl FnOnce(&Configuration) -> Bytes) -> &Bytes {
        self.encoded.get_or_init(|| encode(&self.configuration))
    }
}

/// A bounded cache in front of the database.
#[derive(Debug)]
pub(super) struct Configurations(Cache<Key, Arc<CachedConfiguration>, BySize>);

#[derive(Clone, Debug)]
struct BySize;

impl Weighter<Key, Arc<CachedConfiguration>> for BySize {
    fn weight(&self, _: &Key, cached: &Arc<CachedConfiguration>) -> u64 {
        /// Memory besides the texts, in bytes. The texts are counted twice: plain and encoded.
        const FIXED: usize = 600;
        (FIXED + 2 * cached.size) as u64
    }
}

impl Configurations {
    /// Maximum memory of the cache, in bytes.
    const MEMORY: u64 = 192 * 1024 * 1024;
    /// Expected number of configurations in the cache.
    const EXPECTED: usize = 100_000;

    pub(super) fn new() -> Self {
        Self(Cache::with_weighter(Self::EXPECTED, Self::MEMORY, BySize))
    }

    /// Removes all configurations from the cache.
    pub(super) fn clear(&self) {
        self.0.clear();
    }

    /// Returns the configurations that exist, from the cache or the database.
    ///
    /// # Errors
    ///
    /// Returns an error if the database cannot be read.
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
