//! Images in the engine, as it describes them with either image store.

use std::{collections::HashMap, time::Duration};

use bollard::models::{ImageInspect, ImageManifestSummary, OciPlatform};
use http::StatusCode;
use tokio::time::timeout;

use super::{DockerEngine, is_missing};
use crate::{
    engine::{EngineError, EngineImage, Manifest},
    reference,
};

impl DockerEngine {
    pub(super) async fn inspect(&self, name: &str) -> Result<Option<EngineImage>, EngineError> {
        let image = match self.docker.inspect_image(name).await {
            Ok(image) => image,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(id) = image.id.clone() else { return Ok(None) };
        Ok(Some(EngineImage {
            id,
            config_digest: config_digest(&image),
            size_bytes: self.size(name, &image).await?,
            is_in_containerd: !has_graph_driver(&image),
            layers: image.root_fs.and_then(|root| root.layers).unwrap_or_default(),
            repo_digests: image.repo_digests.unwrap_or_default(),
            names: image.repo_tags.unwrap_or_default(),
            labels: image.config.and_then(|config| config.labels).unwrap_or_default(),
        }))
    }

    pub(super) async fn inspect_manifest(
        &self,
        image: &EngineImage,
        name: &str,
    ) -> Result<Manifest, EngineError> {
        if !image.is_in_containerd {
            return Ok(Manifest::Only);
        }
        let broken = |error: &dyn std::error::Error| EngineError::Broken(error.to_string());
        let path = format!("/images/{name}/json?manifests=1");
        let inspecting =
            timeout(Duration::from_secs(Self::TIMEOUT_SECONDS), self.connections.get_json(&path));
        let (status, inspected) =
            inspecting.await.map_err(|late| broken(&late))?.map_err(|error| broken(&error))?;
        if status == StatusCode::NOT_FOUND {
            return Err(EngineError::removed(name));
        }
        let inspected: ImageInspect = serde_json::from_value(inspected).map_err(|error| broken(&error))?;
        let Some(manifests) = &inspected.manifests else { return Ok(Manifest::Unknown) };
        match own_manifest(&inspected, manifests) {
            Some(own) if own == image.id => Ok(Manifest::Only),
            Some(own) => Ok(Manifest::OfIndex(own.to_owned())),
            None => Err(EngineError::Refused(format!("{name}: has no image for the platform of the engine"))),
        }
    }

    /// Returns the size of an image on the engine's disk, in bytes.
    ///
    /// Inspecting an image reports less if containerd stores it, so its size is then taken from the list of
    /// images.
    async fn size(&self, name: &str, image: &ImageInspect) -> Result<i64, EngineError> {
        let inspected = image.size.unwrap_or(0);
        if has_graph_driver(image) {
            return Ok(inspected);
        }
        let (repository, tag) = reference::parts(name);
        let listed = self.list(HashMap::from([("reference", vec![format!("{repository}:{tag}")])])).await?;
        let listed = listed.into_iter().find(|listed| Some(&listed.id) == image.id.as_ref());
        Ok(listed.map_or(inspected, |listed| listed.size))
    }
}

/// Returns the digest of the manifest for the platform of an image that was inspected.
fn own_manifest<'a>(image: &ImageInspect, manifests: &'a [ImageManifestSummary]) -> Option<&'a str> {
    let is_own = |platform: &OciPlatform| {
        platform.os == image.os
            && platform.architecture == image.architecture
            && platform.variant.as_deref().unwrap_or_default() == image.variant.as_deref().unwrap_or_default()
    };
    let own = manifests.iter().find(|manifest| {
        manifest.available && manifest.image_data.as_ref().is_some_and(|data| is_own(&data.platform))
    });
    own.and_then(|manifest| manifest.descriptor.digest.as_deref())
}

/// Reports whether a graph driver holds an image.
///
/// Only containerd's store returns no data of the driver.
fn has_graph_driver(image: &ImageInspect) -> bool {
    image.graph_driver.as_ref().is_some_and(|driver| !driver.data.is_empty())
}

/// Returns the digest of an image's configuration; empty if the engine does not report it.
///
/// Docker before 28 does not report it for images that containerd stores.
fn config_digest(image: &ImageInspect) -> String {
    if has_graph_driver(image) {
        return image.id.clone().unwrap_or_default();
    }
    let annotations = image.descriptor.as_ref().and_then(|descriptor| descriptor.annotations.as_ref());
    annotations.and_then(|annotations| annotations.get("config.digest")).cloned().unwrap_or_default()
}
