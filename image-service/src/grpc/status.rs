//! The mapping of errors to gRPC statuses, and the only module that chooses a code. Internal details stay in
//! the log, under a trace id.

use std::{collections::HashMap, time::Duration};

use proto::images as wire;
use service_runtime::{call_limits::CallRefusal, telemetry};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use uuid::Uuid;

use crate::{
    error::{Error, Obstacle, Refusal, Resource},
    jwt::TokenError,
};

/// The domain of every error reason.
const DOMAIN: &str = "images.trailer";

/// Retry delay if success depends on other callers or workers.
const A_WHILE: Duration = Duration::from_secs(5);

/// Retry delay while the service loads.
const A_SECOND: Duration = Duration::from_secs(1);

/// Retry delay if one of the caller's own calls is in the way.
const A_MOMENT: Duration = Duration::from_millis(100);

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Invalid(violations) => {
                let mut details = match violations.omitted() {
                    0 => reason("INVALID_FIELDS"),
                    omitted => reason_with("INVALID_FIELDS", "omitted", omitted.to_string()),
                };
                for violation in violations.iter() {
                    details.add_bad_request_violation(&violation.field, &violation.rule);
                }
                Self::with_error_details(Code::InvalidArgument, message, details)
            }
            Error::NotFound(resource) => {
                let name = match &resource {
                    Resource::Image(_) => "IMAGE_NOT_FOUND",
                    Resource::Build(_) => "BUILD_NOT_FOUND",
                    Resource::Worker(_) => "WORKER_NOT_FOUND",
                };
                Self::with_error_details(Code::NotFound, message, reason_with(name, "id", resource.id()))
            }
            Error::RoleMissing(role) => {
                let details = reason_with("ROLE_MISSING", "role", role.to_string());
                Self::with_error_details(Code::PermissionDenied, message, details)
            }
            Error::OtherWorker => with_reason(Code::PermissionDenied, "OTHER_WORKER", message),
            Error::WrongApi => with_reason(Code::PermissionDenied, "WORKER_TOKEN", message),
            Error::Forbidden(action) => {
                let name = wire::ImageAction::from(action).as_str_name().to_owned();
                let details = reason_with("ACTION_FORBIDDEN", "action", name);
                Self::with_error_details(Code::PermissionDenied, message, details)
            }
            Error::ReferenceTaken(_) => {
                let mut details = reason("REFERENCE_TAKEN");
                details.add_bad_request_violation("image.repository", "must be free, together with the tag");
                Self::with_error_details(Code::AlreadyExists, message, details)
            }
            Error::EtagMismatch => with_reason(Code::Aborted, "ETAG_MISMATCH", message),
            Error::RequestIdReused => {
                let mut details = reason("REQUEST_ID_REUSED");
                details.add_bad_request_violation("request_id", &message);
                Self::with_error_details(Code::InvalidArgument, message, details)
            }
            Error::NotResolvable(obstacles) => {
                let mut details = reason("NOT_RESOLVABLE");
                for obstacle in obstacles {
                    let name = match obstacle {
                        Obstacle::Template => "IS_TEMPLATE",
                        Obstacle::NotFinished => "NOT_FINISHED",
                        Obstacle::ArtifactMissing => "ARTIFACT_MISSING",
                        Obstacle::Disabled => "DISABLED",
                    };
                    details.add_precondition_failure_violation(name, "image", obstacle.to_string());
                }
                Self::with_error_details(Code::FailedPrecondition, message, details)
            }
            Error::Refused(refusal) => {
                let name = refusal_reason(refusal);
                let mut details = reason(name);
                details.add_precondition_failure_violation(name, "image", &message);
                Self::with_error_details(Code::FailedPrecondition, message, details)
            }
            Error::RevisionUnavailable { oldest } => {
                let details = reason_with("REVISION_UNAVAILABLE", "oldest_revision", oldest.to_string());
                Self::with_error_details(Code::OutOfRange, message, details)
            }
            Error::SequenceUnavailable { requested: _, last } => {
                let details = reason_with("SEQUENCE_UNAVAILABLE", "last_sequence", last.to_string());
                Self::with_error_details(Code::OutOfRange, message, details)
            }
            Error::TokenExpired => with_reason(Code::Unauthenticated, "TOKEN_EXPIRED", message),
            Error::WorkerConnected(_) => with_reason(Code::AlreadyExists, "WORKER_CONNECTED", message),
            Error::ProtocolUnsupported { spoken: _ } => {
                let mut details = reason("PROTOCOL_UNSUPPORTED");
                details.add_precondition_failure_violation("PROTOCOL_UNSUPPORTED", "worker", &message);
                Self::with_error_details(Code::FailedPrecondition, message, details)
            }
            Error::SessionLost => with_reason(Code::Aborted, "SESSION_LOST", message),
            Error::Draining => with_reason(Code::Unavailable, "DRAINING", message),
            Error::UploadStalled => with_reason(Code::Aborted, "UPLOAD_STALLED", message),
            Error::TooManyUploads => exhausted("TOO_MANY_UPLOADS", message, A_WHILE),
            Error::TooManyCalls { retry_after } => exhausted("TOO_MANY_CALLS", message, retry_after),
            Error::TooManyConcurrentCalls { limit: _ } => {
                exhausted("TOO_MANY_CONCURRENT_CALLS", message, A_MOMENT)
            }
            Error::TooManyBytes { limit: _ } => exhausted("TOO_MANY_BYTES", message, A_MOMENT),
            Error::TooManyStreams { limit: _ } => exhausted("TOO_MANY_STREAMS", message, A_WHILE),
            Error::TooManyWrites { limit: _ } => exhausted("TOO_MANY_WRITES", message, A_WHILE),
            Error::TooManyPendingBuilds { limit: _ } => {
                exhausted("TOO_MANY_PENDING_BUILDS", message, A_WHILE)
            }
            // Without a retry delay, because nothing changes by itself.
            Error::CatalogueFull => with_reason(Code::ResourceExhausted, "CATALOGUE_FULL", message),
            Error::CreatorQuotaExceeded { quota, limit: _ } => {
                let details = reason_with("CREATOR_QUOTA_EXCEEDED", "quota", quota.name().to_owned());
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            Error::CatalogueLoading => retry_later(Code::Unavailable, "CATALOGUE_LOADING", message, A_SECOND),
            Error::Busy => with_reason(Code::Unavailable, "STORE_BUSY", message),
            Error::StorageFull => retry_later(Code::Unavailable, "STORAGE_FULL", message, A_WHILE),
            Error::Internal(source) => internal(source.as_ref()),
        }
    }
}

/// Returns the status for a request without a valid token.
pub(super) fn unauthenticated(error: Option<TokenError>) -> Status {
    let (name, message) = match error {
        None => ("TOKEN_MISSING", "`authorization: Bearer <JWT>` is needed".to_owned()),
        Some(error @ TokenError::Invalid) => ("TOKEN_INVALID", error.to_string()),
        Some(error @ TokenError::Expired) => ("TOKEN_EXPIRED", error.to_string()),
    };
    with_reason(Code::Unauthenticated, name, message)
}

/// Returns the status for a request that cannot be decoded.
pub(super) fn undecodable() -> Status {
    let message = "the request is not a message of the method's request type";
    with_reason(Code::InvalidArgument, "MALFORMED_REQUEST", message)
}

/// Returns the status for a call with a header that is not valid.
pub(super) fn malformed(rule: &str) -> Status {
    with_reason(Code::InvalidArgument, "MALFORMED_REQUEST", rule)
}

/// Returns the status for a request message over the limit of its method.
pub(super) fn too_large() -> Status {
    let message = "the request message is too large: 1 MiB is allowed, 4 KiB for health checks and reflection, and 4 MiB \
                   for workers";
    with_reason(Code::InvalidArgument, "MALFORMED_REQUEST", message)
}

/// Returns the status for a call that is refused before its caller is known.
pub(super) fn refused(refusal: CallRefusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        CallRefusal::TooManyConnections => {
            retry_later(Code::Unavailable, "TOO_MANY_CONNECTIONS", message, A_WHILE)
        }
        CallRefusal::TooManyCalls => exhausted("TOO_MANY_CALLS", message, A_SECOND),
        CallRefusal::HeadersTooLarge => with_reason(Code::InvalidArgument, "HEADERS_TOO_LARGE", message),
        CallRefusal::RequestIncomplete => with_reason(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message),
    }
}

/// Returns the status for a call whose deadline has passed.
pub(super) fn too_late() -> Status {
    with_reason(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline of the call is over")
}

/// Returns the status for an unsupported encoding of a request, or an unknown method.
pub(super) fn unimplemented(is_encoding: bool) -> Status {
    let message =
        if is_encoding { "the request must be encoded as `gzip` or `identity`" } else { "no such method" };
    with_reason(Code::Unimplemented, "UNIMPLEMENTED", message)
}

/// Logs an internal error, and returns a status with the trace id to find it by.
pub(super) fn internal(error: &(dyn std::error::Error + 'static)) -> Status {
    let trace_id = telemetry::trace_id().unwrap_or_else(|| Uuid::new_v4().simple().to_string());
    tracing::error!(trace_id, %error, source = ?error.source(), "internal error");
    let details = reason_with("INTERNAL", "trace_id", trace_id);
    Status::with_error_details(Code::Internal, "internal error", details)
}

fn refusal_reason(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::BuildInProgress => "BUILD_IN_PROGRESS",
        Refusal::NoBuildInProgress => "NO_BUILD_IN_PROGRESS",
        Refusal::BuildNotCancellable => "BUILD_NOT_CANCELLABLE",
        Refusal::SnapshotNotBuildable => "SNAPSHOT_NOT_BUILDABLE",
        Refusal::OtherBuild => "OTHER_BUILD",
        Refusal::TemplateNotBuildable => "TEMPLATE_NOT_BUILDABLE",
        Refusal::PulledNotWritten | Refusal::SnapshotNotWritten | Refusal::DockerfileInContext => {
            "NO_DOCKERFILE"
        }
        Refusal::SnapshotNotFinished => "SNAPSHOT_NOT_FINISHED",
        Refusal::TooManyGrants => "TOO_MANY_GRANTS",
    }
}

fn exhausted(name: &str, message: String, retry_after: Duration) -> Status {
    retry_later(Code::ResourceExhausted, name, message, retry_after)
}

/// Returns a status with a retry delay.
fn retry_later(code: Code, name: &str, message: String, retry_after: Duration) -> Status {
    let mut details = reason(name);
    details.set_retry_info(Some(retry_after));
    Status::with_error_details(code, message, details)
}

fn with_reason(code: Code, name: &str, message: impl Into<String>) -> Status {
    Status::with_error_details(code, message, reason(name))
}

fn reason(name: &str) -> ErrorDetails {
    ErrorDetails::with_error_info(name, DOMAIN, HashMap::new())
}

fn reason_with(name: &str, key: &str, value: String) -> ErrorDetails {
    ErrorDetails::with_error_info(name, DOMAIN, HashMap::from([(key.to_owned(), value)]))
}

#[cfg(test)]
mod tests;
