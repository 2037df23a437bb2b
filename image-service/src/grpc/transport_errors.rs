//! Failures outside of the handlers: requests that cannot be decoded, and panics.

use std::any::Any;

use http::{HeaderMap, HeaderName, Response};
use tonic::{Code, Status, body::Body};

use super::status;

/// Header of a response that refuses the encoding of a request: those that are accepted.
const ACCEPTED: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Adds details to a status that tonic itself returned, and blames the caller if it is at fault.
///
/// Tonic returns `INTERNAL` for bytes that are no message, and `OUT_OF_RANGE` for a message over the limit, or
/// `RESOURCE_EXHAUSTED` if it is over the limit when it is decompressed.
/// Every status of this service carries details, so one without them comes from tonic.
pub(super) fn explain(response: Response<Body>) -> Response<Body> {
    let Some(found) = undetailed_status(response.headers()) else {
        return response;
    };
    match found.code() {
        Code::Internal => status::undecodable(),
        Code::OutOfRange | Code::ResourceExhausted => status::too_large(),
        Code::Unimplemented => {
            let encodings = response.headers().get(ACCEPTED).cloned();
            let mut explained = status::unimplemented(encodings.is_some()).into_http();
            explained.headers_mut().extend(encodings.map(|encodings| (ACCEPTED, encodings)));
            return explained;
        }
        Code::Ok
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => return response,
    }
    .into_http()
}

/// Returns the response for a handler that panicked.
pub(super) fn panicked(panic: Box<dyn Any + Send>) -> Response<Body> {
    let message = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    status::internal(&Panic(message)).into_http()
}

#[derive(Debug, thiserror::Error)]
#[error("a handler panicked: {0}")]
struct Panic(String);

fn undetailed_status(headers: &HeaderMap) -> Option<Status> {
    let found = Status::from_header_map(headers)?;
    found.details().is_empty().then_some(found)
}
