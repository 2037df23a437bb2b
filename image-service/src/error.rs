//! What can go wrong for a caller. The gRPC codes are chosen in `grpc::status`, and only there.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::access::{Action, Role};

/// The outcome of an operation that failed. Serialised, it is remembered as the answer to a row of a batch.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    #[error("the reference {0} is another image's")]
    ReferenceTaken(String),
    #[error("the image has changed: its etag is another by now")]
    EtagMismatch,
    #[error("the request id was used for another request")]
    RequestIdReused,
    #[error("no workspace can be started from this image: {}", list(.0))]
    NotResolvable(Vec<Obstacle>),
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
    #[serde(skip)]
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What can be missing, or out of the caller's sight, which is the same to it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Refusal {
    #[error("a build of this image is pending or running")]
    BuildInProgress,
    #[error("no build of this image is pending or running")]
    NoBuildInProgress,
    #[error("a snapshot cannot be cancelled")]
    BuildNotCancellable,
    #[error("a template is never built")]
    TemplateNotBuildable,
    #[error("the snapshot is not finished")]
    SnapshotNotFinished,
    #[error("an image has at most 1,000 grants")]
    TooManyGrants,
    #[error("a snapshot cannot be built again: it would lose the committed file system")]
    SnapshotNotBuildable,
    #[error("the build that is meant is not the latest one of this image")]
    OtherBuild,
}

/// What keeps an image from backing a workspace.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Obstacle {
    #[error("it is a template")]
    Template,
    #[error("its latest build has not finished with success")]
    NotFinished,
    #[error("it is disabled")]
    Disabled,
}

fn list(obstacles: &[Obstacle]) -> String {
    obstacles.iter().map(Obstacle::to_string).collect::<Vec<_>>().join(", ")
}

/// Every rule that a request violates, each with the path of its field.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Violations(Vec<Violation>);

/// A rule that a field violates.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
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
