//! How long the worker may go on without the service: counted monotonically from the sending of the last heartbeat that
//! was acknowledged, so that the service never counts shorter.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// When the work has to stop.
#[derive(Debug)]
pub(crate) struct Lease {
    state: Mutex<State>,
    changed: Notify,
}

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
        Self {
            state: Mutex::new(State {
                since: Instant::now(),
                stop_after: Self::STOP_AFTER,
                stop_within: Self::STOP_WITHIN,
            }),
            changed: Notify::new(),
        }
    }

    /// The service gives these times.
    pub(crate) fn set_times(&self, stop_after: Option<Duration>, stop_within: Option<Duration>) {
        let mut state = self.state();
        state.stop_after = stop_after.unwrap_or(state.stop_after);
        state.stop_within = stop_within.unwrap_or(state.stop_within);
    }

    /// The service has acknowledged what was sent at `since`.
    pub(crate) fn extend(&self, since: Instant) {
        let mut state = self.state();
        state.since = state.since.max(since);
        self.changed.notify_one();
    }

    /// How long stopping a build may take until the service is told how it went: some time is left for the telling.
    pub(crate) fn stop_limit(&self) -> Duration {
        self.state().stop_within.mul_f32(0.8)
    }

    /// Waits until the work has to stop. It has to stop again a while later, unless the lease was extended.
    pub(crate) async fn over(&self) {
        loop {
            let State { since, stop_after, .. } = *self.state();
            tokio::select! {
                () = tokio::time::sleep_until(since + stop_after) => {
                    self.state().since = Instant::now();
                    return;
                }
                () = self.changed.notified() => {}
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
