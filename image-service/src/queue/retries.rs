//! Alarms for builds that back off.
//!
//! An alarm is a hint, as is every wake-up of the dispatcher. Builds that other processes have queued have no
//! alarm here, and are found by the poll.

use std::{
    collections::BTreeSet,
    future,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::time::{Instant, sleep_until};

/// The times at which builds that back off may be claimed again.
#[derive(Debug, Default)]
pub(super) struct Retries(Mutex<BTreeSet<Instant>>);

impl Retries {
    /// Maximum number of alarms. Further ones are dropped, because the poll finds their builds.
    const MAX: usize = 1_000;

    /// Sets an alarm, which takes effect at the next call of [`Self::due`].
    pub(super) fn add(&self, at: Instant) {
        let mut alarms = self.alarms();
        if alarms.len() < Self::MAX {
            alarms.insert(at);
        }
    }

    /// Waits for the next alarm, and removes all that are over. Waits forever if none is set.
    pub(super) async fn due(&self) {
        let next = self.alarms().first().copied();
        let Some(next) = next else {
            return future::pending().await;
        };
        sleep_until(next).await;
        let now = Instant::now();
        self.alarms().retain(|at| *at > now);
    }

    fn alarms(&self) -> MutexGuard<'_, BTreeSet<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn alarms_go_off_in_their_order_and_once() {
        let retries = Retries::default();
        let begun = Instant::now();
        let alarms = [1, 2, 4].map(|hundredths| begun + Duration::from_millis(10 * hundredths));
        for alarm in [alarms[1], alarms[0], alarms[2], alarms[0]] {
            retries.add(alarm);
        }
        while !retries.alarms().is_empty() {
            let next = retries.alarms().first().copied();
            retries.due().await;
            assert!(next <= Some(Instant::now()) && !retries.alarms().iter().any(|left| Some(*left) == next));
        }
        assert!(begun.elapsed() >= Duration::from_millis(40));
        assert!(poll!(std::pin::pin!(retries.due())).is_pending(), "no alarm is left");
    }
}
