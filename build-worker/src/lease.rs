//! How long the worker may go on without the service: counted monotonically from the sending of the last heartbeat that
//! was acknowledged, so that the service never counts shorter.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

/// When the work has to stop.
#[derive(Debug)]
pub(crate) struct Lease(watch::Sender<State>);

#[derive(Copy, Clone, Debug)]
struct State {
    since: Instant,
    stop_after: Duration,
    stop_within: Duration,
}

impl Lease {
    const STOP_AFTER: Duration = Duration::from_secs(30);
    const STOP_WITHIN: Duration = Duration::from_secs(10);

    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(State {
            since: Instant::now(),
            stop_after: Self::STOP_AFTER,
            stop_within: Self::STOP_WITHIN,
        }))
    }

    /// The service gives these times.
    pub(crate) fn set_times(&self, stop_after: Option<Duration>, stop_within: Option<Duration>) {
        self.0.send_modify(|state| {
            state.stop_after = stop_after.unwrap_or(state.stop_after);
            state.stop_within = stop_within.unwrap_or(state.stop_within);
        });
    }

    /// The service has acknowledged what was sent at `since`.
    pub(crate) fn extend(&self, since: Instant) {
        self.0.send_modify(|state| state.since = state.since.max(since));
    }

    /// When the work has to stop, unless the lease is extended.
    pub(crate) fn end(&self) -> Instant {
        let state = self.0.borrow();
        state.since + state.stop_after
    }

    /// How long stopping a build may take until the service is told how it went: some time is left for the telling.
    pub(crate) fn stop_limit(&self) -> Duration {
        self.0.borrow().stop_within.mul_f32(0.8)
    }

    /// Waits until the work has to stop. It has to stop again a while later, unless the lease was extended.
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

    /// Waits until the service has acknowledged something that was sent after `since`.
    pub(crate) async fn extended_after(&self, since: Instant) {
        // The sender is ours: it cannot be gone.
        let _ = self.0.subscribe().wait_for(|state| state.since > since).await;
    }
}
