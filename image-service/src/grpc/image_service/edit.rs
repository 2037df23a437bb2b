//! Conversion of updates, with the mask that selects the fields of the image.

use prost_types::FieldMask;
use proto::images as wire;

use crate::{error::Violations, grpc::configuration, image::EditDraft};

const WRITABLE: [&str; 5] = ["name", "description", "repository", "tag", "config"];

/// Returns the fields that the mask selects; without a mask, all that are not empty.
pub(super) fn draft(violations: &mut Violations, image: wire::Image, mask: Option<FieldMask>) -> EditDraft {
    let paths = mask.map(|mask| mask.paths).unwrap_or_default();
    let is_picked = if paths.is_empty() {
        [
            !image.name.is_empty(),
            !image.description.is_empty(),
            !image.repository.is_empty(),
            !image.tag.is_empty(),
            image.config.is_some(),
        ]
    } else {
        check(violations, &paths);
        WRITABLE.map(|field| paths.iter().any(|path| path == field || path == "*"))
    };
    let [name, description, repository, tag, config] = is_picked;
    EditDraft {
        name: name.then_some(image.name),
        description: description.then_some(image.description),
        repository: repository.then_some(image.repository),
        tag: tag.then_some(image.tag),
        configuration: config.then(|| image.config.map(configuration::draft)),
        enabled: image.enabled,
        template: image.template,
    }
}

fn check(violations: &mut Violations, paths: &[String]) {
    for (i, path) in paths.iter().enumerate() {
        let field = format!("update_mask.paths[{i}]");
        if path == "*" && paths.len() > 1 {
            violations.add(field, "`*` must stand alone");
        } else if path != "*" && !WRITABLE.contains(&path.as_str()) {
            violations
                .add(field, format!("{path:?} cannot be updated: must be `*` or of {}", WRITABLE.join(", ")));
        }
    }
}
