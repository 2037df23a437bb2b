//! A build: one job of one image, from the queue to its final state.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    image::{ImageId, Reference, Requirements},
    timestamp::Timestamp,
};

pub(crate) use self::{
    record::{Excerpt, Happening, LogStream, Record, StepState},
    transition::{Event, Fault, Next, transition},
};

mod record;
mod transition;

/// Identifies a build: a UUID of version 7, made by the service.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct BuildId(pub(crate) Uuid);

/// What a build does.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Build,
    Pull,
    Snapshot,
}

/// Where a build stands.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    Queued,
    Claimed,
    Running,
    Publishing,
    Succeeded,
    Failed,
    Cancelled,
}

/// One row of the queue and, once final, of the history. The row is the queue: no other place knows more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Build {
    pub(crate) id: BuildId,
    pub(crate) image: ImageId,
    /// Counts the builds of the image, from 1.
    pub(crate) number: i64,
    pub(crate) kind: Kind,
    pub(crate) state: State,
    /// Grows with every claim; reports of any other attempt are refused.
    pub(crate) attempt: i32,
    /// How many attempts the infrastructure has lost.
    pub(crate) failures: i32,
    pub(crate) requested_by: String,
    pub(crate) queued_at: Timestamp,
    /// When it is taken from the queue: whoever requests builds has one in each round.
    #[serde(default)]
    pub(crate) round: i64,
    /// The earliest time at which it may be claimed again, see [`Build::is_backing_off`]; none while anything but queued.
    #[serde(default)]
    pub(crate) not_before: Option<Timestamp>,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) finished_at: Option<Timestamp>,
    /// The worker of the latest attempt; none while queued.
    pub(crate) worker: Option<String>,
    /// When the latest attempt was given to its worker; unknown where an earlier version gave it.
    #[serde(default)]
    pub(crate) claimed_at: Option<Timestamp>,
    /// When the attempt counts as lost, unless a heartbeat comes.
    pub(crate) lease_expires_at: Option<Timestamp>,
    pub(crate) cancel_requested_at: Option<Timestamp>,
    pub(crate) stop_confirmed: bool,
    /// The last report of the present attempt that is durable.
    pub(crate) report_sequence: i64,
    /// The last record of the build's history.
    pub(crate) last_sequence: i64,
    pub(crate) steps: Steps,
    pub(crate) error: Option<Failure>,
    pub(crate) log_bytes: i64,
    pub(crate) log_truncated: bool,
    pub(crate) configuration_revision: i64,
    pub(crate) reference: Reference,
    /// What a worker must be to take it.
    pub(crate) requirements: Requirements,
    /// The worker that is likely to have its layers in the cache: see [`Build::may_wait_for_cache`].
    #[serde(default)]
    pub(crate) preferred_worker: Option<String>,
    /// What a snapshot commits; none for any other kind.
    pub(crate) workspace: Option<Workspace>,
    /// The W3C `traceparent` of the call that has asked for it.
    #[serde(default)]
    pub(crate) trace: Option<String>,
}

/// The running workspace that a snapshot commits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Workspace {
    /// The engine's id or name of its container.
    pub(crate) container: String,
    /// The image that it was started from.
    pub(crate) source: ImageId,
}

/// What a build is queued with.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) kind: Kind,
    pub(crate) configuration_revision: i64,
    pub(crate) reference: Reference,
    pub(crate) requirements: Requirements,
    /// The worker that made the image's last artifact; none where the requirements leave no choice.
    pub(crate) preferred_worker: Option<String>,
    pub(crate) workspace: Option<Workspace>,
}

/// How far an attempt is.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Steps {
    pub(crate) total: i32,
    pub(crate) done: i32,
    pub(crate) cached: i32,
}

/// Why a build failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    /// The name of the step that failed; empty when none did.
    pub(crate) step: String,
    pub(crate) message: String,
    /// The last lines that the step printed.
    pub(crate) last_lines: Vec<String>,
}

/// A build as a caller sees it: with what is computed when it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BuildInView {
    pub(crate) build: Build,
    pub(crate) pending: Option<Pending>,
    /// Whether the worker that has it has not been heard of lately.
    #[serde(default)]
    pub(crate) worker_offline: bool,
}

/// Why a build does not run yet, and how many are before it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub(crate) reason: PendingReason,
    /// 1 for the next; 0 when a worker has claimed it. Counted to [`Self::MOST_BEFORE`] and one more.
    pub(crate) queue_position: i64,
}

impl Pending {
    /// How many builds are counted that are before one.
    pub(crate) const MOST_BEFORE: u64 = 1_000;
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PendingReason {
    NoWorkerOnline,
    NoSuitableWorker,
    WorkersUnsupported,
    WorkersDraining,
    AllSlotsTaken,
    Dispatching,
    BackingOff,
}

impl fmt::Display for PendingReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoWorkerOnline => "no worker is online",
            Self::NoSuitableWorker => "no worker that is online can take it",
            Self::WorkersUnsupported => "every worker that could take it is refused for its engine's version",
            Self::WorkersDraining => "every worker that could take it is draining",
            Self::AllSlotsTaken => "all slots are taken",
            Self::Dispatching => "a worker is about to take it",
            Self::BackingOff => "it waits before the next attempt",
        })
    }
}

impl BuildId {
    pub(crate) fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl State {
    /// A final state is never left.
    pub(crate) fn is_final(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
            Self::Queued | Self::Claimed | Self::Running | Self::Publishing => false,
        }
    }

    /// Whether a worker holds the build.
    pub(crate) fn is_held(self) -> bool {
        match self {
            Self::Claimed | Self::Running | Self::Publishing => true,
            Self::Queued | Self::Succeeded | Self::Failed | Self::Cancelled => false,
        }
    }
}

impl Build {
    /// The longest pause between two attempts.
    pub(crate) const MAX_BACKOFF: Duration = Duration::from_secs(30);
    /// The longest wait for a slot of the preferred worker: about what an empty cache costs a small build.
    pub(crate) const MAX_CACHE_WAIT: Duration = Duration::from_secs(5);

    /// The next build of an image, in the queue.
    pub(crate) fn queued(
        image: ImageId,
        number: i64,
        requested_by: String,
        job: Job,
        now: Timestamp,
    ) -> Self {
        Self {
            id: BuildId::new(),
            image,
            number,
            kind: job.kind,
            state: State::Queued,
            attempt: 0,
            failures: 0,
            requested_by,
            queued_at: now,
            round: 0,
            not_before: None,
            started_at: None,
            finished_at: None,
            worker: None,
            claimed_at: None,
            lease_expires_at: None,
            cancel_requested_at: None,
            stop_confirmed: true,
            report_sequence: 0,
            last_sequence: 0,
            steps: Steps::default(),
            error: None,
            log_bytes: 0,
            log_truncated: false,
            configuration_revision: job.configuration_revision,
            reference: job.reference,
            requirements: job.requirements,
            preferred_worker: job.preferred_worker,
            workspace: job.workspace,
            trace: None,
        }
    }

    /// Returns whether a worker holds it by this attempt.
    pub(crate) fn is_attempt_of(&self, worker: &str, attempt: i32) -> bool {
        self.state.is_held() && self.attempt == attempt && self.worker.as_deref() == Some(worker)
    }

    /// Whether a heartbeat of its worker extends its lease: not when the worker has had it for a lease and not begun.
    pub(crate) fn may_go_on(&self, now: Timestamp, lease: Duration) -> bool {
        self.state != State::Claimed || self.claimed_at.is_none_or(|claimed| claimed.after(lease) > now)
    }

    /// Returns whether it may not be claimed yet.
    ///
    /// A `not_before` beyond [`Self::MAX_BACKOFF`] was set before a clock was put back, and holds nothing up.
    pub(crate) fn is_backing_off(&self, now: Timestamp) -> bool {
        self.not_before.is_some_and(|at| at > now && at <= now.after(Self::MAX_BACKOFF))
    }

    /// Returns whether it may still wait for a slot of the worker that it prefers.
    ///
    /// The wait begins when it may be claimed. A beginning in the future was set before a clock was put back, and holds nothing up.
    pub(crate) fn may_wait_for_cache(&self, now: Timestamp) -> bool {
        let since = self.not_before.unwrap_or(self.queued_at);
        since <= now && now < since.after(Self::MAX_CACHE_WAIT)
    }

    /// Its place in the queue: the lowest is taken first.
    pub(crate) fn turn(&self) -> (i64, Timestamp, BuildId) {
        (self.round, self.queued_at, self.id)
    }

    /// Appends to the history what has happened, with the next number.
    pub(crate) fn record(&mut self, time: Timestamp, happening: Happening) -> Record {
        self.last_sequence += 1;
        Record { sequence: self.last_sequence, time, attempt: self.attempt, happening }
    }

    /// Begins the history of a build that is in the queue.
    pub(crate) fn record_queued(&mut self) -> Record {
        let message = format!("queued by {}", self.requested_by);
        self.record(self.queued_at, Happening::State { state: self.state, message })
    }

    /// What the image says of this build: why it failed, for instance.
    pub(crate) fn message(&self) -> String {
        match &self.error {
            Some(error) if error.step.is_empty() => error.message.clone(),
            Some(error) => format!("{}: {}", error.step, error.message),
            None => String::new(),
        }
    }
}
