//! Hints within the process that something is new in the store.
//!
//! A hint says only "read on": the rows are the truth, and every reader also polls slowly, so that a lost hint costs
//! time and nothing else.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, watch};

use crate::{build::BuildId, dispatch::Committed, hint::Hint, image::ImageId};

/// Where committed transactions are announced. One feed and one dispatcher wait here, and any number of watchers.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    changes: Notify,
    queue: Notify,
    histories: Mutex<HashMap<BuildId, watch::Sender<()>>>,
    /// The images of builds that have ended.
    ended: Mutex<BTreeSet<ImageId>>,
    has_ended: Notify,
}

impl Signals {
    /// Tells everyone who waits for what a transaction has brought.
    pub(crate) fn announce(&self, committed: &Committed) {
        if !committed.changed.is_empty() {
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

    /// A build of an image has ended. Forgotten when too many wait: there is a slow poll.
    pub(crate) fn end_build(&self, image: ImageId) {
        const MOST: usize = 10_000;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.len() < MOST {
            ended.insert(image);
            self.has_ended.notify_one();
        }
    }

    /// Waits for an image of which a build has ended.
    pub(crate) async fn build_ended(&self) -> ImageId {
        loop {
            if let Some(image) = self.ended.lock().unwrap_or_else(PoisonError::into_inner).pop_first() {
                return image;
            }
            self.has_ended.notified().await;
        }
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
