//! Readiness for builds: the engine responds, the disks have room, and stopped builds have ended.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::watch;

use crate::{
    engine::EngineInfo,
    engine_monitor::EngineMonitor,
    engine_support::{EngineSupport, Exceptions},
};

/// The readiness of a worker, shared with its jobs.
#[derive(Debug)]
pub(crate) struct Readiness {
    pub(crate) engine: EngineMonitor,
    exceptions: Exceptions,
    disk_full: AtomicBool,
    /// Number of builds that continue after their stop was requested.
    unconfirmed_stops: AtomicUsize,
}

/// A build that continues after its stop was requested; no other build starts meanwhile.
#[derive(Debug)]
pub(crate) struct UnconfirmedStop(Arc<Readiness>);

impl Readiness {
    pub(crate) fn new(engine: EngineInfo, exceptions: Exceptions) -> Self {
        Self {
            engine: EngineMonitor::new(engine),
            exceptions,
            disk_full: AtomicBool::new(false),
            unconfirmed_stops: AtomicUsize::new(0),
        }
    }

    /// Reports whether the engine responds and the disks have room.
    pub(crate) fn can_work(&self) -> bool {
        self.engine.answers() && !self.is_disk_full()
    }

    /// Returns the support for the engine, in its current version.
    pub(crate) fn support(&self) -> EngineSupport {
        EngineSupport::new(&self.engine_info().borrow(), &self.exceptions)
    }

    pub(crate) fn engine_info(&self) -> watch::Receiver<EngineInfo> {
        self.engine.info()
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        self.disk_full.load(Ordering::Relaxed)
    }

    /// Sets whether a disk is nearly full; returns the previous value.
    pub(crate) fn set_disk_full(&self, full: bool) -> bool {
        self.disk_full.swap(full, Ordering::Relaxed)
    }

    pub(crate) fn has_unconfirmed_stops(&self) -> bool {
        self.unconfirmed_stops.load(Ordering::Relaxed) > 0
    }
}

impl UnconfirmedStop {
    pub(crate) fn new(readiness: &Arc<Readiness>) -> Self {
        readiness.unconfirmed_stops.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(readiness))
    }
}

impl Drop for UnconfirmedStop {
    fn drop(&mut self) {
        self.0.unconfirmed_stops.fetch_sub(1, Ordering::Relaxed);
    }
}
