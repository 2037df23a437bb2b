//! Hints within the process that something is new in the store.
//!
//! A hint says only "read on": the rows are the truth, and every reader also polls slowly, so that a lost hint costs
//! time and nothing else.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, watch};

use crate::{
    build::BuildId,
    store::{Committed, Hint},
};

/// Where committed transactions are announced. One feed and one dispatcher wait here, and any number of watchers.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    changes: Notify,
    queue: Notify,
    histories: Mutex<HashMap<BuildId, watch::Sender<()>>>,
}

impl Signals {
    /// Tells everyone who waits for what a transaction has brought.
    pub(crate) fn announce(&self, committed: &Committed) {
        if committed.image_changed {
            self.changes.notify_one();
        }
        if committed.queue_moved {
            self.queue.notify_one();
        }
        for build in &committed.recorded {
            self.history_grew(*build);
        }
    }

    /// Passes on what another process has committed.
    pub(crate) fn hint(&self, hint: Hint) {
        match hint {
            Hint::Changed => self.changes.notify_one(),
            Hint::QueueMoved => self.queue.notify_one(),
            Hint::Recorded(build) => self.history_grew(build),
            Hint::Anything => {
                self.changes.notify_one();
                self.queue.notify_one();
                for watchers in self.histories().values() {
                    // A watcher that is gone is forgotten when it says so.
                    let _ = watchers.send(());
                }
            }
        }
    }

    /// Wakes the dispatcher: there may be a free slot.
    pub(crate) fn slot_freed(&self) {
        self.queue.notify_one();
    }

    pub(crate) async fn changed(&self) {
        self.changes.notified().await;
    }

    pub(crate) async fn queue_moved(&self) {
        self.queue.notified().await;
    }

    /// Marks the history of a build as new whenever it grows. Subscribe, then read.
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

    /// Forgets a build that nobody watches any more.
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
