//! What can go wrong for a caller. The gRPC codes are chosen in `grpc::status`, and only there.

use std::fmt;

use crate::access::{Action, Role};

/// The outcome of an operation that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the request is invalid: {0}")]
    Invalid(Violations),
    #[error("no such {0}")]
    NotFound(Resource),
    #[error("the role {0} is needed")]
    RoleMissing(Role),
    #[error("a worker's token is good for the dispatch API alone")]
    WrongApi,
    #[error("the token is another worker's")]
    OtherWorker,
    #[error("you may see this image but not {0} it")]
    Forbidden(Action),
    #[error("the reference {0} is written by another image")]
    ReferenceTaken(String),
    #[error("{0}")]
    Refused(Refusal),
    #[error("the watch cannot be resumed from this revision; the oldest is {oldest}")]
    RevisionUnavailable { oldest: i64 },
    #[error("the build has no event {asked} yet; its last is {last}")]
    SequenceUnavailable { asked: i64, last: i64 },
    #[error("the token expired")]
    TokenExpired,
    #[error("a connection of the worker {0} lives")]
    WorkerConnected(String),
    #[error("this connection was superseded or reads too slowly")]
    SessionLost,
    #[error("the service drains; connect again")]
    Draining,
    #[error("the store is busy; try again")]
    Busy,
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What can be missing, or out of the caller's sight, which is the same to it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    Image,
    Build,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Build => "build",
        })
    }
}

/// Why the state of an image or a build refuses what was asked.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("a build of this image is pending or running")]
    BuildInProgress,
    #[error("no build of this image is pending or running")]
    NoBuildInProgress,
    #[error("a snapshot that has begun cannot be cancelled")]
    BuildNotCancellable,
    #[error("a snapshot cannot be built again: it would lose the committed file system")]
    SnapshotNotBuildable,
    #[error("the build that is meant is not the latest one of this image")]
    OtherBuild,
}

/// Every rule that a request violates, each with the path of its field.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Violations(Vec<Violation>);

/// A rule that a field violates.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) field: String,
    pub(crate) rule: String,
}

impl Violations {
    pub(crate) fn one(field: impl Into<String>, rule: impl Into<String>) -> Self {
        let mut violations = Self::default();
        violations.add(field, rule);
        violations
    }

    pub(crate) fn add(&mut self, field: impl Into<String>, rule: impl Into<String>) {
        self.0.push(Violation { field: field.into(), rule: rule.into() });
    }

    /// Keeps the value, or notes the violation.
    pub(crate) fn take<T>(&mut self, field: &str, parsed: Result<T, String>) -> Option<T> {
        parsed.map_err(|rule| self.add(field, rule)).ok()
    }

    /// Fails when anything was noted.
    pub(crate) fn check(self) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Invalid(self)) }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Violation> {
        self.0.iter()
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, violation) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", violation.field, violation.rule)?;
        }
        Ok(())
    }
}
