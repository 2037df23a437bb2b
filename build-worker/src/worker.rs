//! The worker: the attempts that it holds, and how they begin and end.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use proto::dispatch::{Assignment, Attempt, HandedBack, Report, report_event::Event};
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{
    artifact_audit,
    base_images::BaseImages,
    config::Config,
    engine::{Engine, EngineInfo},
    image_gc::ImageGc,
    job::{Control, Job, StopReason},
    jobs::{Held, Jobs},
    lease::Lease,
    outbox::{Outbox, Settings},
    readiness::Readiness,
    registry_credentials::DockerConfig,
    remote_context::RemoteContexts,
    service_client::ServiceClient,
    session,
    source_rules::SourceRules,
    stale_tags,
    step_processes::{StepGroup, StepProcesses},
    steps::StepsUnderWay,
    surroundings::{Spawn, Surroundings},
    telemetry,
};

/// The state of a worker's process.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) config: Config,
    /// ID of this process, for the service.
    pub(crate) instance: String,
    pub(crate) lease: Lease,
    /// Signal that an outbox has something to send.
    pub(crate) reports_ready: Arc<Notify>,
    pub(crate) service: Arc<dyn ServiceClient>,
    spawn: Arc<dyn Spawn>,
    engine: Arc<dyn Engine>,
    pub(crate) readiness: Arc<Readiness>,
    steps: StepsUnderWay,
    is_local: bool,
    /// Set once a process of a step was seen.
    seen: Arc<AtomicBool>,
    /// Set once the steps that predecessors have left were ended.
    swept: AtomicBool,
    outbox_settings: Settings,
    jobs: Arc<Jobs>,
    tasks: TaskTracker,
    /// Token that ends the tasks still running after the shutdown.
    ended: CancellationToken,
    /// Slots for concurrent builds.
    ///
    /// A job that ends frees its slot after the service has freed it, so the next job may have to wait for a
    /// moment.
    slots: Arc<Semaphore>,
    /// Turn among the attempts, so that each of them gets to report.
    turn: AtomicUsize,
    pub(crate) image_gc: ImageGc,
    source_rules: Arc<SourceRules>,
    pub(crate) remotes: Arc<RemoteContexts>,
    docker_config: DockerConfig,
    draining: AtomicBool,
    draining_begun: Notify,
}

impl Worker {
    const FIRST_PAUSE: Duration = Duration::from_millis(100);
    const LONGEST_PAUSE: Duration = Duration::from_secs(5);
    /// Maximum time for the service to hear that no more builds are taken.
    const LAST_ASSIGNMENTS: Duration = Duration::from_secs(2);
    /// Maximum time for reports to become durable at the very end.
    const LAST_REPORTS: Duration = Duration::from_secs(10);

    pub(crate) fn new(config: Config, info: EngineInfo, surroundings: Surroundings) -> Self {
        let Surroundings { engine, is_local, outbox, remotes, service, spawn } = surroundings;
        let image_gc = ImageGc {
            worker: config.name.clone(),
            engine: Arc::clone(&engine),
            service: Arc::clone(&service),
            records: Arc::default(),
            bases: Arc::new(BaseImages::new(Arc::clone(&engine), &config.name, config.keep_bases)),
            catalogue: Mutex::default(),
            replaced: Arc::default(),
            every: config.collect_every,
        };
        let slots = Arc::new(Semaphore::new(usize::from(config.slots)));
        telemetry::slots(config.slots, &slots);
        Self {
            docker_config: DockerConfig::new(config.docker_config()),
            outbox_settings: outbox,
            is_local,
            seen: Arc::default(),
            swept: AtomicBool::new(false),
            instance: Uuid::new_v4().to_string(),
            lease: Lease::new(),
            reports_ready: Arc::new(Notify::new()),
            engine,
            service,
            spawn,
            image_gc,
            source_rules: Arc::new(config.source_rules()),
            remotes: Arc::new(remotes),
            readiness: Arc::new(Readiness::new(info, config.exceptions())),
            steps: StepsUnderWay::default(),
            jobs: Arc::new(Jobs::default()),
            tasks: TaskTracker::new(),
            ended: CancellationToken::new(),
            slots,
            config,
            turn: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            draining_begun: Notify::new(),
        }
    }

    /// Serves builds until `shutdown`, and then drains.
    ///
    /// Running builds may finish within the grace period; the rest is handed back.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = self.readiness.engine.run(self.engine.as_ref(), || self.step_processes()) => {}
            () = self.begin() => {}
            () = Box::pin(self.image_gc.run()) => {}
            () = Box::pin(self.audit_artifacts()) => {}
            () = self.drain(shutdown) => {}
        }
        self.tasks.close();
        if tokio::time::timeout(Self::LAST_REPORTS, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                "some builds did not end in time; the engine stops them when their connections close"
            );
            self.ended.cancel();
            self.tasks.wait().await;
        }
    }

    async fn audit_artifacts(&self) {
        let (engine, service) = (self.engine.as_ref(), self.service.as_ref());
        let (name, interval) = (&self.config.name, self.config.collect_every);
        artifact_audit::run(engine, service, name, interval, || self.image_gc.catalogue()).await;
    }

    /// Ends and removes what predecessors have left behind, and then serves.
    async fn begin(&self) {
        if let Some(processes) = self.step_processes() {
            processes.end_orphans().await;
        }
        stale_tags::remove(self.engine.as_ref(), &self.config.name).await;
        self.stay_connected().await;
    }

    /// Connects to the service, again and again with a growing pause.
    async fn stay_connected(&self) {
        let mut pause = Self::FIRST_PAUSE;
        loop {
            let mut was_welcome = false;
            let mut given_up = self.jobs.given_up();
            let mut engine = self.readiness.engine_info();
            let ended = tokio::select! {
                biased;
                ended = session::connect(self, || was_welcome = true) => ended,
                // The service must hear that nothing is held any more.
                () = self.keep_lease() => Ok(()),
                // The sender is in `self`, so the channel cannot be closed.
                _ = given_up.changed() => Ok(()),
                // The service must hear of the abilities of a different engine.
                _ = engine.changed() => Ok(()),
            };
            if let Err(error) = ended {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, source, "the connection to image-service ended");
            }
            pause = if was_welcome { Self::FIRST_PAUSE } else { (pause * 2).min(Self::LONGEST_PAUSE) };
            tokio::select! {
                biased;
                () = self.keep_lease() => {}
                () = tokio::time::sleep(pause) => {}
            }
            // A worker that claims not to hold an attempt must not be working on it.
            let none_is_fenced = self.jobs.until(|held| held.values().all(|held| !held.is_fenced()));
            tokio::pin!(none_is_fenced);
            loop {
                tokio::select! {
                    biased;
                    () = &mut none_is_fenced => break,
                    () = self.keep_lease() => {}
                }
            }
        }
    }

    /// Stops all work when the lease expires, because the service may then give it to other workers.
    ///
    /// Returns once there was work to stop.
    async fn keep_lease(&self) {
        loop {
            self.lease.over().await;
            let all = self.jobs.all();
            for (attempt, held) in &all {
                tracing::warn!(build = attempt.build_id, "the lease has expired; stopping");
                held.fence();
            }
            if !all.is_empty() {
                return;
            }
        }
    }

    async fn drain(&self, shutdown: CancellationToken) {
        shutdown.cancelled().await;
        self.draining.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        self.draining_begun.notify_one();
        // After the service has acknowledged the heartbeat, no more assignments are on the way.
        if tokio::time::timeout(Self::LAST_ASSIGNMENTS, self.lease.extended_after(begun)).await.is_err() {
            tracing::warn!("cannot report to the service that this worker is shutting down");
        }
        let emptied = || self.jobs.until(BTreeMap::is_empty);
        if tokio::time::timeout(self.config.drain_grace, emptied()).await.is_ok() {
            return;
        }
        for (_, held) in self.jobs.all() {
            held.control.stop(StopReason::HandBack);
        }
        if tokio::time::timeout(Self::LAST_REPORTS, emptied()).await.is_err() {
            tracing::warn!("some reports could not be delivered; the service notices when the lease expires");
            for (_, held) in self.jobs.all() {
                held.outbox.drop_all();
            }
        }
    }

    /// Waits until draining begins; completes once.
    pub(crate) async fn draining_begun(&self) {
        self.draining_begun.notified().await;
    }

    /// Kills the steps that a predecessor of the same name has left, once per process.
    ///
    /// An engine may go on with a build whose worker was killed while it started a step. Must be called after
    /// the service has accepted this process, because then no other process of the name is at work.
    pub(crate) async fn sweep(&self) {
        let is_first = !self.swept.swap(true, Ordering::Relaxed);
        let Some(processes) = self.step_processes().filter(|_| is_first && self.jobs.all().is_empty()) else {
            return;
        };
        match tokio::task::spawn_blocking(move || processes.kill_all()).await.map_err(std::io::Error::other) {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => {
                tracing::warn!(count, "killed orphaned processes of an earlier worker")
            }
            Ok(Err(error)) | Err(error) => {
                tracing::warn!(%error, "cannot kill orphaned processes of an earlier worker");
            }
        }
    }

    /// Returns the control group below which steps run on the current engine.
    fn step_group(&self) -> StepGroup {
        let engine = self.readiness.engine_info();
        StepGroup::new(&self.config.cgroup_parent, &self.config.name, &engine.borrow().id)
    }

    /// Returns a view of the processes of steps, or `None` if they are not on this host.
    fn step_processes(&self) -> Option<StepProcesses> {
        self.is_local.then(|| StepProcesses::new(self.step_group(), Arc::clone(&self.seen)))
    }

    /// Reports whether the worker takes more builds.
    pub(crate) fn takes_builds(&self) -> bool {
        !self.is_draining() && self.readiness.can_work() && !self.readiness.has_unconfirmed_stops()
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Starts an attempt as soon as a slot is free, or hands it back while draining.
    pub(crate) fn accept(&self, assignment: Assignment) {
        let Some(attempt) = assignment.attempt.clone() else {
            tracing::warn!("received an assignment without an attempt");
            return;
        };
        let held = Held {
            outbox: Arc::new(Outbox::new(
                attempt.clone(),
                self.outbox_settings.clone(),
                Arc::clone(&self.reports_ready),
            )),
            control: Arc::new(Control::default()),
        };
        let Some(entry) = self.jobs.insert(attempt.clone(), held.clone()) else {
            // The assignment was repeated; or a service that was restored from a backup has reused the number
            // of an attempt that still stops here.
            if self.held(&attempt).is_some_and(|held| held.is_fenced()) {
                self.give_up(&attempt);
            }
            return;
        };
        tracing::info!(build = attempt.build_id, attempt = attempt.number, "a build was assigned");
        if self.is_draining() {
            self.spawn(async move {
                let reason = "the worker is shutting down".to_owned();
                held.outbox.push(None, Event::HandedBack(HandedBack { reason, base: None })).await;
                held.outbox.flushed().await;
                drop(entry);
            });
            return;
        }
        let job = Job {
            assignment,
            worker: self.config.name.clone(),
            catalogue: self.image_gc.catalogue(),
            engine: Arc::clone(&self.engine),
            outbox: held.outbox,
            control: held.control,
            readiness: Arc::clone(&self.readiness),
            service: Arc::clone(&self.service),
            spool: Arc::clone(&self.outbox_settings.spool),
            remotes: Arc::clone(&self.remotes),
            secrets: self.config.secrets(),
            steps: self.steps.clone(),
            group: self.step_group(),
            processes: self.step_processes(),
            bases: Arc::clone(&self.image_gc.bases),
            source_rules: Arc::clone(&self.source_rules),
            proxies: self.docker_config.proxy_arguments(&self.config.docker_host),
            compression: self.config.compression.clone().unwrap_or_default(),
            log_limit: self.config.log_limit,
            stop_timeout: self.lease.stop_timeout(),
            begin_by: self.lease.end(),
        };
        let slots = Arc::clone(&self.slots);
        let records = Arc::clone(&self.image_gc.records);
        let replaced = Arc::clone(&self.image_gc.replaced);
        self.spawn(async move {
            if let Some(image) = entry.run(&job, &slots, &records).await {
                replaced.add(image);
            }
        });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task = self.ended.clone().run_until_cancelled_owned(task);
        self.spawn.spawn(Box::pin(self.tasks.track_future(async move {
            task.await;
        })));
    }

    /// Fences an attempt that the service has withdrawn or given to another worker.
    pub(crate) fn fence(&self, attempt: &Attempt) {
        if let Some(held) = self.held(attempt) {
            held.fence();
        }
    }

    /// Gives up an attempt that the service wants but that cannot go on.
    pub(crate) fn give_up(&self, attempt: &Attempt) {
        self.jobs.give_up(attempt);
    }

    pub(crate) fn held(&self, attempt: &Attempt) -> Option<Held> {
        self.jobs.held().get(attempt).cloned()
    }

    /// Returns the attempts that the service may still want.
    pub(crate) fn holds(&self) -> Vec<Attempt> {
        self.jobs
            .all()
            .into_iter()
            .filter(|(_, held)| !held.is_fenced())
            .map(|(attempt, _)| attempt)
            .collect()
    }

    /// Returns the next report of any attempt, in turn.
    pub(crate) fn next_report(&self) -> Option<Report> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let held = self.jobs.held();
        let begin = turn.checked_rem(held.len())?;
        held.values().cycle().skip(begin).take(held.len()).find_map(|held| held.outbox.next_report())
    }
}
