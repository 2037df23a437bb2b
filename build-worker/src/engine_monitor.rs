//! Monitoring of the Docker Engine. While it does not respond, no build starts.
//!
//! Therefore a restart of the engine costs each build that was running one failure, and no other build any.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use crate::{
    engine::{Engine, EngineInfo},
    step_processes::StepProcesses,
};

/// The last known state of the engine; it responded when the worker started.
#[derive(Debug)]
pub(crate) struct EngineMonitor {
    info: watch::Sender<EngineInfo>,
    answers: AtomicBool,
    answered: Notify,
    suspected: Notify,
}

impl EngineMonitor {
    const POLL: Duration = Duration::from_secs(1);
    const TIMEOUT: Duration = Duration::from_secs(5);

    pub(crate) fn new(info: EngineInfo) -> Self {
        Self {
            info: watch::Sender::new(info),
            answers: AtomicBool::new(true),
            answered: Notify::new(),
            suspected: Notify::new(),
        }
    }

    /// Returns the engine's description of itself, which changes when another version takes its place.
    pub(crate) fn info(&self) -> watch::Receiver<EngineInfo> {
        self.info.subscribe()
    }

    /// Marks the engine as suspect after a failure that may be its fault.
    ///
    /// It does not count as responding until it has been probed.
    pub(crate) fn suspect(&self) {
        self.answers.store(false, Ordering::Release);
        self.suspected.notify_one();
    }

    pub(crate) fn answers(&self) -> bool {
        self.answers.load(Ordering::Acquire)
    }

    /// Waits until the engine responds.
    pub(crate) async fn answering(&self) {
        loop {
            let answered = self.answered.notified();
            if self.answers() {
                return;
            }
            answered.await;
        }
    }

    /// Probes the engine and its image store, and reports whether both respond in time.
    pub(crate) async fn probe(&self, engine: &dyn Engine) -> bool {
        match tokio::time::timeout(Self::TIMEOUT, engine.info()).await {
            Ok(Ok(info)) => {
                self.info.send_if_modified(|known| {
                    let is_new = *known != info;
                    *known = info;
                    is_new
                });
                true
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "the Docker Engine responds with errors");
                false
            }
            Err(_) => false,
        }
    }

    /// Probes the engine whenever it is suspect, until it responds and its orphans have ended.
    pub(crate) async fn run(&self, engine: &dyn Engine, processes: impl Fn() -> Option<StepProcesses>) {
        let end_orphans = async || {
            if let Some(processes) = processes() {
                processes.end_orphans().await;
            }
        };
        loop {
            self.suspected.notified().await;
            let mut was_away = false;
            while !self.probe(engine).await {
                if !was_away {
                    tracing::warn!(
                        "the Docker Engine or its image store does not respond; no build starts meanwhile"
                    );
                }
                was_away = true;
                end_orphans().await;
                tokio::time::sleep(Self::POLL).await;
            }
            if was_away {
                tracing::info!("the Docker Engine and its image store are available again");
            }
            end_orphans().await;
            self.answers.store(true, Ordering::Release);
            self.answered.notify_waiters();
        }
    }
}
