//! Workers as all replicas know them, and the reasons why builds wait for them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{RunningBuilds, WithheldAbility};
use crate::{
    access::Pools,
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
    /// Pools that the worker serves, by its token.
    pub(crate) pools: Pools,
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

    /// Reports whether the worker may take a build once it is online and has a free slot.
    pub(crate) fn suits(&self, build: &Build) -> bool {
        build.suits(&self.name, &self.labels, &self.capabilities, &self.pools)
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
/// It is the backoff of the build, or that it waits for the worker that holds its base image, or the state of
/// the suitable worker that is nearest to taking it, or else the limit of its requester.
///
/// Offline workers are ignored, and need not be among `workers`.
pub(crate) fn pending_reason(
    build: &Build,
    workers: &[Worker],
    running: &RunningBuilds,
    now: Timestamp,
) -> PendingReason {
    if build.is_backing_off(now) {
        return PendingReason::BackingOff;
    }
    let mut online = workers.iter().filter(|worker| worker.online).peekable();
    let is_bound = !build.requirements.worker.is_empty() || build.base.is_some();
    if online.peek().is_none() && !is_bound {
        return PendingReason::NoWorkerOnline;
    }
    let nearest = online.filter(|worker| worker.suits(build)).map(Worker::distance).min();
    let reason = nearest.map_or(PendingReason::NoSuitableWorker, |distance| BY_DISTANCE[distance]);
    // Other workers may well be free.
    let waits_for_base = build.base.is_some() && reason != PendingReason::Dispatching;
    let could_run_soon = matches!(reason, PendingReason::Dispatching | PendingReason::AllSlotsTaken);
    if waits_for_base {
        PendingReason::BaseElsewhere
    } else if could_run_soon && running.is_at_limit(&build.requester.subject) {
        PendingReason::RunningLimit
    } else {
        reason
    }
}

#[cfg(test)]
mod tests;
