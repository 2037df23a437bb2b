//! Conversion of batches from and to their messages.

use prost::Message;
use proto::images::{self as wire, batch_result::Result as Outcome};
use tonic::{Code, Status};

use crate::{
    catalog::{BatchOutcome, BatchTarget},
    error::{Error, Violations},
    grpc::field,
    image::{BatchAction, ImageId},
};

pub(in crate::grpc) const MAX_TARGETS: usize = 1_000;

/// Parses the action and the targets of a batch. An invalid target fails only its own row.
pub(super) fn order(
    message: &wire::BatchImagesRequest,
    mut violations: Violations,
) -> Result<(BatchAction, Vec<BatchTarget>), Error> {
    if !(1..=MAX_TARGETS).contains(&message.targets.len()) {
        violations.add("targets", format!("must be 1 to 1,000, are {}", message.targets.len()));
    }
    let action = match message.action() {
        wire::BatchAction::Build => Some(BatchAction::Build),
        wire::BatchAction::CancelBuild => Some(BatchAction::CancelBuild),
        wire::BatchAction::Enable => Some(BatchAction::Enable),
        wire::BatchAction::Disable => Some(BatchAction::Disable),
        wire::BatchAction::Delete => Some(BatchAction::Delete),
        wire::BatchAction::Unspecified => {
            violations.add("action", "must be a known action");
            None
        }
    };
    violations.check()?;
    let action = action.ok_or_else(|| Error::Internal("an action is missing without a violation".into()))?;
    // The errors of a row are those of the call for its image alone.
    let target =
        |target: &wire::BatchTarget| Ok((ImageId(field::id("id", &target.id)?), field::etag(&target.etag)));
    Ok((action, message.targets.iter().map(target).collect()))
}

pub(super) fn response(
    targets: Vec<wire::BatchTarget>,
    outcomes: Vec<BatchOutcome>,
) -> wire::BatchImagesResponse {
    let result = |(target, outcome): (wire::BatchTarget, BatchOutcome)| {
        let outcome = match outcome {
            Ok(image) => Outcome::Image(image.into()),
            Err(error) => Outcome::Error(rpc_status(&error.into())),
        };
        wire::BatchResult { id: target.id, result: Some(outcome) }
    };
    wire::BatchImagesResponse { results: targets.into_iter().zip(outcomes).map(result).collect() }
}

/// Returns the status code of a row.
pub(super) fn code(row: &wire::BatchResult) -> Code {
    match &row.result {
        Some(Outcome::Error(error)) => Code::from_i32(error.code),
        Some(Outcome::Image(_)) | None => Code::Ok,
    }
}

/// Converts a status to a message, which is encoded in its details.
fn rpc_status(status: &Status) -> tonic_types::Status {
    tonic_types::Status::decode(status.details()).unwrap_or_else(|_| tonic_types::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}
