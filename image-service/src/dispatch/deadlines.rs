//! Deadlines and limits of dispatch: leases, the stop of a cancelled build, the time in the queue, and
//! retries.

use std::{ops::RangeInclusive, time::Duration};

use crate::{build::Build, error::Error, timestamp::Timestamp};

/// Times and limits of dispatch.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Policy {
    /// Time for which a claim holds without a heartbeat. The worker stops earlier by itself: see its module
    /// `lease`.
    pub(crate) lease: Duration,
    /// Maximum time for an online worker to stop a cancelled build.
    ///
    /// After that the build counts as cancelled, without confirmation.
    pub(crate) stop_timeout: Duration,
    /// Time without contact after which a worker counts as offline.
    pub(crate) offline_after: Duration,
    /// Maximum time of a build in the queue.
    pub(crate) queue_timeout: Duration,
    /// Maximum time that an attempt at a build may run, whatever its configuration says.
    pub(crate) max_build_time: Duration,
    /// Number of infrastructure failures at which a build fails.
    pub(crate) max_failures: i32,
    /// Pause after the first infrastructure failure that a worker reports; it doubles with each further one.
    /// Zero for no pause.
    pub(crate) retry_backoff: Duration,
    /// Maximum number of queued builds per requester; `None` for no limit.
    pub(crate) max_pending: Option<u64>,
    /// Maximum number of builds that workers hold per requester; `None` for no limit.
    pub(crate) max_running: Option<u64>,
    /// Size of a build's history, see [`Build::history_bytes`], from which on the events of workers are left
    /// out.
    pub(crate) max_history_bytes: i64,
}

impl Policy {
    /// Times and limits for tests.
    #[cfg(test)]
    pub(crate) const OF_TESTS: Self = Self {
        lease: Duration::from_secs(45),
        stop_timeout: Duration::from_secs(10),
        offline_after: Duration::from_secs(5),
        queue_timeout: Duration::from_secs(300),
        max_build_time: Duration::from_secs(3600),
        max_failures: 3,
        retry_backoff: Duration::from_secs(1),
        max_pending: None,
        max_running: None,
        max_history_bytes: 1 << 30,
    };

    /// Reports whether a worker that was last heard from at `heard_at` counts as online.
    ///
    /// A time too far in the future was set before the clock was set back, and says nothing about the
    /// present.
    pub(crate) fn is_recent(&self, heard_at: Timestamp, now: Timestamp) -> bool {
        self.recent(now).contains(&heard_at)
    }

    /// Returns the times of last contact at which a worker counts as online.
    pub(crate) fn recent(&self, now: Timestamp) -> RangeInclusive<Timestamp> {
        now.before(self.offline_after)..=now.after(self.offline_after)
    }

    /// Checks that a requester with `pending` builds in the queue may queue one more.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyPendingBuilds`] if the requester has reached the limit.
    pub(crate) fn require_room(&self, pending: u64) -> Result<(), Error> {
        match self.max_pending {
            Some(limit) if pending >= limit => Err(Error::TooManyPendingBuilds { limit }),
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the pause before the next attempt after this many failures; at most [`Build::MAX_BACKOFF`].
    pub(crate) fn backoff(&self, failures: i32) -> Duration {
        let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or(0);
        self.retry_backoff.saturating_mul(2_u32.saturating_pow(doublings)).min(Build::MAX_BACKOFF)
    }
}
