//! Health of the worker: its engine responds and is supported, and its disks have room.
//!
//! Otherwise the worker takes no builds and its health is `NOT_SERVING`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::time::sleep;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    engine::{Engine, EngineInfo},
    readiness::Readiness,
};

/// The health monitor of a worker.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) engine: Arc<dyn Engine>,
    /// Directory of the spool, whose file system needs free space.
    pub(crate) spool: PathBuf,
    /// Directory of the engine's images, if the operator names it.
    pub(crate) images: Option<PathBuf>,
    /// Set if the engine's directories are on this host.
    pub(crate) is_local: bool,
    /// Minimum free space, in bytes.
    pub(crate) min_free: u64,
    pub(crate) reporter: HealthReporter,
}

impl Health {
    const EVERY: Duration = Duration::from_secs(1);
    /// Data directory of a containerd that the engine did not start.
    const CONTAINERD: &str = "/var/lib/containerd";

    /// Checks the engine and the disks periodically; updates readiness and the health service.
    pub(crate) async fn watch(&self, readiness: &Readiness) {
        let mut served = None;
        let mut logged = None;
        loop {
            // While the engine is suspect, `EngineMonitor::run` probes it.
            if readiness.engine.answers() && !readiness.engine.probe(self.engine.as_ref()).await {
                readiness.engine.suspect();
            }
            let directories = self.directories(&readiness.engine_info().borrow());
            let full = self.full(&directories);
            if readiness.set_disk_full(full.is_some()) != full.is_some() {
                match full {
                    Some((directory, free)) => tracing::error!(
                        directory = %directory.display(), free, min_free = self.min_free,
                        "the disk is nearly full; no build starts meanwhile"
                    ),
                    None => tracing::info!("the disk has free space again"),
                }
            }
            let support = readiness.support();
            if logged.as_ref() != Some(&support) {
                support.log();
                logged = Some(support.clone());
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

    /// Returns the directories whose file systems need free space.
    fn directories(&self, engine: &EngineInfo) -> Vec<PathBuf> {
        let mut directories = vec![self.spool.clone()];
        match &self.images {
            Some(images) => directories.push(images.clone()),
            None if self.is_local => {
                directories.push(PathBuf::from(&engine.root));
                // The engine does not report where its containerd keeps the images; a containerd of its own
                // keeps them below its root.
                if engine.has_containerd_store {
                    directories.push(PathBuf::from(Self::CONTAINERD));
                }
            }
            None => {}
        }
        directories
    }

    /// Returns a directory without enough free space, and its free bytes.
    ///
    /// A directory that cannot be queried does not count.
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
