//! What to do with a build when something happens: `decide`, without a clock, a store or a connection.
//!
//! The store loads the rows, `decide` says what to write and what to send, the store commits, and only then the messages
//! go out. So whatever was sent rests on what is durable, and whatever is lost on the way can be decided again.

use std::{ops::RangeInclusive, sync::Arc, time::Duration};

use uuid::Uuid;

use self::deciding::Deciding;
use crate::{
    build::{Build, PendingReason, Record},
    error::{Error, Refusal},
    image::{Artifact, Configuration},
    timestamp::Timestamp,
};

pub(crate) use self::build_change::BuildChange;
pub(crate) use self::message::{
    Attempt, Hello, KeptAttempt, PROTOCOL_VERSION, Report, Reported, ToWorker, Welcome, WithheldAbility,
    WorkerEvent,
};
pub(crate) use self::placement::{Placement, candidates, place};
pub(crate) use self::store::{CLAIMED_AT_ONCE, Committed, Decided, DispatchStore, Effects};
pub(crate) use self::worker::{Worker, pending_reason};

mod build_change;
mod deciding;
mod message;
mod placement;
mod store;
mod worker;

/// What may happen to one build, from either side.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// The build heads the queue and `worker` has a free slot.
    Claim { worker: String },
    /// A worker says what happened.
    Report { worker: String, report: Report },
    /// A client wants it cancelled.
    Cancel { by: String },
    /// Its worker came back without this attempt.
    Abandoned { attempt: i32 },
    /// It may have been in the queue for too long, for this reason.
    Waited { reason: PendingReason },
    /// Time has passed: leases and deadlines may be over.
    Tick {
        /// Whether the worker of the build has been heard of lately.
        worker_online: bool,
    },
}

/// A connected worker that takes builds.
#[derive(Clone, Debug)]
pub(crate) struct Connected {
    pub(crate) name: String,
    /// Which of its connections.
    pub(crate) session: Uuid,
}

/// What is decided upon: the row, and for a claim the configuration that goes to the worker.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    pub(crate) build: Build,
    pub(crate) configuration: Option<Arc<Configuration>>,
}

/// The times and limits of dispatch.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Policy {
    /// How long a claim holds without a heartbeat.
    pub(crate) lease: Duration,
    /// How long a worker that answers may take to stop.
    pub(crate) stop_deadline: Duration,
    /// After how much silence a worker counts as offline.
    pub(crate) offline_after: Duration,
    /// How long a build may be in the queue.
    pub(crate) queue_timeout: Duration,
    /// At how many failures of the infrastructure a build fails.
    pub(crate) max_failures: i32,
    /// The pause after the first failure that a worker reports of the infrastructure; it doubles with each further one. No pause
    /// when zero.
    pub(crate) retry_backoff: Duration,
    /// How many builds of one requester may be in the queue; none where they are not counted.
    pub(crate) max_pending: Option<u64>,
}

impl Policy {
    /// Times and limits as tests want them.
    #[cfg(test)]
    pub(crate) const OF_TESTS: Self = Self {
        lease: Duration::from_secs(45),
        stop_deadline: Duration::from_secs(10),
        offline_after: Duration::from_secs(5),
        queue_timeout: Duration::from_secs(300),
        max_failures: 3,
        retry_backoff: Duration::from_secs(1),
        max_pending: None,
    };

    /// Whether a worker that was heard of at `heard_at` counts as online. What lies in the future is of before a clock was put
    /// back, and tells nothing of now.
    pub(crate) fn is_recent(&self, heard_at: Timestamp, now: Timestamp) -> bool {
        self.recent(now).contains(&heard_at)
    }

    /// When a worker that counts as online was last heard of.
    pub(crate) fn recent(&self, now: Timestamp) -> RangeInclusive<Timestamp> {
        now.before(self.offline_after)..=now.after(self.offline_after)
    }

    /// Checks that a requester may have one more build in the queue than those that are `pending` there.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyPendingBuilds`].
    pub(crate) fn require_room(&self, pending: u64) -> Result<(), Error> {
        match self.max_pending {
            Some(limit) if pending >= limit => Err(Error::TooManyPendingBuilds { limit }),
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the pause before the next attempt of a build that has failed this often; at most [`Build::MAX_BACKOFF`].
    pub(crate) fn backoff(&self, failures: i32) -> Duration {
        let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or(0);
        self.retry_backoff.saturating_mul(2_u32.saturating_pow(doublings)).min(Build::MAX_BACKOFF)
    }
}

/// What to write, and what to send once it is durable.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Decision {
    /// The build's new row, when it changes.
    pub(crate) build: Option<Build>,
    /// What to append to its history.
    pub(crate) records: Vec<Record>,
    /// The image's new artifact.
    pub(crate) artifact: Option<Artifact>,
    /// To which worker to send what.
    pub(crate) messages: Vec<(String, ToWorker)>,
    /// What the build went through, for those who count it.
    #[cfg(feature = "simulation")]
    pub(crate) transitions: Vec<(crate::build::State, crate::build::Event)>,
}

/// Decides what `event` does to the build in `rows` at `now`.
///
/// Only clients are refused; what a worker says out of turn is answered with [`ToWorker::Drop`].
pub(crate) fn decide(
    rows: Rows,
    event: &Event,
    policy: &Policy,
    now: Timestamp,
) -> Result<Decision, Refusal> {
    let mut deciding = Deciding::new(rows.build, policy, now);
    match event {
        Event::Claim { worker } => deciding.claim(worker, rows.configuration),
        Event::Report { worker, report } => deciding.report(worker, report),
        Event::Cancel { by } => deciding.cancel(by)?,
        Event::Abandoned { attempt } => deciding.abandoned(*attempt),
        Event::Waited { reason } => deciding.waited(*reason),
        Event::Tick { worker_online } => deciding.tick(*worker_online),
    }
    Ok(deciding.finish())
}

#[cfg(test)]
mod tests;
