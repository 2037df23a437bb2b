//! Lease of the worker: the time that it may go on without the service.
//!
//! The worker counts it by its monotonic clock from the sending of the last acknowledged heartbeat, so that
//! the service never counts less.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

/// A lease, at the end of which the work has to stop.
#[derive(Debug)]
pub(crate) struct Lease(watch::Sender<State>);

#[derive(Copy, Clone, Debug)]
struct State {
    since: Instant,
    stop_after: Duration,
    stop_timeout: Duration,
}

impl Lease {
    const STOP_AFTER: Duration = Duration::from_secs(30);
    const STOP_TIMEOUT: Duration = Duration::from_secs(10);

    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(State {
            since: Instant::now(),
            stop_after: Self::STOP_AFTER,
            stop_timeout: Self::STOP_TIMEOUT,
        }))
    }

    /// Sets the times that the service prescribes; `None` leaves a time as it is.
    pub(crate) fn set_times(&self, stop_after: Option<Duration>, stop_timeout: Option<Duration>) {
        self.0.send_modify(|state| {
            state.stop_after = stop_after.unwrap_or(state.stop_after);
            state.stop_timeout = stop_timeout.unwrap_or(state.stop_timeout);
        });
    }

    /// Extends the lease after the service has acknowledged a message that was sent at `since`.
    pub(crate) fn extend(&self, since: Instant) {
        self.0.send_modify(|state| state.since = state.since.max(since));
    }

    /// Returns the time at which the work has to stop, unless the lease is extended.
    pub(crate) fn end(&self) -> Instant {
        let state = self.0.borrow();
        state.since + state.stop_after
    }

    /// Returns the maximum time to stop a build, which leaves some time for the report.
    pub(crate) fn stop_timeout(&self) -> Duration {
        self.0.borrow().stop_timeout.mul_f32(0.8)
    }

    /// Waits until the lease expires.
    ///
    /// Unless it is extended, it expires again after the same time.
    pub(crate) async fn over(&self) {
        let mut changes = self.0.subscribe();
        loop {
            let State { since, stop_after, .. } = *changes.borrow_and_update();
            tokio::select! {
                biased;
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(since + stop_after) => {
                    self.0.send_modify(|state| state.since = Instant::now());
                    return;
                }
            }
        }
    }

    /// Waits until the service has acknowledged a message that was sent after `since`.
    pub(crate) async fn extended_after(&self, since: Instant) {
        // The sender is in `self`, so the channel cannot be closed.
        let _ = self.0.subscribe().wait_for(|state| state.since > since).await;
    }
}
