//! Workers as they are known to all replicas, and why a build waits for one of them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::WithheldAbility;
use crate::{
    build::{Build, PendingReason},
    image::Capability,
    timestamp::Timestamp,
};

/// A worker that has connected at some time. Serialised, it is an answer that the store remembers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) slots: i32,
    /// The number of builds that it holds.
    pub(crate) slots_taken: i64,
    pub(crate) engine_version: String,
    pub(crate) capabilities: BTreeSet<Capability>,
    /// The connection that speaks for it, if one does.
    #[serde(skip)]
    pub(crate) session: Option<Uuid>,
    /// Set while a connection speaks for it and it has been heard of lately.
    pub(crate) online: bool,
    pub(crate) connected_at: Timestamp,
    pub(crate) heard_at: Timestamp,
    /// Set when an operator wants it to get no more builds.
    pub(crate) drained: bool,
    /// Set when it takes no more builds by itself.
    pub(crate) draining: bool,
    #[serde(default)]
    pub(crate) protocol_version: i32,
    /// The reason for which it gets no builds at all; empty when it takes some.
    #[serde(default)]
    pub(crate) unsupported_reason: String,
    #[serde(default)]
    pub(crate) withheld: Vec<WithheldAbility>,
    /// A warning to operators about its engine; empty when there is none.
    #[serde(default)]
    pub(crate) engine_warning: String,
}

impl Worker {
    /// Returns whether more builds may go to it.
    pub(crate) fn takes_builds(&self) -> bool {
        !self.drained && !self.draining
    }

    /// Returns how many more builds it has slots for.
    pub(crate) fn free_slots(&self) -> usize {
        usize::try_from(i64::from(self.slots) - self.slots_taken).unwrap_or(0)
    }

    /// Returns how far it is from taking a build that suits it, as a place in [`BY_DISTANCE`].
    fn distance(&self) -> usize {
        match self {
            Self { unsupported_reason, .. } if !unsupported_reason.is_empty() => 3,
            worker if !worker.takes_builds() => 2,
            worker if worker.free_slots() == 0 => 1,
            _ => 0,
        }
    }
}

/// The reasons of waiting builds, by the distance of the nearest worker.
const BY_DISTANCE: [PendingReason; 4] = [
    PendingReason::Dispatching,
    PendingReason::AllSlotsTaken,
    PendingReason::WorkersDraining,
    PendingReason::WorkersUnsupported,
];

/// Returns why a queued build is still there: that it backs off, or else by the worker that is nearest to taking it.
///
/// Workers that are not online do not count, and need not be among `workers`.
pub(crate) fn pending_reason(build: &Build, workers: &[Worker], now: Timestamp) -> PendingReason {
    if build.is_backing_off(now) {
        return PendingReason::BackingOff;
    }
    let requirements = &build.requirements;
    let mut online = workers.iter().filter(|worker| worker.online).peekable();
    if online.peek().is_none() && requirements.worker.is_empty() {
        return PendingReason::NoWorkerOnline;
    }
    let suitable =
        online.filter(|worker| requirements.fit(&worker.name, &worker.labels, &worker.capabilities));
    let nearest = suitable.map(Worker::distance).min();
    nearest.map_or(PendingReason::NoSuitableWorker, |distance| BY_DISTANCE[distance])
}

#[cfg(test)]
mod tests;
