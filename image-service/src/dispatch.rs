//! Decisions about builds: `decide` maps an event to its effects, without a clock, a store or a connection.
//!
//! The store loads the rows, `decide` returns what to write and what to send, the store commits, and only
//! then are the messages sent. Messages therefore depend on durable state only, and whatever is lost on the
//! way can be decided again.

use std::sync::Arc;

use uuid::Uuid;

use self::decision::Decider;
use crate::{
    build::{Build, PendingReason, Record},
    error::Refusal,
    image::{Artifact, Configuration},
    timestamp::Timestamp,
};

pub(crate) use self::build_change::BuildChange;
pub(crate) use self::deadlines::Policy;
pub(crate) use self::message::{
    Attempt, Hello, KeptAttempt, PROTOCOL_VERSION, Report, Reported, ToWorker, Welcome, WithheldAbility,
    WorkerEvent,
};
pub(crate) use self::placement::{Placement, candidates, place};
pub(crate) use self::running_builds::RunningBuilds;
pub(crate) use self::store::{CLAIM_BATCH, Committed, DecisionResult, DispatchStore, Effects};
pub(crate) use self::worker::{Worker, pending_reason};

mod build_change;
mod deadlines;
mod decision;
mod message;
mod placement;
mod running_builds;
mod store;
mod worker;

/// An event of a build that the service has to react to.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Claim of the build at the head of the queue by a worker with a free slot.
    Claim { worker: String },
    /// Report of a worker.
    Report { worker: String, report: Report },
    /// Request of a client to cancel the build.
    Cancel { by: String },
    /// Return of the worker without this attempt.
    Abandoned { attempt: i32 },
    /// Check of the time in the queue; `reason` is why the build is still queued.
    Waited { reason: PendingReason },
    /// Check of leases and deadlines.
    Tick {
        /// Set if the worker of the build has been heard from lately.
        worker_online: bool,
    },
}

/// A connected worker that takes builds.
#[derive(Clone, Debug)]
pub(crate) struct Connected {
    pub(crate) name: String,
    /// Session of the connection.
    pub(crate) session: Uuid,
}

/// The rows that a decision is based on: the build and, for a claim, the configuration that is sent to the
/// worker.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pub(crate) build: Build,
    pub(crate) configuration: Option<Arc<Configuration>>,
}

/// The effects of an event: what to write, and what to send once it is durable.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Decision {
    /// New row of the build; `None` if it does not change.
    pub(crate) build: Option<Build>,
    /// Records to append to the history of the build.
    pub(crate) records: Vec<Record>,
    /// New artifact of the image.
    pub(crate) artifact: Option<Artifact>,
    /// Messages, each with the name of its worker.
    pub(crate) messages: Vec<(String, ToWorker)>,
    /// Transitions of the build, for simulations that count them.
    #[cfg(feature = "simulation")]
    pub(crate) transitions: Vec<(crate::build::State, crate::build::Event)>,
}

/// Decides what `event` does to the build in `rows` at `now`.
///
/// Only clients are refused; an unexpected report of a worker is answered with [`ToWorker::Drop`].
///
/// # Errors
///
/// Returns the [`Refusal`] if the build cannot be cancelled.
pub(crate) fn decide(
    rows: Rows,
    event: &Event,
    policy: &Policy,
    now: Timestamp,
) -> Result<Decision, Refusal> {
    let mut decider = Decider::new(rows.build, policy, now);
    match event {
        Event::Claim { worker } => decider.claim(worker, rows.configuration),
        Event::Report { worker, report } => decider.report(worker, report),
        Event::Cancel { by } => decider.cancel(by)?,
        Event::Abandoned { attempt } => decider.abandoned(*attempt),
        Event::Waited { reason } => decider.waited(*reason),
        Event::Tick { worker_online } => decider.tick(*worker_online),
    }
    Ok(decider.finish())
}

#[cfg(test)]
mod tests;
