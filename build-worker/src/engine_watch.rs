//! Watches whether the Docker Engine answers: while it does not, no build is begun, so that an engine that is restarted costs
//! the builds that were running one failure, and the others none.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use crate::{
    engine::{Engine, EngineInfo},
    orphans,
    step_processes::StepProcesses,
};

/// The engine as it was last seen; it answered when the worker began.
#[derive(Debug)]
pub(crate) struct EngineWatch {
    info: watch::Sender<EngineInfo>,
    answers: AtomicBool,
    answered: Notify,
    suspected: Notify,
}

impl EngineWatch {
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

    /// Returns the engine's description of itself; it changes when another version takes its place.
    pub(crate) fn info(&self) -> watch::Receiver<EngineInfo> {
        self.info.subscribe()
    }

    /// Notes that something has failed that may be the engine's fault: it does not count as answering until it was asked.
    pub(crate) fn suspect(&self) {
        self.answers.store(false, Ordering::Release);
        self.suspected.notify_one();
    }

    pub(crate) fn answers(&self) -> bool {
        self.answers.load(Ordering::Acquire)
    }

    /// Waits until the engine answers.
    pub(crate) async fn answering(&self) {
        loop {
            let answered = self.answered.notified();
            if self.answers() {
                return;
            }
            answered.await;
        }
    }

    /// Asks the engine and its image store; whether both answer in time.
    pub(crate) async fn ask(&self, engine: &dyn Engine) -> bool {
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
                tracing::debug!(%error, "the Docker Engine does not answer well");
                false
            }
            Err(_) => false,
        }
    }

    /// Asks the engine whenever it is suspected, until it answers and what it has left behind is ended.
    pub(crate) async fn run(&self, engine: &dyn Engine, processes: impl Fn() -> Option<StepProcesses>) {
        let end_orphans = async || {
            if let Some(processes) = processes() {
                orphans::end(&processes).await;
            }
        };
        loop {
            self.suspected.notified().await;
            let mut was_away = false;
            while !self.ask(engine).await {
                if !was_away {
                    tracing::warn!(
                        "the Docker Engine or its image store does not answer; no build is begun meanwhile"
                    );
                }
                was_away = true;
                end_orphans().await;
                tokio::time::sleep(Self::POLL).await;
            }
            if was_away {
                tracing::info!("the Docker Engine and its image store answer again");
            }
            end_orphans().await;
            self.answers.store(true, Ordering::Release);
            self.answered.notify_waiters();
        }
    }
}
