//! Snapshots on the wire.

use proto::images as wire;

use crate::{
    build::Workspace,
    error::{Error, Violations},
    grpc::field,
    image::ImageId,
};

const MAX_CONTAINER: usize = 255;

/// Which workspace is meant; every violation of the request is reported together.
pub(super) fn workspace(message: &wire::SnapshotWorkspaceRequest) -> Result<Workspace, Error> {
    let mut violations = Violations::default();
    let source = field::id("source_image_id", &message.source_image_id);
    if source.is_err() {
        violations.add("source_image_id", "must be a UUID in its hyphenated form");
    }
    field::subject(&mut violations, "worker", &message.worker);
    field::subject(&mut violations, "creator", &message.creator);
    let container = &message.container;
    let fits = container.len() <= MAX_CONTAINER
        && container.starts_with(|c: char| c.is_ascii_alphanumeric())
        && container.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if !fits {
        violations.add(
            "container",
            "must be at most 255 letters, digits, `_`, `.` and `-`, as the engine names it",
        );
    }
    violations.check()?;
    Ok(Workspace { container: container.clone(), source: ImageId(source?) })
}
