//! Garbage collection of this worker's images that neither a record nor a container needs any more.
//!
//! The service decides which images are needed, but it knows only what was reported about a build. Therefore
//! no image of a record is removed while one of its builds runs here, and no such build starts between the
//! service's answer and the removal.
//!
//! When a build ends, the previous image of its record may become unused. Soon afterwards the service is
//! asked about that image alone, because there may be thousands of others; all images, all names of
//! artifacts, and all base images are checked periodically. An artifact that was pulled only loses its name:
//! whoever else pulled it may need it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::dispatch::{self as wire, FindUnusedImagesRequest, FindUnusedImagesResponse, HeldImage};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    artifact_name::ArtifactName,
    base_images::BaseImages,
    engine::{Engine, EngineError, LabelledImage},
    labels::{CATALOGUE_LABEL, IMAGE_LABEL, REFERENCE_LABEL, WORKER_LABEL},
    locks::{ExclusiveLock, Locks},
    service_client::{self, ServiceClient, ServiceError},
    stale_tags::ATTEMPTS,
};

/// The images that builds have replaced since the last collection, by the engine's image ID.
#[derive(Debug, Default)]
pub(crate) struct Replaced {
    images: Mutex<BTreeSet<String>>,
    added: Notify,
}

impl Replaced {
    pub(crate) fn add(&self, image: String) {
        self.images().insert(image);
        self.added.notify_one();
    }

    fn take(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.images())
    }

    fn images(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The garbage collection of a worker.
#[derive(Debug)]
pub(crate) struct ImageGc {
    pub(crate) worker: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) service: Arc<dyn ServiceClient>,
    /// Locks of the records that have running builds, by record ID; no image of such a record is removed.
    pub(crate) records: Arc<Locks>,
    pub(crate) bases: Arc<BaseImages>,
    /// ID of the catalogue that builds come from; empty until the first connection.
    pub(crate) catalogue: Mutex<String>,
    pub(crate) replaced: Arc<Replaced>,
    /// Interval between collections of all images.
    pub(crate) every: Duration,
}

/// The reason why a collection failed.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the service does not report what is unused")]
    Service(#[from] ServiceError),
}

impl ImageGc {
    /// Minimum interval between collections of all images.
    pub(crate) const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
    /// Minimum pause between two collections.
    const PAUSE: Duration = Duration::from_secs(1);
    /// Minimum pause after a collection, as a multiple of the time that the collection took.
    ///
    /// A collection of many images takes long; the pause limits the load on the engine and the service.
    const PAUSED_BY_LOOKED: u32 = 9;
    /// Maximum number of images in one request to the service.
    const AT_ONCE: usize = 500;

    pub(crate) fn catalogue(&self) -> String {
        self.catalogue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_catalogue(&self, id: String) {
        *self.catalogue.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// Collects all images periodically, and replaced images soon after the builds that replaced them.
    pub(crate) async fn run(&self) {
        let mut removed = Vec::new();
        let mut looked_at_all = Instant::now();
        let mut pause = Self::PAUSE;
        loop {
            let wait = self.every.saturating_sub(looked_at_all.elapsed());
            let _ = timeout(wait, self.replaced.added.notified()).await;
            sleep(pause.min(self.every)).await;
            let begun = Instant::now();
            let mut replaced = Some(self.replaced.take());
            if begun.duration_since(looked_at_all) >= self.every {
                replaced = None;
                looked_at_all = begun;
            }
            let catalogue = self.catalogue();
            // A service of an earlier version gives no catalogue ID. The replaced images may be covered by a
            // full collection.
            if catalogue.is_empty() || replaced.as_ref().is_some_and(BTreeSet::is_empty) {
                continue;
            }
            let is_full = replaced.is_none();
            let mut collected = self.collect(&catalogue, replaced, &mut removed).await;
            if is_full && collected.is_ok() {
                collected = self.collect_names(&catalogue).await;
            }
            if is_full && collected.is_ok() {
                collected = self.bases.collect().await.map_err(CollectError::from);
            }
            if let Err(error) = collected {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, source, "cannot look for unused images");
            }
            pause = Self::PAUSE.max(begun.elapsed() * Self::PAUSED_BY_LOOKED);
        }
    }

    /// Returns the images that this worker has built for `catalogue`: all of them, or those in `ids`.
    async fn built_images(
        &self,
        catalogue: &str,
        ids: Option<BTreeSet<String>>,
    ) -> Result<Vec<LabelledImage>, EngineError> {
        let ours = [(WORKER_LABEL, self.worker.as_str()), (CATALOGUE_LABEL, catalogue)];
        let Some(ids) = ids else {
            return self.engine.labelled(&ours).await;
        };
        let mut images = Vec::new();
        for id in ids {
            let Some(image) = self.engine.image(&id).await? else { continue };
            if ours.iter().all(|(label, value)| image.labels.get(*label).is_some_and(|found| found == value))
            {
                images.push(LabelledImage { id: image.id, names: image.names, labels: image.labels });
            }
        }
        Ok(images)
    }

    /// Removes the unused images in `ids`, or among all images.
    ///
    /// `removed` holds the IDs of removed images that were not reported to the service yet.
    async fn collect(
        &self,
        catalogue: &str,
        ids: Option<BTreeSet<String>>,
        removed: &mut Vec<String>,
    ) -> Result<(), CollectError> {
        let images: Vec<(HeldImage, LabelledImage)> =
            self.built_images(catalogue, ids).await?.into_iter().filter_map(held).collect();
        for images in images.chunks(Self::AT_ONCE) {
            let locks = self.lock_idle(images.iter().map(|(held, _)| held.image_id.as_str()));
            let is_idle = |held: &HeldImage| locks.contains_key(held.image_id.as_str());
            let idle: Vec<HeldImage> =
                images.iter().map(|(held, _)| held).filter(|held| is_idle(held)).cloned().collect();
            let reported = removed.len().min(Self::AT_ONCE);
            let unused = self
                .find_unused(FindUnusedImagesRequest {
                    images: idle,
                    removed_engine_image_ids: removed[..reported].to_vec(),
                    artifacts: Vec::new(),
                })
                .await?
                .engine_image_ids;
            removed.drain(..reported);
            for (held, image) in images.iter().filter(|(held, _)| is_idle(held)) {
                if unused.contains(&held.engine_image_id) && self.remove(image).await {
                    tracing::info!(id = image.id, "removed an unused image");
                    removed.push(image.id.clone());
                }
            }
        }
        Ok(())
    }

    /// Removes the names of artifacts that nothing needs.
    async fn collect_names(&self, catalogue: &str) -> Result<(), CollectError> {
        let names = self.engine.names(&ArtifactName::repositories(catalogue)).await?;
        let names: Vec<ArtifactName> = names.iter().filter_map(|name| ArtifactName::parse(name)).collect();
        for names in names.chunks(Self::AT_ONCE) {
            let locks = self.lock_idle(names.iter().map(|name| name.image_id.as_str()));
            let idle = names.iter().filter(|name| locks.contains_key(name.image_id.as_str()));
            let artifacts = idle.map(|name| wire::ArtifactName {
                image_id: name.image_id.clone(),
                build_id: name.build_id.clone(),
            });
            let request = FindUnusedImagesRequest { artifacts: artifacts.collect(), ..Default::default() };
            for wire::ArtifactName { image_id, build_id } in self.find_unused(request).await?.artifacts {
                let name = ArtifactName { catalogue: catalogue.to_owned(), image_id, build_id }.to_string();
                match self.engine.untag(&name).await {
                    Ok(()) => tracing::info!(name, "removed the name of an unused artifact"),
                    Err(error) => tracing::warn!(name, %error, "cannot remove the name of an artifact"),
                }
            }
        }
        Ok(())
    }

    /// Keeps builds of those of these records from starting that have none running.
    fn lock_idle<'a>(&self, records: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, ExclusiveLock> {
        let records: BTreeSet<&str> = records.collect();
        let lock = |record| Some((record, self.records.try_lock_exclusive(record)?));
        records.into_iter().filter_map(lock).collect()
    }

    async fn find_unused(
        &self,
        request: FindUnusedImagesRequest,
    ) -> Result<FindUnusedImagesResponse, CollectError> {
        Ok(service_client::response(self.service.find_unused_images(request)).await?)
    }

    /// Removes an image and reports whether it is gone.
    async fn remove(&self, image: &LabelledImage) -> bool {
        // Each of these names belongs to a single build, so no other image can have taken it meanwhile.
        let is_of_build = |name: &&String| name.starts_with(ATTEMPTS) || ArtifactName::parse(name).is_some();
        for name in image.names.iter().filter(is_of_build) {
            if let Err(error) = self.engine.untag(name).await {
                tracing::warn!(name, %error, "cannot remove a name of an unused image");
                return false;
            }
        }
        match self.engine.remove(&image.id).await {
            Ok(is_gone) => is_gone,
            Err(error) => {
                tracing::warn!(id = image.id, %error, "cannot remove an unused image");
                false
            }
        }
    }
}

/// Describes an image for the service; returns `None` if its record label is not a UUID.
///
/// An image that was labelled by hand is therefore kept.
fn held(image: LabelledImage) -> Option<(HeldImage, LabelledImage)> {
    let label = |name| image.labels.get(name).cloned().unwrap_or_default();
    let image_id = label(IMAGE_LABEL);
    if image_id.len() != 36 || Uuid::try_parse(&image_id).is_err() {
        return None;
    }
    let held = HeldImage {
        image_id,
        engine_image_id: image.id.clone(),
        names: image.names.clone(),
        reference: label(REFERENCE_LABEL),
    };
    Some((held, image))
}
