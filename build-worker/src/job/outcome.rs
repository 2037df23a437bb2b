//! Outcome of an attempt: an artifact, or the way in which it ended without one.

use proto::dispatch::{DistantBase, Failed, FailureKind};
use tokio::time::Instant;

use crate::{
    context_download::FetchError,
    engine::{EngineError, RunningWork},
    output::FailedStep,
    readiness::UnconfirmedStop,
    remote_context::RemoteError,
    secrets::SecretError,
};

/// The cleanup that a job leaves to be done after it.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// Work that continues after its stop was requested.
    pub(crate) left: Option<Leftover>,
    /// Image that had the reference before, by the engine's image ID.
    pub(crate) replaced: Option<String>,
}

/// The artifact of an attempt.
pub(super) struct Artifact {
    pub(super) image_id: String,
    pub(super) config_digest: String,
    pub(super) size_bytes: i64,
    /// Digest in the registry; empty if no registry holds the image.
    pub(super) repo_digest: String,
    /// Image that had the reference before.
    pub(super) replaced: Option<String>,
}

/// The end of an attempt without an artifact.
pub(super) enum Ended {
    /// An attempt that was not started, for this reason.
    NotBegun(String),
    /// A build that only another worker can run.
    Elsewhere {
        reason: String,
        base: DistantBase,
    },
    Failed {
        failed: Failed,
        /// Set if the engine has to be checked before anything else starts.
        suspects_engine: bool,
    },
    Stopped(Stop),
}

/// The end of work whose stop was requested.
pub(super) enum Stop {
    /// A stop after which nothing is left.
    Confirmed,
    /// A stop that the engine reports, but whose processes are not visible from here.
    Unseen,
    /// Work that continues.
    Failed(Leftover),
}

/// Work that continues after its stop was requested.
#[derive(Debug)]
pub(crate) struct Leftover {
    /// Work in the engine; `None` if the engine has ended it.
    pub(super) work: Option<Box<dyn RunningWork>>,
    pub(super) begun: Instant,
    /// Keeps the worker from taking builds.
    ///
    /// It exists before the stop is reported, because the service assigns builds until the worker reports
    /// that it takes none.
    pub(super) _unconfirmed: UnconfirmedStop,
}

impl Ended {
    /// Creates the end of an attempt from an engine error and the step that failed.
    pub(super) fn by_engine(error: &EngineError, step: Option<FailedStep>) -> Self {
        let kind = match error {
            EngineError::BaseElsewhere { holder, .. } => {
                return Self::Elsewhere { reason: error.to_string(), base: holder.clone() };
            }
            EngineError::Refused(_) => FailureKind::User,
            EngineError::Unreachable(_) | EngineError::Broken(_) => FailureKind::Infrastructure,
        };
        let FailedStep { name, last_lines, .. } = step.unwrap_or_default();
        let failed =
            Failed { kind: kind.into(), step: name, message: shortened(error.to_string()), last_lines };
        Self::Failed { failed, suspects_engine: matches!(error, EngineError::Broken(_)) }
    }

    /// Creates the end of an attempt whose engine has not done what it reported.
    pub(super) fn by_broken_engine(message: String) -> Self {
        EngineError::Broken(message).into()
    }

    /// Creates a failure that is neither the user's nor the engine's fault.
    pub(super) fn by_infrastructure(message: String) -> Self {
        Self::Failed { failed: failed(FailureKind::Infrastructure, message), suspects_engine: false }
    }

    /// Creates a failure that the user has to fix.
    pub(super) fn by_user(message: String) -> Self {
        Self::Failed { failed: failed(FailureKind::User, shortened(message)), suspects_engine: false }
    }
}

/// Conversion of an error outside of any step.
impl From<EngineError> for Ended {
    fn from(error: EngineError) -> Self {
        Self::by_engine(&error, None)
    }
}

/// Conversion of the reason why there is no build context.
impl From<FetchError> for Ended {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Remote(RemoteError::Refused(message)) => Self::by_user(message),
            FetchError::ServiceClient(_)
            | FetchError::Silent
            | FetchError::Keep(_)
            | FetchError::Other
            | FetchError::Remote(RemoteError::Unreachable(_) | RemoteError::Local(_)) => {
                let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
                Self::by_infrastructure(format!("{error}{}", source.unwrap_or_default()))
            }
        }
    }
}

/// Conversion of the reason why there are no secrets.
impl From<SecretError> for Ended {
    fn from(error: SecretError) -> Self {
        match error {
            SecretError::Refused { .. } => Self::by_user(error.to_string()),
            SecretError::Unreadable => Self::by_infrastructure(error.to_string()),
        }
    }
}

/// Cuts the middle of a message that the service would otherwise truncate.
///
/// An error quotes its command, and ends with the reason.
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
