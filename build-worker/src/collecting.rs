//! Removes the images of this worker that neither a record nor a container needs any more.
//!
//! What is needed the service says, which knows of a build only what was reported. So nothing of a record is removed while one
//! of its builds is at work here, and none is begun between the answer and the removal.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use proto::dispatch::HeldImage;
use tokio::sync::{Notify, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};
use uuid::Uuid;

use crate::{
    dial::{Dial, DialError},
    engine::{Engine, EngineError},
    labels::{CATALOGUE_LABEL, IMAGE_LABEL, WORKER_LABEL},
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

/// What collecting needs.
#[derive(Debug)]
pub(crate) struct Collector {
    pub(crate) worker: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) records: Arc<Records>,
    /// Names the catalogue; empty until it is known.
    pub(crate) catalogue: watch::Receiver<String>,
    /// A build has ended.
    pub(crate) ended: Arc<Notify>,
    pub(crate) every: Duration,
}

/// Why nothing was collected.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the service does not say what is needed")]
    Service(#[from] DialError),
}

impl Collector {
    /// How soon after one time there may be another.
    const PAUSE: Duration = Duration::from_secs(1);
    /// How many images the service is asked about at once.
    const AT_ONCE: usize = 500;

    /// Looks again and again, and whenever a build has ended.
    pub(crate) async fn run(&self) {
        loop {
            let _ = tokio::time::timeout(self.every, self.ended.notified()).await;
            tokio::time::sleep(Self::PAUSE.min(self.every)).await;
            let catalogue = self.catalogue.borrow().clone();
            // A service of an earlier version gives no name.
            if catalogue.is_empty() {
                continue;
            }
            if let Err(error) = self.collect(&catalogue).await {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, source, "cannot look for images that nothing needs");
            }
        }
    }

    async fn collect(&self, catalogue: &str) -> Result<(), CollectError> {
        let ours = [(WORKER_LABEL, self.worker.as_str()), (CATALOGUE_LABEL, catalogue)];
        let mut held = Vec::new();
        for image in self.engine.labelled(&ours).await? {
            // Whoever labels images by hand keeps them.
            let record = image.labels.get(IMAGE_LABEL).filter(|record| Uuid::try_parse(record).is_ok());
            held.extend(
                record
                    .map(|record| HeldImage { image_id: record.clone(), engine_image_id: image.id.clone() }),
            );
        }
        for held in held.chunks(Self::AT_ONCE) {
            let mut laid_hold_of = BTreeMap::new();
            for image in held {
                if !laid_hold_of.contains_key(&image.image_id) {
                    laid_hold_of.insert(&image.image_id, self.records.lay_hold_of(&image.image_id));
                }
            }
            let is_idle = |image: &&HeldImage| laid_hold_of.get(&image.image_id).is_some_and(Option::is_some);
            let idle: Vec<HeldImage> = held.iter().filter(is_idle).cloned().collect();
            if idle.is_empty() {
                continue;
            }
            for id in self.dial.find_unneeded(idle).await? {
                if self.engine.remove(&id).await? {
                    tracing::info!(id, "removed an image that nothing needs");
                }
            }
        }
        Ok(())
    }
}
