//! Conversion of snapshot requests.

use proto::images as wire;

use crate::{build::Workspace, error::Violations, grpc::field, image::SnapshotOrder};

const MAX_CONTAINER: usize = 255;

/// Parses the workspace and the creator of a snapshot, and records all violations.
pub(super) fn order(violations: &mut Violations, message: &wire::SnapshotWorkspaceRequest) -> SnapshotOrder {
    let source = field::image(violations, "source_image_id", &message.source_image_id);
    field::subject(violations, "worker", &message.worker);
    field::subject(violations, "creator", &message.creator);
    let container = &message.container;
    let fits = container.len() <= MAX_CONTAINER
        && container.starts_with(|c: char| c.is_ascii_alphanumeric())
        && container.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if !fits {
        let rule = "must be at most 255 letters, digits, `_`, `.` and `-`, as the engine names it";
        violations.add("container", rule);
    }
    SnapshotOrder {
        workspace: Workspace { container: container.clone(), source },
        worker: message.worker.clone(),
        creator: message.creator.clone(),
    }
}
