//! Whether the worker can work: its engine answers and its disks have room. While one of them is not so, it takes no builds
//! and its health is NOT_SERVING.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{engine::Engine, readiness::Readiness};

/// Looks after a worker's health.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) engine: Arc<dyn Engine>,
    /// The directories on whose file systems there has to be room.
    pub(crate) directories: Vec<PathBuf>,
    /// How many bytes of room.
    pub(crate) min_free: u64,
    pub(crate) reporter: HealthReporter,
}

impl Health {
    const EVERY: Duration = Duration::from_secs(1);
    const PATIENCE: Duration = Duration::from_secs(5);

    /// Looks again and again, and tells the worker's readiness and whoever asks for its health.
    pub(crate) async fn watch(&self, readiness: &Readiness) {
        let mut served = None;
        loop {
            // While it is suspected already, others ask it.
            if readiness.engine.answers()
                && !matches!(timeout(Self::PATIENCE, self.engine.info()).await, Ok(Ok(_)))
            {
                readiness.engine.suspect();
            }
            let full = self.full();
            if readiness.set_disk_full(full.is_some()) != full.is_some() {
                match full {
                    Some((directory, free)) => tracing::error!(
                        directory = %directory.display(), free, min_free = self.min_free,
                        "the disk is nearly full; no build is begun meanwhile"
                    ),
                    None => tracing::info!("the disk has room again"),
                }
            }
            let serves = readiness.can_work();
            if served != Some(serves) {
                let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
                self.reporter.set_service_status("", status).await;
                served = Some(serves);
            }
            sleep(Self::EVERY).await;
        }
    }

    /// A directory that lacks room, and how many bytes are free there. What cannot be asked does not count.
    fn full(&self) -> Option<(&PathBuf, u64)> {
        self.directories
            .iter()
            .filter_map(|directory| {
                let found = rustix::fs::statvfs(directory).ok()?;
                Some((directory, found.f_bavail.saturating_mul(found.f_frsize)))
            })
            .find(|(_, free)| *free < self.min_free)
    }
}
