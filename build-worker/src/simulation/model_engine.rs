//! Model of a Docker Engine.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::dispatch::StepState;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    engine::{
        BuildOrder, BuiltImage, Configuration, Engine, EngineError, EngineEvent, EngineImage, EngineInfo,
        LabelledImage, Manifest, Progress, RunningWork,
    },
    reference,
};

/// The course of a build in the engine.
#[derive(Copy, Clone, Debug)]
pub struct Plan {
    /// Number of printed lines: `line 0`, `line 1`, …
    pub lines: u32,
    /// Duration of each line.
    pub pace: Duration,
    /// Outcome of the build.
    pub outcome: Outcome,
    /// Time until the build ends after a cancel, or after its connection has closed.
    pub dies_after: Duration,
}

/// The outcome of an undisturbed build.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Success, with the image of [`image_id`].
    Succeeds,
    /// Failure of a step.
    Fails,
    /// Success, with an image that its registry refuses.
    RefusesPush,
    /// Failure of the engine itself.
    Breaks,
    /// No end at all.
    Hangs,
}

/// An observer of the engine, which also plans its builds.
pub trait EngineObserver: Debug + Send + Sync {
    /// Returns the plan of a build with the name `<build>-<attempt>`.
    fn plan(&self, name: &str) -> Plan;
    /// Returns the time that a starting attempt continues after a cancel, if longer than planned.
    fn cancel_delay(&self, name: &str) -> Option<Duration>;
    /// Records that a build runs.
    fn began(&self, name: &str);
    /// Records that a build does not run any more.
    fn ended(&self, name: &str);
    /// Records that a worker names an image.
    fn tagged(&self, image: &str, name: &str);
}

/// A model of a Docker Engine.
#[derive(Clone, Debug)]
pub struct ModelEngine(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    observer: Arc<dyn EngineObserver>,
    /// Token that is cancelled when the engine dies; `None` while it is down.
    life: Option<CancellationToken>,
    is_suspended: bool,
    resumed: Arc<Notify>,
    images: BTreeMap<String, String>,
}

impl ModelEngine {
    const ANSWER: Duration = Duration::from_millis(3);

    /// Creates a running engine.
    pub fn new(observer: Arc<dyn EngineObserver>) -> Self {
        let life = Some(CancellationToken::new());
        Self(Arc::new(Mutex::new(State {
            observer,
            life,
            is_suspended: false,
            resumed: Arc::default(),
            images: BTreeMap::new(),
        })))
    }

    pub(super) fn info() -> EngineInfo {
        EngineInfo { id: "model".to_owned(), version: "29.7.3".to_owned(), ..EngineInfo::default() }
    }

    /// Kills the engine; its builds end.
    pub fn kill(&self) {
        if let Some(life) = self.state().life.take() {
            life.cancel();
        }
    }

    /// Starts the engine again.
    pub fn start(&self) {
        self.state().life.get_or_insert_default();
    }

    /// Suspends the engine: it does not respond until it is resumed, but its builds go on.
    pub fn suspend(&self) {
        self.state().is_suspended = true;
    }

    /// Resumes the engine.
    pub fn resume(&self) {
        let mut state = self.state();
        state.is_suspended = false;
        state.resumed.notify_waiters();
    }

    /// Returns the registry's answer to a push.
    fn pushed(&self, reference: &str) -> Result<(), EngineError> {
        let state = self.state();
        let name = state.images.get(reference).map(|id| build_name(id));
        let Some(name) = name else {
            return Err(EngineError::Refused(format!("there is no {reference}")));
        };
        match state.observer.plan(&name).outcome {
            Outcome::RefusesPush => Err(EngineError::Refused("denied".to_owned())),
            Outcome::Succeeds | Outcome::Fails | Outcome::Breaks | Outcome::Hangs => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn alive(&self) -> Result<(), EngineError> {
        tokio::time::sleep(Self::ANSWER).await;
        let resumed = Arc::clone(&self.state().resumed);
        loop {
            let resumed = resumed.notified();
            if !self.state().is_suspended {
                break;
            }
            resumed.await;
        }
        if self.state().life.is_some() { Ok(()) } else { Err(EngineError::Broken("it is away".to_owned())) }
    }
}

/// Returns the ID of the image that a build of this name makes, `<build ID>-<attempt>`.
pub fn image_id(build: &str) -> String {
    let (id, attempt) = build.rsplit_once('-').unwrap_or((build, ""));
    format!("sha256:{}{attempt:0>32}", id.replace('-', ""))
}

/// Returns the name of the build that has made the image with this ID.
pub fn build_name(image_id: &str) -> String {
    let digits = image_id.trim_start_matches("sha256:");
    let (id, attempt) = digits.split_at(digits.len().min(32));
    let id = uuid::Uuid::parse_str(id).unwrap_or_default();
    format!("{id}-{}", attempt.trim_start_matches('0'))
}

#[tonic::async_trait]
impl Engine for ModelEngine {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        self.alive().await?;
        Ok(Self::info())
    }

    fn build(&self, order: BuildOrder) -> Result<Box<dyn RunningWork>, EngineError> {
        let mut state = self.state();
        let life = state.life.clone().ok_or_else(|| EngineError::Broken("it is away".to_owned()))?;
        let cancel = CancellationToken::new();
        state.images.insert(order.tag.clone(), image_id(&order.name));
        let (sender, events) = mpsc::channel(4);
        let run = Run {
            name: order.name.clone(),
            plan: {
                let plan = state.observer.plan(&order.name);
                Plan {
                    dies_after: state.observer.cancel_delay(&order.name).unwrap_or(plan.dies_after),
                    ..plan
                }
            },
            observer: Arc::clone(&state.observer),
            events: sender,
        };
        tokio::spawn(run.run(life, cancel.clone()));
        Ok(Box::new(ModelWork { events, cancel, runs_processes: true }))
    }

    fn pull(&self, name: &str, _pinned: &str, _creator: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        Err(EngineError::Refused(format!("{name}: this model reaches no registry")))
    }

    fn push(&self, reference: &str, _creator: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (engine, reference) = (self.clone(), reference.to_owned());
        let cancel = CancellationToken::new();
        let (sender, events) = mpsc::channel(1);
        tokio::spawn(cancel.clone().run_until_cancelled_owned(async move {
            let pushed = engine.alive().await.and_then(|()| engine.pushed(&reference));
            if let Err(error) = pushed {
                // The receiver may be gone.
                let _ = sender.send(Err(error)).await;
            }
        }));
        Ok(Box::new(ModelWork { events, cancel, runs_processes: false }))
    }

    async fn registry_digest(&self, reference: &str, _creator: &str) -> Result<String, EngineError> {
        self.alive().await?;
        let digest = self.state().images.get(reference).cloned();
        digest.ok_or_else(|| EngineError::Refused(format!("{reference} is in no registry")))
    }

    async fn configuration(&self, name: &str) -> Result<Configuration, EngineError> {
        self.alive().await?;
        // Its images have no configurations but themselves.
        let id = self.state().images.get(name).cloned();
        let digest = id.ok_or_else(|| EngineError::Refused(format!("there is no {name}")))?;
        Ok(Configuration { digest, layers: Vec::new() })
    }

    async fn manifest(&self, _image: &EngineImage, _name: &str) -> Result<Manifest, EngineError> {
        self.alive().await?;
        Ok(Manifest::Only)
    }

    fn has_credentials(&self, _reference: &str) -> bool {
        false
    }

    async fn tag(&self, image: &str, name: &str) -> Result<(), EngineError> {
        let observer = Arc::clone(&self.state().observer);
        observer.tagged(image, name);
        self.alive().await?;
        self.state().images.insert(name.to_owned(), image.to_owned());
        Ok(())
    }

    async fn untag(&self, name: &str) -> Result<(), EngineError> {
        self.alive().await?;
        self.state().images.remove(name);
        Ok(())
    }

    async fn container_labels(
        &self,
        _container: &str,
    ) -> Result<Option<HashMap<String, String>>, EngineError> {
        self.alive().await?;
        Ok(None)
    }

    async fn commit(
        &self,
        container: &str,
        _name: &str,
        _labels: HashMap<String, String>,
    ) -> Result<String, EngineError> {
        Err(EngineError::Refused(format!("{container}: this model has no containers")))
    }

    async fn names(&self, _pattern: &str) -> Result<Vec<String>, EngineError> {
        self.alive().await?;
        Ok(Vec::new())
    }

    async fn labelled(&self, _labels: &[(&str, &str)]) -> Result<Vec<LabelledImage>, EngineError> {
        self.alive().await?;
        Ok(Vec::new())
    }

    async fn remove(&self, id: &str) -> Result<bool, EngineError> {
        self.alive().await?;
        self.state().images.retain(|_, image| image != id);
        Ok(true)
    }

    async fn image(&self, name: &str) -> Result<Option<EngineImage>, EngineError> {
        self.alive().await?;
        let state = self.state();
        Ok(state.images.get(name).map(|id| {
            // The digests that the image has in its registry, if it was pushed.
            let names = state.images.iter().filter(|(_, image)| *image == id);
            let repo_digests = names.map(|(name, id)| format!("{}@{id}", reference::parts(name).0)).collect();
            EngineImage {
                id: id.clone(),
                config_digest: String::new(),
                size_bytes: 1,
                repo_digests,
                is_in_containerd: false,
                layers: Vec::new(),
                names: vec![name.to_owned()],
                labels: HashMap::new(),
            }
        }))
    }
}

/// A build in the engine.
struct Run {
    name: String,
    plan: Plan,
    observer: Arc<dyn EngineObserver>,
    events: mpsc::Sender<Result<EngineEvent, EngineError>>,
}

impl Run {
    async fn run(self, life: CancellationToken, cancel: CancellationToken) {
        self.observer.began(&self.name);
        let Plan { dies_after, .. } = self.plan;
        let cancelled = async {
            cancel.cancelled().await;
            tokio::time::sleep(dies_after).await;
        };
        let abandoned = async {
            self.events.closed().await;
            tokio::time::sleep(dies_after).await;
        };
        let last = tokio::select! {
            biased;
            () = life.cancelled() => Some(Err(EngineError::Broken("it was killed".to_owned()))),
            () = cancelled => Some(Err(EngineError::Refused("cancelled".to_owned()))),
            () = abandoned => None,
            last = self.work() => Some(last),
        };
        self.observer.ended(&self.name);
        if let Some(last) = last {
            // The receiver may be gone.
            let _ = self.events.send(last).await;
        }
    }

    async fn work(&self) -> Result<EngineEvent, EngineError> {
        let step = |state| Progress::Step {
            id: "1".to_owned(),
            name: "[1/1] COPY talk /".to_owned(),
            state,
            error: String::new(),
            at: None,
        };
        self.send(step(StepState::Started)).await;
        for line in 0..self.plan.lines {
            tokio::time::sleep(self.plan.pace).await;
            let bytes = format!("line {line}\n").into_bytes();
            self.send(Progress::Output { step: "1".to_owned(), stderr: false, bytes, at: None }).await;
        }
        match self.plan.outcome {
            Outcome::Succeeds | Outcome::RefusesPush => {
                self.send(step(StepState::Done)).await;
                let id = image_id(&self.name);
                Ok(EngineEvent::Built(BuiltImage { id, config_digest: String::new() }))
            }
            Outcome::Fails => Err(EngineError::Refused("a step failed".to_owned())),
            Outcome::Breaks => Err(EngineError::Broken("it broke".to_owned())),
            Outcome::Hangs => std::future::pending().await,
        }
    }

    async fn send(&self, progress: Progress) {
        if self.events.send(Ok(EngineEvent::Progress(vec![progress]))).await.is_err() {
            // The build goes on until it notices that its connection has closed.
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Debug)]
struct ModelWork {
    events: mpsc::Receiver<Result<EngineEvent, EngineError>>,
    cancel: CancellationToken,
    runs_processes: bool,
}

#[tonic::async_trait]
impl RunningWork for ModelWork {
    async fn next(&mut self) -> Option<Result<EngineEvent, EngineError>> {
        self.events.recv().await
    }

    fn runs_processes(&self) -> bool {
        self.runs_processes
    }

    fn cancel(&self) {
        self.cancel.cancel();
    }
}
