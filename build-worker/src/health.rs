//! Whether the worker can work: its engine answers and is supported, and its disks have room. While one of them is not so, it
//! takes no builds and its health is NOT_SERVING.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::time::sleep;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    engine::{Engine, EngineInfo},
    readiness::Readiness,
};

/// Looks after a worker's health.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) engine: Arc<dyn Engine>,
    /// The directory of the spool, on whose file system there has to be room.
    pub(crate) spool: PathBuf,
    /// The directory that the engine keeps its images in, where the operator names it.
    pub(crate) images: Option<PathBuf>,
    /// Whether the engine's directories are on this host.
    pub(crate) is_local: bool,
    /// How many bytes of room.
    pub(crate) min_free: u64,
    pub(crate) reporter: HealthReporter,
}

impl Health {
    const EVERY: Duration = Duration::from_secs(1);
    /// The directory of a containerd that was not started by the engine.
    const CONTAINERD: &str = "/var/lib/containerd";

    /// Looks again and again, and tells the worker's readiness and whoever asks for its health.
    pub(crate) async fn watch(&self, readiness: &Readiness) {
        let mut served = None;
        let mut told = None;
        loop {
            // While it is suspected already, others ask it.
            if readiness.engine.answers() && !readiness.engine.ask(self.engine.as_ref()).await {
                readiness.engine.suspect();
            }
            let directories = self.directories(&readiness.engine_info().borrow());
            let full = self.full(&directories);
            if readiness.set_disk_full(full.is_some()) != full.is_some() {
                match full {
                    Some((directory, free)) => tracing::error!(
                        directory = %directory.display(), free, min_free = self.min_free,
                        "the disk is nearly full; no build is begun meanwhile"
                    ),
                    None => tracing::info!("the disk has room again"),
                }
            }
            let support = readiness.support();
            if told.as_ref() != Some(&support) {
                support.log();
                told = Some(support.clone());
            }
            let serves = readiness.can_work() && support.unsupported.is_none();
            if served != Some(serves) {
                let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
                self.reporter.set_service_status("", status).await;
                served = Some(serves);
            }
            sleep(Self::EVERY).await;
        }
    }

    /// Returns the directories on whose file systems there has to be room.
    fn directories(&self, engine: &EngineInfo) -> Vec<PathBuf> {
        let mut directories = vec![self.spool.clone()];
        match &self.images {
            Some(images) => directories.push(images.clone()),
            None if self.is_local => {
                directories.push(PathBuf::from(&engine.root));
                // The engine does not tell where its containerd keeps the images; one of its own has them below its root.
                if engine.has_containerd_store {
                    directories.push(PathBuf::from(Self::CONTAINERD));
                }
            }
            None => {}
        }
        directories
    }

    /// Returns a directory that lacks room, and the bytes that are free there. One that cannot be asked does not count.
    fn full<'a>(&self, directories: &'a [PathBuf]) -> Option<(&'a PathBuf, u64)> {
        directories
            .iter()
            .filter_map(|directory| {
                let found = rustix::fs::statvfs(directory).ok()?;
                Some((directory, found.f_bavail.saturating_mul(found.f_frsize)))
            })
            .find(|(_, free)| *free < self.min_free)
    }
}
