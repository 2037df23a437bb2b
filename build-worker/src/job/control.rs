//! How a job is steered while it works.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

/// How the session steers a job.
#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(super) granted: CancellationToken,
    pub(super) stop: CancellationToken,
    pub(super) reason: OnceLock<StopReason>,
}

/// Why a job is to stop; the first reason counts.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum StopReason {
    /// A client wants it: the service waits to hear that it has stopped.
    Cancelled,
    /// The worker ends: another one shall do it.
    HandBack,
    /// It has run for longer than it may.
    TimedOut,
    /// The attempt is fenced: nobody wants to hear of it.
    Fenced,
}

impl Control {
    /// The tag may be set.
    pub(crate) fn grant_publish(&self) {
        self.granted.cancel();
    }

    /// The work is to stop.
    pub(crate) fn stop(&self, reason: StopReason) {
        self.reason.get_or_init(|| reason);
        self.stop.cancel();
    }

    /// Waits until the work is to stop.
    pub(crate) async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Whether nothing more may come of the attempt, be it granted.
    pub(crate) fn is_given_up(&self) -> bool {
        self.reason.get().is_some_and(|reason| *reason != StopReason::HandBack)
    }

    /// Whether nobody wants to hear of the attempt.
    pub(crate) fn is_fenced(&self) -> bool {
        self.reason.get() == Some(&StopReason::Fenced)
    }
}
