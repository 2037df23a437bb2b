//! The images and names that a worker keeps in its engine.

use super::{ImageId, Reference};
use crate::build::BuildId;

/// The images and names that a worker's engine holds for the catalogue.
#[derive(Clone, Debug, Default)]
pub(crate) struct EngineContents {
    pub(crate) images: Vec<HeldImage>,
    /// Identifiers in the engine of the images that were removed.
    pub(crate) removed: Vec<String>,
    /// Artifacts that have a name in the engine, each by its image and the build that made it.
    pub(crate) artifacts: Vec<(ImageId, BuildId)>,
}

/// The images and names in a worker's engine that are no longer needed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnusedContents {
    /// Identifiers in the engine.
    pub(crate) images: Vec<String>,
    pub(crate) artifacts: Vec<(ImageId, BuildId)>,
}

/// An artifact that a worker's engine should hold, because no registry does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExpectedArtifact {
    pub(crate) image: ImageId,
    pub(crate) build: BuildId,
    /// Identifier in the engine.
    pub(crate) engine_id: String,
    /// Set if the worker has reported that the engine has lost it.
    pub(crate) missing: bool,
}

/// The artifacts that a worker's engine has lost, or has again, each by its image and the build that made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ArtifactReport {
    pub(crate) missing: Vec<(ImageId, BuildId)>,
    pub(crate) present: Vec<(ImageId, BuildId)>,
}

/// An image that an engine holds on behalf of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldImage {
    pub(crate) image: ImageId,
    /// Identifier of the image in the engine.
    pub(crate) engine_id: String,
    pub(crate) names: Vec<String>,
    /// Reference that the image was made to have.
    pub(crate) reference: String,
}

impl HeldImage {
    /// Reports whether the image has names, all of them given by builds.
    ///
    /// Builds give an image its own reference, and names that are reserved for workers.
    pub(crate) fn is_named_by_builds(&self) -> bool {
        let of_build = |name: &String| *name == self.reference || Reference::is_reserved(name);
        !self.names.is_empty() && self.names.iter().all(of_build)
    }
}
