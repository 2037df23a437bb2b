//! Conversion of what a worker's engine holds, and of what nothing needs there.

use proto::dispatch as wire;

use super::message::cut;
use crate::{
    build::BuildId,
    error::{Error, Violations},
    grpc::field,
    image::{EngineContents, HeldImage, ImageId, UnusedContents},
};

/// Parses what a worker's engine holds, at most a thousand of each kind.
pub(super) fn parse(request: wire::FindUnusedImagesRequest) -> Result<EngineContents, Error> {
    const MAX: usize = 1_000;
    let wire::FindUnusedImagesRequest { images, removed_engine_image_ids: removed, artifacts } = request;
    for (field, count) in [
        ("images", images.len()),
        ("removed_engine_image_ids", removed.len()),
        ("artifacts", artifacts.len()),
    ] {
        if count > MAX {
            return Err(Error::Invalid(Violations::one(field, format!("must be at most {MAX}"))));
        }
    }
    let held = images.into_iter().enumerate().map(|(i, held)| {
        let image = ImageId(field::id(&format!("images[{i}].image_id"), &held.image_id)?);
        Ok(HeldImage {
            image,
            engine_id: cut(held.engine_image_id),
            names: held.names.into_iter().map(cut).collect(),
            reference: cut(held.reference),
        })
    });
    let artifacts = artifacts.into_iter().enumerate().map(|(i, artifact)| {
        let id = |name: &str, id: &str| field::id(&format!("artifacts[{i}].{name}"), id);
        Ok((ImageId(id("image_id", &artifact.image_id)?), BuildId(id("build_id", &artifact.build_id)?)))
    });
    Ok(EngineContents {
        images: held.collect::<Result<_, Error>>()?,
        removed: removed.into_iter().map(cut).collect(),
        artifacts: artifacts.collect::<Result<_, Error>>()?,
    })
}

pub(super) fn unused(unused: UnusedContents) -> wire::FindUnusedImagesResponse {
    let artifacts = unused.artifacts.into_iter().map(|(image, build)| wire::ArtifactName {
        image_id: image.to_string(),
        build_id: build.to_string(),
    });
    wire::FindUnusedImagesResponse { engine_image_ids: unused.images, artifacts: artifacts.collect() }
}
