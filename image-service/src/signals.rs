//! In-process hints that the store has new rows.
//!
//! A hint only says "read again": the rows are authoritative, and every reader also polls slowly, so that a
//! lost hint costs nothing but time.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, watch};

use crate::{build::BuildId, dispatch::Committed, hint::Hint, image::ImageId};

/// The hub where committed transactions are announced to one change log follower, one dispatcher and any
/// number of watches.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    changes: Notify,
    queue: Notify,
    histories: Mutex<HashMap<BuildId, watch::Sender<()>>>,
    /// Images of which a build has ended.
    ended: Mutex<BTreeSet<ImageId>>,
    has_ended: Notify,
}

impl Signals {
    /// Wakes all that wait for something that the transaction has changed.
    pub(crate) fn announce(&self, committed: &Committed) {
        if !committed.changed.is_empty() {
            self.changes.notify_one();
        }
        if committed.queue_changed {
            self.queue.notify_one();
        }
        for build in &committed.recorded {
            self.history_grew(*build);
        }
    }

    /// Forwards a hint about a commit of another process.
    pub(crate) fn hint(&self, hint: Hint) {
        match hint {
            Hint::Changed => self.changes.notify_one(),
            Hint::QueueChanged => self.queue.notify_one(),
            Hint::Recorded(build) => self.history_grew(build),
            Hint::Anything => {
                self.changes.notify_one();
                self.queue.notify_one();
                for watchers in self.histories().values() {
                    // A watcher that is gone is removed when it unsubscribes.
                    let _ = watchers.send(());
                }
            }
        }
    }

    /// Wakes the dispatcher because a slot may be free.
    pub(crate) fn slot_freed(&self) {
        self.queue.notify_one();
    }

    pub(crate) async fn changed(&self) {
        self.changes.notified().await;
    }

    pub(crate) async fn queue_changed(&self) {
        self.queue.notified().await;
    }

    /// Announces that a build of an image has ended. Dropped if too many images wait, because a slow poll
    /// finds them too.
    pub(crate) fn end_build(&self, image: ImageId) {
        const MOST: usize = 10_000;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.len() < MOST {
            ended.insert(image);
            self.has_ended.notify_one();
        }
    }

    /// Waits for an image of which a build has ended, and returns it.
    pub(crate) async fn build_ended(&self) -> ImageId {
        loop {
            if let Some(image) = self.ended.lock().unwrap_or_else(PoisonError::into_inner).pop_first() {
                return image;
            }
            self.has_ended.notified().await;
        }
    }

    /// Subscribes to the history of a build: the receiver is notified whenever it grows. Subscribe before
    /// reading.
    pub(crate) fn subscribe_history(&self, build: BuildId) -> watch::Receiver<()> {
        self.histories().entry(build).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    fn history_grew(&self, build: BuildId) {
        let mut histories = self.histories();
        if let Some(watchers) = histories.get(&build)
            && watchers.send(()).is_err()
        {
            // The last watcher is gone.
            histories.remove(&build);
        }
    }

    /// Drops a subscription, and removes the build if it was the last one.
    pub(crate) fn unsubscribe_history(&self, build: BuildId, receiver: watch::Receiver<()>) {
        drop(receiver);
        let mut histories = self.histories();
        if histories.get(&build).is_some_and(watch::Sender::is_closed) {
            histories.remove(&build);
        }
    }

    fn histories(&self) -> MutexGuard<'_, HashMap<BuildId, watch::Sender<()>>> {
        self.histories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
