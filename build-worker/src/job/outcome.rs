//! The outcome of an attempt: an artifact, or how it ended without one.

use proto::dispatch::{Failed, FailureKind};
use tokio::time::Instant;

use crate::{
    engine::{EngineError, RunningWork},
    output::FailedStep,
    readiness::Doubt,
};

/// What a job leaves to be done after it.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// The work that goes on although it was to stop.
    pub(crate) left: Option<Left>,
    /// The image that had the reference before, by the engine's identifier.
    pub(crate) replaced: Option<String>,
}

/// The artifact of an attempt.
pub(super) struct Artifact {
    pub(super) image_id: String,
    pub(super) config_digest: String,
    pub(super) size_bytes: i64,
    /// Empty for an image that no registry holds.
    pub(super) repo_digest: String,
    /// The image that had the reference before.
    pub(super) replaced: Option<String>,
}

/// The end of an attempt without an artifact.
pub(super) enum Ended {
    /// It was not begun, for this reason.
    NotBegun(String),
    Failed {
        failed: Failed,
        /// Whether the engine has to be asked before anything else is begun.
        doubts_engine: bool,
    },
    Stopped(Stop),
}

/// The end of work that was to stop.
pub(super) enum Stop {
    /// Nothing of it is left.
    Confirmed,
    /// The engine says that it has ended; its processes cannot be seen from here.
    Unseen,
    /// It goes on.
    Failed(Left),
}

/// Work that goes on although it was to stop.
#[derive(Debug)]
pub(crate) struct Left {
    /// None when the engine has ended it.
    pub(super) work: Option<Box<dyn RunningWork>>,
    pub(super) begun: Instant,
    /// Held from before anybody is told, for the service gives out builds until it hears that none are taken.
    pub(super) _doubt: Doubt,
}

impl Ended {
    /// Ends an attempt by what the engine could not do, and the step that failed.
    pub(super) fn by_engine(error: &EngineError, step: Option<FailedStep>) -> Self {
        let kind = match error {
            EngineError::Refused(_) => FailureKind::User,
            EngineError::Unreachable(_) | EngineError::Broken(_) => FailureKind::Infrastructure,
        };
        let FailedStep { name, last_lines, .. } = step.unwrap_or_default();
        let failed =
            Failed { kind: kind.into(), step: name, message: shortened(error.to_string()), last_lines };
        Self::Failed { failed, doubts_engine: matches!(error, EngineError::Broken(_)) }
    }

    /// Ends an attempt whose engine has not done what it said.
    pub(super) fn by_broken_engine(message: String) -> Self {
        EngineError::Broken(message).into()
    }

    /// Ends an attempt for a reason that is neither the user's nor the engine's.
    pub(super) fn by_infrastructure(message: String) -> Self {
        Self::Failed { failed: failed(FailureKind::Infrastructure, message), doubts_engine: false }
    }

    /// Ends an attempt for a reason that its user has to mend.
    pub(super) fn by_user(message: String) -> Self {
        Self::Failed { failed: failed(FailureKind::User, message), doubts_engine: false }
    }
}

/// Outside of any step.
impl From<EngineError> for Ended {
    fn from(error: EngineError) -> Self {
        Self::by_engine(&error, None)
    }
}

/// Leaves out the middle of a message that the service would cut: an error quotes its command, and ends with the reason.
fn shortened(message: String) -> String {
    const BEGINNING: usize = 8 * 1024;
    const END: usize = 4 * 1024;
    if message.len() <= BEGINNING + END {
        return message;
    }
    let beginning = &message[..message.floor_char_boundary(BEGINNING)];
    let end = &message[message.ceil_char_boundary(message.len() - END)..];
    format!("{beginning} … {end}")
}

fn failed(kind: FailureKind, message: String) -> Failed {
    Failed { kind: kind.into(), message, ..Failed::default() }
}

#[cfg(test)]
mod tests {
    use super::shortened;

    #[test]
    fn a_long_message_keeps_its_end() {
        assert_eq!(shortened("short".to_owned()), "short");
        let long = format!("process \"{}\" did not complete: exit code: 9", "ü".repeat(100_000));
        let short = shortened(long);
        assert!(short.starts_with("process") && short.ends_with("exit code: 9") && short.len() < 16 * 1024);
    }
}
