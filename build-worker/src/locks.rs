//! Locks by name: any number of users at a time, or else one that removes what has the name.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

/// Locks that exist for as long as somebody holds them.
#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<BTreeMap<String, Weak<RwLock<()>>>>);

/// The guard of a user; what has the name stays while the guard lives.
pub(crate) type SharedLock = OwnedRwLockReadGuard<()>;
/// The guard of a removal.
pub(crate) type ExclusiveLock = OwnedRwLockWriteGuard<()>;

impl Locks {
    /// Waits until no removal is under way.
    pub(crate) async fn lock_shared(&self, name: &str) -> SharedLock {
        self.lock(name).read_owned().await
    }

    /// Keeps users out; returns `None` if there are some.
    pub(crate) fn try_lock_exclusive(&self, name: &str) -> Option<ExclusiveLock> {
        self.lock(name).try_write_owned().ok()
    }

    fn lock(&self, name: &str) -> Arc<RwLock<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(name).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(RwLock::new(()));
        locks.insert(name.to_owned(), Arc::downgrade(&lock));
        lock
    }
}
