//! Errors that are reported to callers. Only `grpc::status` maps them to gRPC codes.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    access::{Action, Role},
    build::BuildId,
    dispatch::PROTOCOL_VERSION,
    image::ImageId,
};

/// Reason why an operation failed. The store keeps the serialised form as the response to a row of a batch.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Error {
    #[error("the request is invalid: {0}")]
    Invalid(Violations),
    #[error("no such {0}")]
    NotFound(Resource),
    #[error("the role {0} is required")]
    RoleMissing(Role),
    #[error("a worker's token is valid for the dispatch API only")]
    WrongApi,
    #[error("the token belongs to another worker")]
    OtherWorker,
    #[error("you may see this image but not {0} it")]
    Forbidden(Action),
    #[error("the reference {0} belongs to another image")]
    ReferenceTaken(String),
    #[error("the image has changed: the etag does not match; read the image again")]
    EtagMismatch,
    #[error("the request id was used for another request")]
    RequestIdReused,
    #[error("no workspace can be started from this image: {}", list(.0))]
    NotResolvable(Vec<Obstacle>),
    #[error("{0}")]
    Refused(Refusal),
    #[error("the watch cannot be resumed from this revision; the oldest is {oldest}")]
    RevisionUnavailable { oldest: i64 },
    #[error("the build has no event {requested} yet; its last is {last}")]
    SequenceUnavailable { requested: i64, last: i64 },
    #[error("the token expired")]
    TokenExpired,
    #[error("the worker {0} is already connected")]
    WorkerConnected(String),
    #[error(
        "the worker speaks version {spoken} of the dispatch protocol; this service speaks version {PROTOCOL_VERSION}"
    )]
    ProtocolUnsupported { spoken: i32 },
    #[error("this connection was superseded or reads too slowly")]
    SessionLost,
    #[error("the service is draining; reconnect")]
    Draining,
    #[error(
        "no part of the archive arrived for a minute, or the upload is slower than 16 KiB per second or took more than an hour"
    )]
    UploadStalled,
    #[error("too many uploads are in progress; try again later")]
    TooManyUploads,
    #[error("the caller exceeds its rate limit; try again later")]
    TooManyCalls { retry_after: Duration },
    #[error("the caller has {limit} calls in progress, which is the limit")]
    TooManyConcurrentCalls { limit: u32 },
    #[error("the caller's incomplete requests have over {limit} bytes, which is the limit; try again later")]
    TooManyBytes { limit: u64 },
    #[error("the caller has {limit} open streams, which is the limit")]
    TooManyStreams { limit: u32 },
    #[error("the caller has {limit} waiting writes, which is the limit; try again later")]
    TooManyWrites { limit: usize },
    #[error("the caller has {limit} queued builds, which is the limit; try again later")]
    TooManyPendingBuilds { limit: u64 },
    #[error("the catalogue is full: the operator limits its size (--index-memory)")]
    CatalogueFull,
    #[error("the quota of {limit} {quota} is used up; {}", quota.remedy())]
    CreatorQuotaExceeded { quota: CreatorQuota, limit: u64 },
    #[error("the catalogue is loading; try again later")]
    CatalogueLoading,
    #[error("the store is busy; try again")]
    Busy,
    #[error(
        "the disk of the catalogue is full: nothing is added until the operator makes room; reads are served"
    )]
    StorageFull,
    #[serde(skip)]
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A resource that does not exist or that the caller cannot see; callers cannot distinguish the two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Resource {
    Image(ImageId),
    Build(BuildId),
    Worker(String),
}

impl Resource {
    /// Returns its identifier, as in the request.
    pub(crate) fn id(&self) -> String {
        match self {
            Self::Image(id) => id.to_string(),
            Self::Build(id) => id.to_string(),
            Self::Worker(name) => name.clone(),
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(id) => write!(f, "image: {id}"),
            Self::Build(id) => write!(f, "build: {id}"),
            Self::Worker(name) => write!(f, "worker: {name}"),
        }
    }
}

/// A quantity that is limited for the images of one creator.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CreatorQuota {
    /// Number of images.
    Images,
    /// Memory of the images in the index.
    Bytes,
    /// Uploaded archives.
    ContextBytes,
}

impl CreatorQuota {
    /// Returns the name of the quota for clients.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Bytes => "bytes",
            Self::ContextBytes => "context_bytes",
        }
    }

    /// Returns how to use less.
    fn remedy(self) -> &'static str {
        match self {
            Self::Images | Self::Bytes => "delete some images of the creator first",
            Self::ContextBytes => {
                "delete images that are built from archives first; archives that no image refers to expire by themselves"
            }
        }
    }
}

impl fmt::Display for CreatorQuota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Images => "images",
            Self::Bytes => "bytes of images",
            Self::ContextBytes => "bytes of uploaded archives",
        })
    }
}

/// Reason why the state of an image or a build rejects a request.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Refusal {
    #[error("a build of this image is pending or running")]
    BuildInProgress,
    #[error("no build of this image is pending or running")]
    NoBuildInProgress,
    #[error("a snapshot cannot be cancelled")]
    BuildNotCancellable,
    #[error("a template cannot be built")]
    TemplateNotBuildable,
    #[error("the image is pulled: it has no Dockerfile")]
    PulledNotWritten,
    #[error("a snapshot has no Dockerfile: it was committed from a running workspace")]
    SnapshotNotWritten,
    #[error("the Dockerfile is in the image's context")]
    DockerfileInContext,
    #[error("the snapshot is not finished")]
    SnapshotNotFinished,
    #[error("an image has at most 1,000 grants")]
    TooManyGrants,
    #[error("a snapshot cannot be built again: it would lose the committed file system")]
    SnapshotNotBuildable,
    #[error("the given build is not the latest one of this image")]
    OtherBuild,
}

/// Reason why an image cannot back a workspace.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Obstacle {
    #[error("it is a template")]
    Template,
    #[error("its latest build has not succeeded")]
    NotFinished,
    #[error("its artifact is missing: its engine does not hold it any more")]
    ArtifactMissing,
    #[error("it is disabled")]
    Disabled,
}

fn list(obstacles: &[Obstacle]) -> String {
    obstacles.iter().map(Obstacle::to_string).collect::<Vec<_>>().join(", ")
}

/// The rules that a request violates, each with the path of its field; as many as a response can carry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Violations {
    kept: Vec<Violation>,
    bytes: usize,
    omitted: usize,
}

/// A rule that a field violates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Violation {
    pub(crate) field: String,
    pub(crate) rule: String,
}

impl Violations {
    /// Maximum size of all kept violations. Errors travel in headers, of which clients accept 8 KiB, some of
    /// them twice.
    const MAX_BYTES: usize = 3 * 1024;
    const MAX_TEXT_CHARS: usize = 200;
    /// Size of the violations after which the message omits the remaining ones.
    const MAX_MESSAGE_BYTES: usize = 800;

    pub(crate) fn one(field: impl Into<String>, rule: impl Into<String>) -> Self {
        let mut violations = Self::default();
        violations.add(field, rule);
        violations
    }

    pub(crate) fn add(&mut self, field: impl Into<String>, rule: impl Into<String>) {
        if self.bytes > Self::MAX_BYTES {
            self.omitted += 1;
            return;
        }
        let cut = |text: String| match text.char_indices().nth(Self::MAX_TEXT_CHARS) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        };
        let violation = Violation { field: cut(field.into()), rule: cut(rule.into()) };
        self.bytes += violation.field.len() + violation.rule.len();
        self.kept.push(violation);
    }

    /// Returns the value, or records the violation and returns `None`.
    pub(crate) fn take<T>(&mut self, field: &str, parsed: Result<T, String>) -> Option<T> {
        parsed.map_err(|rule| self.add(field, rule)).ok()
    }

    /// Checks that no violation was recorded.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] with all recorded violations.
    pub(crate) fn check(self) -> Result<(), Error> {
        if self.kept.is_empty() { Ok(()) } else { Err(Error::Invalid(self)) }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Violation> {
        self.kept.iter()
    }

    /// Returns the number of violations that were recorded but not kept.
    pub(crate) fn omitted(&self) -> usize {
        self.omitted
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut written = 0;
        for (i, violation) in self.kept.iter().enumerate() {
            if i > 0 && written > Self::MAX_MESSAGE_BYTES {
                return write!(f, "; and {} more", self.kept.len() - i + self.omitted);
            }
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", violation.field, violation.rule)?;
            written += violation.field.len() + violation.rule.len();
        }
        if self.omitted > 0 { write!(f, "; and {} more", self.omitted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_can_carry_whatever_is_wrong() {
        let mut violations = Violations::default();
        for i in 0..1_000_000 {
            violations
                .add(format!("field[{i}]{}", "x".repeat(if i < 5 { 10_000 } else { 0 })), "must be another");
        }
        let bytes: usize = violations.iter().map(|v| v.field.len() + v.rule.len()).sum();
        assert!(bytes < Violations::MAX_BYTES + 1_000, "{bytes}");
        assert_eq!(violations.iter().count() + violations.omitted(), 1_000_000);
        let message = violations.to_string();
        assert!(message.len() < 1_500 && message.ends_with("more"), "{message}");
    }
}
