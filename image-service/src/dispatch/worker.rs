//! Workers as all replicas know them, and the reasons why builds wait for them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::WithheldAbility;
use crate::{
    build::{Build, PendingReason},
    image::Capability,
    timestamp::Timestamp,
};

/// A worker that has connected before. The store keeps the serialised form as a response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) slots: i32,
    /// Number of builds that the worker holds.
    pub(crate) slots_taken: i64,
    pub(crate) engine_version: String,
    pub(crate) capabilities: BTreeSet<Capability>,
    /// Session that speaks for the worker, if there is one.
    #[serde(skip)]
    pub(crate) session: Option<Uuid>,
    /// Set while a session speaks for the worker and it has been heard from lately.
    pub(crate) online: bool,
    pub(crate) connected_at: Timestamp,
    pub(crate) heard_at: Timestamp,
    /// Set by an operator, so that the worker gets no more builds.
    pub(crate) drained: bool,
    /// Set by the worker itself while it takes no more builds.
    pub(crate) draining: bool,
    #[serde(default)]
    pub(crate) protocol_version: i32,
    /// Reason why the worker gets no builds at all; empty if it takes some.
    #[serde(default)]
    pub(crate) unsupported_reason: String,
    #[serde(default)]
    pub(crate) withheld: Vec<WithheldAbility>,
    /// Warning to operators about the worker's engine; empty if there is none.
    #[serde(default)]
    pub(crate) engine_warning: String,
}

impl Worker {
    /// Reports whether the worker takes more builds.
    pub(crate) fn takes_builds(&self) -> bool {
        !self.drained && !self.draining
    }

    /// Returns the number of free slots.
    pub(crate) fn free_slots(&self) -> usize {
        usize::try_from(i64::from(self.slots) - self.slots_taken).unwrap_or(0)
    }

    /// Returns how far the worker is from taking a suitable build, as an index of [`BY_DISTANCE`].
    fn distance(&self) -> usize {
        match self {
            Self { unsupported_reason, .. } if !unsupported_reason.is_empty() => 3,
            worker if !worker.takes_builds() => 2,
            worker if worker.free_slots() == 0 => 1,
            _ => 0,
        }
    }
}

/// Reasons why builds wait, by the distance of the nearest worker.
const BY_DISTANCE: [PendingReason; 4] = [
    PendingReason::Dispatching,
    PendingReason::AllSlotsTaken,
    PendingReason::WorkersDraining,
    PendingReason::WorkersUnsupported,
];

/// Returns the reason why a queued build waits.
///
/// It is the backoff of the build, or else the state of the suitable worker that is nearest to taking it.
///
/// Offline workers are ignored, and need not be among `workers`.
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
