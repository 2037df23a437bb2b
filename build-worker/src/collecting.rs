//! Removes the images of this worker that neither a record nor a container needs any more.
//!
//! What is needed the service says, which knows of a build only what was reported. So nothing of a record is removed while one
//! of its builds is at work here, and none is begun between the answer and the removal.
//!
//! A build that ends leaves what its record had before without use: soon after it the service is asked about that image, and about
//! no others, which may be thousands. All are looked at from time to time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use proto::dispatch::{FindUnneededRequest, HeldImage};
use tokio::{
    sync::{Notify, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock},
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    dial::{Dial, DialError},
    engine::{Engine, EngineError, LabelledImage},
    labels::{CATALOGUE_LABEL, IMAGE_LABEL, REFERENCE_LABEL, WORKER_LABEL},
    leftovers::ATTEMPTS,
};

/// Whose builds are at work.
#[derive(Debug, Default)]
pub(crate) struct Records(Mutex<BTreeMap<String, Weak<RwLock<()>>>>);

/// As long as it lives nothing of the record is removed.
pub(crate) type AtWork = OwnedRwLockReadGuard<()>;

impl Records {
    /// Waits until a build of the record may be at work.
    pub(crate) async fn work_on(&self, record: &str) -> AtWork {
        self.of(record).read_owned().await
    }

    /// Keeps builds of the record from beginning; none when some are at work.
    fn lay_hold_of(&self, record: &str) -> Option<OwnedRwLockWriteGuard<()>> {
        self.of(record).try_write_owned().ok()
    }

    fn of(&self, record: &str) -> Arc<RwLock<()>> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = records.get(record).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(RwLock::new(()));
        records.insert(record.to_owned(), Arc::downgrade(&lock));
        lock
    }
}

/// The images that builds have replaced since the last look, by the engine's identifiers.
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

/// What collecting needs.
#[derive(Debug)]
pub(crate) struct Collector {
    pub(crate) worker: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) records: Arc<Records>,
    /// Names the catalogue that builds come from; empty until the first connection.
    pub(crate) catalogue: Mutex<String>,
    pub(crate) replaced: Arc<Replaced>,
    /// How often all images are looked at.
    pub(crate) every: Duration,
}

/// Why nothing was collected.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the service does not say what is needed")]
    Service(#[from] DialError),
    #[error("the service does not answer")]
    Silent,
}

impl Collector {
    /// The least that may lie between two looks at the engine.
    pub(crate) const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
    /// How soon after one time there may be another.
    const PAUSE: Duration = Duration::from_secs(1);
    /// With many images a look takes long: the engine and the service are left alone for so many times as long.
    const PAUSED_BY_LOOKED: u32 = 9;
    /// How long the service may take to say what is needed.
    const ANSWER: Duration = Duration::from_secs(10);
    /// How many images the service is asked about at once.
    const AT_ONCE: usize = 500;

    pub(crate) fn catalogue(&self) -> String {
        self.catalogue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_catalogue(&self, id: String) {
        *self.catalogue.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// Looks at all images again and again, and when builds have ended at those that they have replaced.
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
            // A service of an earlier version gives no name; and what was replaced may have been looked at with all.
            if catalogue.is_empty() || replaced.as_ref().is_some_and(BTreeSet::is_empty) {
                continue;
            }
            if let Err(error) = self.collect(&catalogue, replaced, &mut removed).await {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, source, "cannot look for images that nothing needs");
            }
            pause = Self::PAUSE.max(begun.elapsed() * Self::PAUSED_BY_LOOKED);
        }
    }

    /// Returns the images that this worker has made for a catalogue: all, or those of these identifiers.
    async fn made(
        &self,
        catalogue: &str,
        ids: Option<BTreeSet<String>>,
    ) -> Result<Vec<LabelledImage>, EngineError> {
        let ours = [(WORKER_LABEL, self.worker.as_str()), (CATALOGUE_LABEL, catalogue)];
        let Some(ids) = ids else {
            return self.engine.labelled(&ours).await;
        };
        let mut made = Vec::new();
        for id in ids {
            let Some(image) = self.engine.image(&id).await? else { continue };
            if ours.iter().all(|(label, value)| image.labels.get(*label).is_some_and(|found| found == value))
            {
                made.push(LabelledImage { id: image.id, names: image.names, labels: image.labels });
            }
        }
        Ok(made)
    }

    /// Looks at the images of these identifiers, or at all. `removed`: what the service has not been told of yet.
    async fn collect(
        &self,
        catalogue: &str,
        ids: Option<BTreeSet<String>>,
        removed: &mut Vec<String>,
    ) -> Result<(), CollectError> {
        let images: Vec<(HeldImage, LabelledImage)> =
            self.made(catalogue, ids).await?.into_iter().filter_map(held).collect();
        for images in images.chunks(Self::AT_ONCE) {
            let mut laid_hold_of = BTreeMap::new();
            for (held, _) in images {
                if !laid_hold_of.contains_key(&held.image_id) {
                    laid_hold_of.insert(&held.image_id, self.records.lay_hold_of(&held.image_id));
                }
            }
            let is_idle = |held: &HeldImage| laid_hold_of.get(&held.image_id).is_some_and(Option::is_some);
            let idle: Vec<HeldImage> =
                images.iter().map(|(held, _)| held).filter(|held| is_idle(held)).cloned().collect();
            let told = removed.len().min(Self::AT_ONCE);
            let request =
                FindUnneededRequest { images: idle, removed_engine_image_ids: removed[..told].to_vec() };
            let unneeded = timeout(Self::ANSWER, self.dial.find_unneeded(request)).await;
            let unneeded = unneeded.map_err(|_| CollectError::Silent)??;
            removed.drain(..told);
            for (held, image) in images.iter().filter(|(held, _)| is_idle(held)) {
                if unneeded.contains(&held.engine_image_id) && self.remove(image).await {
                    tracing::info!(id = image.id, "removed an image that nothing needs");
                    removed.push(image.id.clone());
                }
            }
        }
        Ok(())
    }

    /// Removes an image; whether it is gone.
    async fn remove(&self, image: &LabelledImage) -> bool {
        // These names are of one attempt, so nobody else can have taken them meanwhile.
        let of_attempts = image.names.iter().filter(|name| name.starts_with(ATTEMPTS));
        for name in of_attempts {
            if let Err(error) = self.engine.untag(name).await {
                tracing::warn!(name, %error, "cannot remove what an attempt has left");
                return false;
            }
        }
        match self.engine.remove(&image.id).await {
            Ok(is_gone) => is_gone,
            Err(error) => {
                tracing::warn!(id = image.id, %error, "cannot remove an image that nothing needs");
                false
            }
        }
    }
}

/// What the service can be asked about; whoever labels images by hand keeps them.
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
