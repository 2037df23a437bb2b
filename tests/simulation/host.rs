//! The host of a worker: its process, its engine, and its link to the service.

use std::{
    fmt::{self, Write as _},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use build_worker::simulation::{self as worker, Answers, EngineObserver, ModelEngine, Plan};
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use proto::dispatch::{ConnectRequest, connect_response::Message as FromService};
use tokio::{
    sync::{Notify, mpsc},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    process::Process,
    rules::split,
    world::{Fault, SLOTS, World, lock, zone_of},
};

/// The host of a worker.
#[derive(Debug)]
pub(crate) struct Host {
    name: &'static str,
    world: Arc<World>,
    pub(crate) engine: ModelEngine,
    pub(crate) process: Mutex<Process>,
    pub(crate) shutdown: Mutex<CancellationToken>,
    /// Stalls of the link in either direction, which delay messages but lose none.
    pub(crate) to_service: Stalled,
    pub(crate) to_worker: Stalled,
    /// Cancelled when the connections break, and renewed when they can be made again.
    pub(crate) cut: Mutex<Option<CancellationToken>>,
}

/// A stall of a link in one direction. Those who wait for its end continue in the order they came.
#[derive(Debug, Default)]
pub(crate) struct Stalled {
    is_stalled: AtomicBool,
    flows: Notify,
}

impl Stalled {
    pub(crate) fn set(&self, is_stalled: bool) {
        self.is_stalled.store(is_stalled, Ordering::Relaxed);
        if !is_stalled {
            self.flows.notify_waiters();
        }
    }

    async fn over(&self) {
        while self.is_stalled.load(Ordering::Relaxed) {
            self.flows.notified().await;
        }
    }
}

#[derive(Debug)]
struct OfEngine {
    world: Arc<World>,
    worker: &'static str,
}

/// A worker's process on its host.
#[derive(Debug)]
struct OfProcess {
    host: Arc<Host>,
    process: Process,
}

/// Returns the kind of a message.
fn kind_of(message: Option<&impl fmt::Debug>) -> String {
    let mut kind = Kind("the end".to_owned());
    if let Some(message) = message {
        kind.0.clear();
        // `Kind` fails once it has the name.
        let _ = write!(kind, "{message:?}");
    }
    kind.0
}

/// A writer that keeps the name of a variant and none of its content.
struct Kind(String);

impl fmt::Write for Kind {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let name = text.split(['(', '{', ' ']).next().unwrap_or_default();
        self.0.push_str(name);
        if name.len() < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

impl EngineObserver for OfEngine {
    fn plan(&self, name: &str) -> Plan {
        let (build, _) = split(name);
        self.world.plan(build)
    }

    fn cancel_delay(&self, name: &str) -> Option<Duration> {
        let is_stuck = self.world.with_random(|random| random.u8(0..25) == 0);
        let delay = Duration::from_secs(9);
        (is_stuck && !self.world.healed.is_cancelled()).then(|| {
            lock(&self.world.rules).get_stuck(name);
            self.world.note(Fault::EngineStuck, delay);
            delay
        })
    }

    fn tagged(&self, image: &str, name: &str) {
        self.world.count(("tagged", image, name));
        let is_helpless = self.world.is_helpless(self.worker);
        lock(&self.world.rules).tagged(image, name, is_helpless);
    }

    fn began(&self, name: &str) {
        self.world.count(("began", name));
        let is_helpless = self.world.is_helpless(self.worker);
        lock(&self.world.rules).began(name, self.worker, is_helpless);
    }

    fn ended(&self, name: &str) {
        self.world.count(("ended", name));
        lock(&self.world.rules).ended(name);
    }
}

impl Host {
    /// Returns a host on which a worker process runs.
    pub(crate) fn start_new(world: &Arc<World>, name: &'static str) -> Arc<Self> {
        let observer = Arc::new(OfEngine { world: Arc::clone(world), worker: name });
        let host = Arc::new(Self {
            name,
            world: Arc::clone(world),
            engine: ModelEngine::new(observer),
            process: Mutex::default(),
            shutdown: Mutex::default(),
            to_service: Stalled::default(),
            to_worker: Stalled::default(),
            cut: Mutex::new(Some(CancellationToken::new())),
        });
        host.start();
        host
    }

    /// Starts a process of the worker.
    pub(crate) fn start(self: &Arc<Self>) {
        let process = Process::default();
        let surroundings = Arc::new(OfProcess { host: Arc::clone(self), process: process.clone() });
        let shutdown = CancellationToken::new();
        let worker =
            worker::Process::new(self.name, SLOTS, vec![zone_of(self.name)], &self.engine, surroundings);
        process.spawn(worker.work(shutdown.clone()).boxed());
        *lock(&self.process) = process;
        *lock(&self.shutdown) = shutdown;
    }

    async fn travel(&self, direction: &Stalled) {
        direction.over().await;
        sleep(self.world.millis(1, 10)).await;
    }
}

impl worker::Surroundings for OfProcess {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.process.spawn(task);
    }

    fn connect(
        &self,
        mut requests: mpsc::Receiver<ConnectRequest>,
    ) -> BoxFuture<'_, Result<Answers, Status>> {
        async move {
            self.host.travel(&self.host.to_service).await;
            let unreachable = || Status::unavailable("nobody listens");
            let cut = lock(&self.host.cut).clone().ok_or_else(unreachable)?;
            let running = self.host.world.any_replica().ok_or_else(unreachable)?;
            let (to_service, from_worker) = mpsc::channel(4);
            let (connection, mut answers) =
                running.replica.connection(self.host.name, ReceiverStream::new(from_worker));
            running.process.spawn(connection);
            let (to_worker, from_service) = mpsc::channel(4);
            let (host, broken) = (Arc::clone(&self.host), cut.clone());
            tokio::spawn(broken.run_until_cancelled_owned(async move {
                loop {
                    let request = requests.recv().await;
                    host.travel(&host.to_service).await;
                    let message = request.as_ref().and_then(|request| request.message.as_ref());
                    host.world.count((host.name, "says", kind_of(message)));
                    host.world.mark_seen(host.name, message);
                    let Some(request) = request else { return };
                    if to_service.send(Ok(request)).await.is_err() {
                        return;
                    }
                }
            }));
            let host = Arc::clone(&self.host);
            tokio::spawn(cut.run_until_cancelled_owned(async move {
                loop {
                    let answer = answers.next().await;
                    host.travel(&host.to_worker).await;
                    let message = answer.as_ref().and_then(|answer| answer.as_ref().ok()?.message.as_ref());
                    host.world.count((host.name, "hears", kind_of(message)));
                    if let Some(FromService::ReportAck(ack)) = message {
                        lock(&host.world.rules).acknowledged(ack);
                    }
                    let Some(answer) = answer else { return };
                    if to_worker.send(answer).await.is_err() {
                        return;
                    }
                }
            }));
            Ok(ReceiverStream::new(from_service).boxed())
        }
        .boxed()
    }

    fn is_write_torn(&self) -> bool {
        self.host.world.is_spool_torn()
    }
}
