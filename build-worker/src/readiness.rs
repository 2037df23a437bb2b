//! Whether builds can be begun here: the engine answers, the disks have room, and what was to stop has stopped.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::watch;

use crate::{
    engine::EngineInfo,
    engine_support::{EngineSupport, Exceptions},
    engine_watch::EngineWatch,
};

/// What is known of it, shared by the worker and its jobs.
#[derive(Debug)]
pub(crate) struct Readiness {
    pub(crate) engine: EngineWatch,
    exceptions: Exceptions,
    disk_full: AtomicBool,
    /// How many builds were to stop and have not.
    doubts: AtomicUsize,
}

/// A build that was to stop and has not: no other is begun meanwhile.
#[derive(Debug)]
pub(crate) struct Doubt(Arc<Readiness>);

impl Readiness {
    pub(crate) fn new(engine: EngineInfo, exceptions: Exceptions) -> Self {
        Self {
            engine: EngineWatch::new(engine),
            exceptions,
            disk_full: AtomicBool::new(false),
            doubts: AtomicUsize::new(0),
        }
    }

    /// Returns whether there is what builds need: an engine that answers, and room on the disks.
    pub(crate) fn can_work(&self) -> bool {
        self.engine.answers() && !self.is_disk_full()
    }

    /// Returns what the engine is good for, in its present version.
    pub(crate) fn support(&self) -> EngineSupport {
        EngineSupport::new(&self.engine_info().borrow(), &self.exceptions)
    }

    pub(crate) fn engine_info(&self) -> watch::Receiver<EngineInfo> {
        self.engine.info()
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        self.disk_full.load(Ordering::Relaxed)
    }

    /// Notes whether a disk is nearly full; whether one was.
    pub(crate) fn set_disk_full(&self, full: bool) -> bool {
        self.disk_full.swap(full, Ordering::Relaxed)
    }

    pub(crate) fn has_doubts(&self) -> bool {
        self.doubts.load(Ordering::Relaxed) > 0
    }
}

impl Doubt {
    pub(crate) fn of(readiness: &Arc<Readiness>) -> Self {
        readiness.doubts.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(readiness))
    }
}

impl Drop for Doubt {
    fn drop(&mut self) {
        self.0.doubts.fetch_sub(1, Ordering::Relaxed);
    }
}
