//! Attempts that this worker works on, or whose reports are not durable yet.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto::dispatch::Attempt;
use tokio::sync::{Notify, Semaphore, watch};
use tracing::Instrument as _;

use crate::{
    job::{Control, Job, StopReason},
    locks::Locks,
    outbox::{Outbox, Unreadable},
    telemetry,
};

/// An attempt that this worker works on, or whose reports are not durable yet.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) control: Arc<Control>,
}

/// The owner of all held attempts.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    held: Mutex<BTreeMap<Attempt, Held>>,
    /// Signal that a job has ended.
    removed: Notify,
    /// Signal that an attempt was given up although the service still wants it.
    given_up: watch::Sender<()>,
}

/// The entry of a job, removed when the job ends for any reason.
#[derive(Debug)]
pub(crate) struct Entry {
    jobs: Arc<Jobs>,
    attempt: Attempt,
}

impl Held {
    /// Stops the work on an attempt that the service does not want any more, and drops its reports.
    pub(crate) fn fence(&self) {
        self.outbox.drop_all();
        self.control.stop(StopReason::Fenced);
    }

    /// Reports whether the attempt is held only until its work has stopped.
    pub(crate) fn is_fenced(&self) -> bool {
        self.outbox.is_dropped()
    }
}

impl Entry {
    /// Runs the job of this entry once the record's lock and a slot are free, and returns the image that it
    /// has replaced, by the engine's image ID.
    ///
    /// The entry is removed when every report is durable; the slot and the lock are kept until the work has
    /// stopped.
    pub(crate) async fn run(self, job: &Job, slots: &Semaphore, records: &Locks) -> Option<String> {
        let may_begin = async {
            let at_work = records.lock_shared(&job.assignment.image_id).await;
            // The semaphore is never closed.
            (at_work, slots.acquire().await.ok())
        };
        // A job whose stop is requested while it waits ends as soon as it starts.
        let _begun = tokio::select! {
            biased;
            () = job.control.stopping() => None,
            begun = may_begin => Some(begun),
        };
        let rest = {
            let running = job.run().instrument(telemetry::attempt(&job.assignment));
            tokio::pin!(running);
            tokio::select! {
                biased;
                rest = &mut running => rest,
                Unreadable = job.outbox.serve_spool() => {
                    self.jobs.give_up(&self.attempt);
                    running.await
                }
            }
        };
        drop(self);
        if let Some(left) = rest.left {
            job.reap(left).await;
        }
        rest.replaced
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.jobs.held().remove(&self.attempt);
        self.jobs.removed.notify_waiters();
    }
}

impl Jobs {
    /// Adds an attempt and returns its entry, or `None` if it is already held.
    ///
    /// Dropping the entry removes the attempt.
    pub(crate) fn insert(self: &Arc<Self>, attempt: Attempt, job: Held) -> Option<Entry> {
        let mut held = self.held();
        if held.contains_key(&attempt) {
            return None;
        }
        held.insert(attempt.clone(), job);
        Some(Entry { jobs: Arc::clone(self), attempt })
    }

    /// Fences an attempt that the service still wants.
    ///
    /// The connection has to end, so that the next one starts without the attempt: then the service queues
    /// the build again.
    pub(crate) fn give_up(&self, attempt: &Attempt) {
        if let Some(held) = self.held().get(attempt) {
            held.fence();
        }
        self.given_up.send_replace(());
    }

    /// Returns a receiver that changes whenever an attempt is given up from now on.
    pub(crate) fn given_up(&self) -> watch::Receiver<()> {
        self.given_up.subscribe()
    }

    pub(crate) fn all(&self) -> Vec<(Attempt, Held)> {
        let held = self.held();
        held.iter().map(|(attempt, job)| (attempt.clone(), job.clone())).collect()
    }

    /// Waits until a condition holds; checks it again whenever a job ends.
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
