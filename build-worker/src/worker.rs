//! The worker: what it holds, and how that begins and ends.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use proto::dispatch::{Assignment, Attempt, HandedBack, Report, report_event::Event};
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    config::Config,
    docker::{Engine, EngineInfo},
    job::{Control, Job, StopReason},
    lease::Lease,
    outbox::Outbox,
    residue::StepProcesses,
    session,
    steps::StepsUnderWay,
};

/// Everything that lives as long as the worker's process.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) config: Config,
    pub(crate) engine_version: String,
    /// Names this process to the service.
    pub(crate) instance: String,
    pub(crate) lease: Lease,
    /// Some outbox has something to send.
    pub(crate) reports_ready: Arc<Notify>,
    engine: Engine,
    steps: StepsUnderWay,
    processes: Option<StepProcesses>,
    jobs: Arc<Jobs>,
    tasks: TaskTracker,
    draining: AtomicBool,
}

/// An attempt that this worker works on, or has reports of that are not durable.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) control: Arc<Control>,
}

#[derive(Debug, Default)]
struct Jobs {
    held: Mutex<HashMap<Attempt, Held>>,
    /// The last one has ended.
    empty: Notify,
}

impl Worker {
    const FIRST_PAUSE: Duration = Duration::from_millis(100);
    const LONGEST_PAUSE: Duration = Duration::from_secs(5);
    /// How long reports may take to become durable at the very end.
    const LAST_REPORTS: Duration = Duration::from_secs(10);

    pub(crate) fn new(config: Config, engine: Engine, info: EngineInfo) -> Self {
        Self {
            processes: engine.is_local().then(|| StepProcesses::of(info.root)),
            config,
            engine_version: info.version,
            instance: Uuid::new_v4().to_string(),
            lease: Lease::new(),
            reports_ready: Arc::new(Notify::new()),
            engine,
            steps: StepsUnderWay::default(),
            jobs: Arc::new(Jobs::default()),
            tasks: TaskTracker::new(),
            draining: AtomicBool::new(false),
        }
    }

    /// Serves builds until shutdown; then finishes what runs within the grace, and hands back the rest.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        tokio::select! {
            () = self.stay_connected() => {}
            () = self.keep_lease() => {}
            () = self.drain(shutdown) => {}
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Connects again and again, with a growing pause.
    async fn stay_connected(&self) {
        let mut pause = Self::FIRST_PAUSE;
        loop {
            let mut was_welcome = false;
            let ended = session::connect(self, || was_welcome = true).await;
            if let Err(error) = ended {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, source, "the connection to image-service ended");
            }
            pause = if was_welcome { Self::FIRST_PAUSE } else { (pause * 2).min(Self::LONGEST_PAUSE) };
            tokio::time::sleep(pause).await;
        }
    }

    /// Stops all work whenever the service has not been heard of for too long: it may have given it to others.
    async fn keep_lease(&self) {
        loop {
            self.lease.over().await;
            for (attempt, held) in self.jobs.all() {
                tracing::warn!(build = attempt.build_id, "the lease is over; stopping");
                held.outbox.drop_all();
                held.control.stop(StopReason::Fenced);
            }
        }
    }

    async fn drain(&self, shutdown: CancellationToken) {
        shutdown.cancelled().await;
        self.draining.store(true, Ordering::Relaxed);
        if tokio::time::timeout(self.config.drain_grace, self.jobs.emptied()).await.is_ok() {
            return;
        }
        for (_, held) in self.jobs.all() {
            held.control.stop(StopReason::HandBack);
        }
        if tokio::time::timeout(Self::LAST_REPORTS, self.jobs.emptied()).await.is_err() {
            tracing::warn!("some reports could not be delivered; the service will find out by the lease");
            for (_, held) in self.jobs.all() {
                held.outbox.drop_all();
            }
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Begins an attempt, or hands it back when there is no room.
    pub(crate) fn accept(&self, assignment: Assignment) {
        let Some(attempt) = assignment.attempt.clone() else {
            tracing::warn!("an assignment without an attempt");
            return;
        };
        let held = Held {
            outbox: Arc::new(Outbox::new(attempt.clone(), Arc::clone(&self.reports_ready))),
            control: Arc::new(Control::default()),
        };
        let has_room = match self.jobs.insert(attempt.clone(), held.clone()) {
            // The assignment came twice.
            None => return,
            Some(count) => count <= usize::from(self.config.slots) && !self.is_draining(),
        };
        tracing::info!(build = attempt.build_id, attempt = attempt.number, has_room, "a build was assigned");
        let jobs = Arc::clone(&self.jobs);
        if has_room {
            let job = Job {
                assignment,
                engine: self.engine.clone(),
                outbox: held.outbox,
                control: held.control,
                steps: self.steps.clone(),
                processes: self.processes.clone(),
                log_limit: self.config.log_limit,
                stop_limit: self.lease.stop_limit(),
            };
            self.tasks.spawn(async move {
                job.run().await;
                jobs.remove(&attempt);
            });
        } else {
            self.tasks.spawn(async move {
                let reason = "the worker has no free slot".to_owned();
                held.outbox.push(None, Event::HandedBack(HandedBack { reason })).await;
                held.outbox.settled().await;
                jobs.remove(&attempt);
            });
        }
    }

    /// The service gives this attempt to nobody, or to somebody else.
    pub(crate) fn fence(&self, attempt: &Attempt) {
        if let Some(held) = self.held(attempt) {
            held.outbox.drop_all();
            held.control.stop(StopReason::Fenced);
        }
    }

    pub(crate) fn held(&self, attempt: &Attempt) -> Option<Held> {
        self.jobs.held().get(attempt).cloned()
    }

    /// The attempts that the service may still want.
    pub(crate) fn holds(&self) -> Vec<Attempt> {
        self.jobs
            .all()
            .into_iter()
            .filter(|(_, held)| !held.control.is_fenced())
            .map(|(attempt, _)| attempt)
            .collect()
    }

    /// The next report of any attempt.
    pub(crate) fn next_report(&self) -> Option<Report> {
        self.jobs.held().values().find_map(|held| held.outbox.next_report())
    }
}

impl Jobs {
    /// Adds an attempt; answers how many there are then, or `None` when it was there already.
    fn insert(&self, attempt: Attempt, job: Held) -> Option<usize> {
        let mut held = self.held();
        if held.contains_key(&attempt) {
            return None;
        }
        held.insert(attempt, job);
        Some(held.len())
    }

    fn remove(&self, attempt: &Attempt) {
        let mut held = self.held();
        held.remove(attempt);
        if held.is_empty() {
            self.empty.notify_waiters();
        }
    }

    fn all(&self) -> Vec<(Attempt, Held)> {
        let held = self.held();
        held.iter().map(|(attempt, job)| (attempt.clone(), job.clone())).collect()
    }

    async fn emptied(&self) {
        loop {
            let empty = self.empty.notified();
            if self.held().is_empty() {
                return;
            }
            empty.await;
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Attempt, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
