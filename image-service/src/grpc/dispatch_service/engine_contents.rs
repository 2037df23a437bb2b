//! Conversion of what a worker's engine holds, and of what nothing needs there.

use proto::dispatch as wire;

use super::message::cut;
use crate::{
    build::BuildId,
    error::{Error, Violations},
    grpc::field,
    image::{ArtifactReport, EngineContents, ExpectedArtifact, HeldImage, ImageId, UnusedContents},
};

/// Maximum number of items of each kind in a message.
pub(super) const MAX: usize = 1_000;

/// Parses what a worker's engine holds, at most a thousand of each kind.
pub(super) fn parse(request: wire::FindUnusedImagesRequest) -> Result<EngineContents, Error> {
    let wire::FindUnusedImagesRequest { images, removed_engine_image_ids: removed, artifacts } = request;
    require_at_most("images", images.len())?;
    require_at_most("removed_engine_image_ids", removed.len())?;
    let held = images.into_iter().enumerate().map(|(i, held)| {
        let image = ImageId(field::id(&format!("images[{i}].image_id"), &held.image_id)?);
        Ok(HeldImage {
            image,
            engine_id: cut(held.engine_image_id),
            names: held.names.into_iter().map(cut).collect(),
            reference: cut(held.reference),
        })
    });
    Ok(EngineContents {
        images: held.collect::<Result<_, Error>>()?,
        removed: removed.into_iter().map(cut).collect(),
        artifacts: artifact_names("artifacts", artifacts)?,
    })
}

/// Parses which artifacts a worker's engine has lost or has again, at most a thousand of each kind.
pub(super) fn report(request: wire::ReportArtifactsRequest) -> Result<ArtifactReport, Error> {
    Ok(ArtifactReport {
        missing: artifact_names("missing", request.missing)?,
        present: artifact_names("present", request.present)?,
    })
}

fn artifact_names(field: &str, names: Vec<wire::ArtifactName>) -> Result<Vec<(ImageId, BuildId)>, Error> {
    require_at_most(field, names.len())?;
    let parse = |(i, name): (usize, wire::ArtifactName)| {
        let id = |part: &str, id: &str| field::id(&format!("{field}[{i}].{part}"), id);
        Ok((ImageId(id("image_id", &name.image_id)?), BuildId(id("build_id", &name.build_id)?)))
    };
    names.into_iter().enumerate().map(parse).collect()
}

fn require_at_most(field: &str, count: usize) -> Result<(), Error> {
    if count > MAX {
        return Err(Error::Invalid(Violations::one(field, format!("must be at most {MAX}"))));
    }
    Ok(())
}

pub(super) fn expected(artifacts: Vec<ExpectedArtifact>) -> wire::ListArtifactsResponse {
    let expected = artifacts.into_iter().map(|ExpectedArtifact { image, build, engine_id, missing }| {
        wire::ExpectedArtifact {
            name: Some(artifact_name(image, build)),
            missing,
            engine_image_id: engine_id,
        }
    });
    wire::ListArtifactsResponse { artifacts: expected.collect() }
}

pub(super) fn unused(unused: UnusedContents) -> wire::FindUnusedImagesResponse {
    let artifacts = unused.artifacts.into_iter().map(|(image, build)| artifact_name(image, build));
    wire::FindUnusedImagesResponse { engine_image_ids: unused.images, artifacts: artifacts.collect() }
}

/// Returns the name of an artifact.
pub(super) fn artifact_name(image: ImageId, build: BuildId) -> wire::ArtifactName {
    wire::ArtifactName { image_id: image.to_string(), build_id: build.to_string() }
}
