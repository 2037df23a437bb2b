//! The attempts that this worker works on, or has reports of that are not durable.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto::dispatch::Attempt;
use tokio::sync::{Notify, watch};

use crate::{
    job::{Control, StopReason},
    outbox::Outbox,
};

/// An attempt that this worker works on, or has reports of that are not durable.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) control: Arc<Control>,
}

/// The one owner of what is held.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    held: Mutex<BTreeMap<Attempt, Held>>,
    /// One has ended.
    removed: Notify,
    /// One that the service still wants was given up.
    given_up: watch::Sender<()>,
}

/// A job's entry, removed when the job ends, however it ends.
#[derive(Debug)]
pub(crate) struct Entry {
    jobs: Arc<Jobs>,
    attempt: Attempt,
}

impl Held {
    /// Nobody wants the attempt any more: its work is to stop, and nothing more is reported of it.
    pub(crate) fn fence(&self) {
        self.outbox.drop_all();
        self.control.stop(StopReason::Fenced);
    }

    /// Whether the attempt is only held until its work has stopped.
    pub(crate) fn is_fenced(&self) -> bool {
        self.outbox.is_dropped()
    }
}

impl Entry {
    /// See [`Jobs::give_up`].
    pub(crate) fn give_up(&self) {
        self.jobs.give_up(&self.attempt);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.jobs.held().remove(&self.attempt);
        self.jobs.removed.notify_waiters();
    }
}

impl Jobs {
    /// Adds an attempt; its entry goes when it is dropped. None when it was there already.
    pub(crate) fn insert(self: &Arc<Self>, attempt: Attempt, job: Held) -> Option<Entry> {
        let mut held = self.held();
        if held.contains_key(&attempt) {
            return None;
        }
        held.insert(attempt.clone(), job);
        Some(Entry { jobs: Arc::clone(self), attempt })
    }

    /// Fences an attempt that the service still wants. The connection has to end, so that the next one is begun without it:
    /// then the service queues the build again.
    pub(crate) fn give_up(&self, attempt: &Attempt) {
        if let Some(held) = self.held().get(attempt) {
            held.fence();
        }
        self.given_up.send_replace(());
    }

    /// Changes whenever an attempt is given up from now on.
    pub(crate) fn given_up(&self) -> watch::Receiver<()> {
        self.given_up.subscribe()
    }

    pub(crate) fn all(&self) -> Vec<(Attempt, Held)> {
        let held = self.held();
        held.iter().map(|(attempt, job)| (attempt.clone(), job.clone())).collect()
    }

    /// Waits until a condition holds, which jobs fulfil by ending.
    pub(crate) async fn until(&self, condition: impl Fn(&BTreeMap<Attempt, Held>) -> bool) {
        loop {
            let removed = self.removed.notified();
            if condition(&self.held()) {
                return;
            }
            removed.await;
        }
    }

    pub(crate) fn held(&self) -> MutexGuard<'_, BTreeMap<Attempt, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
