//! Control of a running job.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

/// The handle by which the session controls a job.
#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(super) granted: CancellationToken,
    pub(super) stop: CancellationToken,
    pub(super) reason: OnceLock<StopReason>,
}

/// The reason why a job has to stop; the first one counts.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// A cancellation by a client; the service waits for the confirmation.
    Cancelled,
    /// A shutdown of the worker; another worker has to take over the build.
    HandBack,
    /// An attempt that exceeded its maximum duration.
    TimedOut,
    /// A fenced attempt, whose reports are not wanted any more.
    Fenced,
}

impl Control {
    /// Allows the job to set the image's tag.
    pub(crate) fn grant_publish(&self) {
        self.granted.cancel();
    }

    /// Requests the stop of the job.
    pub(crate) fn stop(&self, reason: StopReason) {
        self.reason.get_or_init(|| reason);
        self.stop.cancel();
    }

    /// Waits until the stop of the job is requested.
    pub(crate) async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Reports whether the attempt must have no more effect, even if it was granted.
    pub(crate) fn is_given_up(&self) -> bool {
        self.reason.get().is_some_and(|reason| *reason != StopReason::HandBack)
    }

    /// Reports whether the attempt is fenced.
    pub(crate) fn is_fenced(&self) -> bool {
        self.reason.get() == Some(&StopReason::Fenced)
    }
}
