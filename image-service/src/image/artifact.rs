//! Artifacts of images, and their form in memory.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{ImageId, Reference};
use crate::{build::BuildId, timestamp::Timestamp};

/// The result of the last successful build, held by an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Artifact {
    pub(crate) image_id: String,
    pub(crate) size_bytes: i64,
    pub(crate) worker: String,
    pub(crate) finished_at: Timestamp,
    pub(crate) configuration_revision: i64,
    pub(crate) build: BuildId,
    /// Reference that was written or pulled.
    #[serde(default)]
    pub(crate) reference: Option<Reference>,
    /// Set if the image was pulled, so that the build wrote no reference.
    #[serde(default)]
    pub(crate) pulled: bool,
    /// Digest in the registry; `None` unless a registry holds the image.
    #[serde(default)]
    pub(crate) repo_digest: Option<String>,
    /// Digest of the image's configuration, comparable across engines; `None` if the engine did not report
    /// it.
    #[serde(default)]
    pub(crate) config_digest: Option<String>,
}

impl Artifact {
    /// Returns the name that the artifact has in its engine for as long as it is the image's artifact.
    ///
    /// The reference may pass to another image there; this name does not.
    pub(crate) fn engine_name(&self, catalogue_id: Uuid, image: ImageId) -> String {
        format!("{}{catalogue_id}/{image}:{}", Reference::ARTIFACTS, self.build)
    }

    /// Returns the digest of the configuration, if it is not the engine's identifier.
    ///
    /// A graph driver identifies images by their configurations, containerd's store does not.
    pub(crate) fn separate_config(&self) -> Option<String> {
        self.config_digest.clone().filter(|digest| *digest != self.image_id)
    }

    /// Returns the reference of the artifact, if it is another one.
    pub(crate) fn reference_besides(self, other: &Reference) -> Option<Box<Reference>> {
        self.reference.filter(|reference| reference != other).map(Box::new)
    }

    /// Reports whether the image's configuration, now of this revision, has changed since the artifact was
    /// built.
    pub(crate) fn is_stale(&self, configuration_revision: i64) -> bool {
        self.configuration_revision != configuration_revision
    }
}

/// An [`Artifact`] in one small allocation, because a million images are in memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Artifact", into = "Artifact")]
pub(crate) struct PackedArtifact(Box<[u8]>);

impl PackedArtifact {
    pub(crate) fn unpack(&self) -> Artifact {
        postcard::from_bytes(&self.0).expect("it was packed by this process")
    }
}

impl From<Artifact> for PackedArtifact {
    fn from(artifact: Artifact) -> Self {
        Self(postcard::to_allocvec(&artifact).expect("every artifact can be packed").into())
    }
}

impl From<PackedArtifact> for Artifact {
    fn from(packed: PackedArtifact) -> Self {
        packed.unpack()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_is_unpacked_as_it_was() {
        let artifact = Artifact {
            image_id: "sha256:0".to_owned(),
            size_bytes: -1,
            worker: "w1".to_owned(),
            finished_at: Timestamp::from_micros(1),
            configuration_revision: 2,
            build: BuildId(Uuid::max()),
            reference: Some(Reference::from_stored("trailer/a".to_owned(), "latest".to_owned())),
            pulled: true,
            repo_digest: None,
            config_digest: Some("sha256:1".to_owned()),
        };
        assert_eq!(PackedArtifact::from(artifact.clone()).unpack(), artifact);
    }
}
