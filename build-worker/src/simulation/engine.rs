//! A model of a Docker Engine.

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
        BuildOrder, BuiltImage, Engine, EngineError, EngineImage, EngineInfo, LabelledImage, Progress,
        RunningWork, Told,
    },
    reference,
};

/// How the engine does a build.
#[derive(Copy, Clone, Debug)]
pub struct Plan {
    /// How many lines it prints: `line 0`, `line 1`, …
    pub lines: u32,
    /// How long each takes.
    pub pace: Duration,
    /// How it ends.
    pub outcome: Outcome,
    /// How long it goes on after a cancel, or after its connection has closed.
    pub dies_after: Duration,
}

/// How a build ends when nobody interferes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With the image `sha256:` and the build's name.
    Succeeds,
    /// A step fails.
    Fails,
    /// With the image, which its registry refuses.
    RefusesPush,
    /// The engine itself fails.
    Breaks,
    /// Not.
    Hangs,
}

/// Sees what an engine does.
pub trait Witness: Debug + Send + Sync {
    /// How the engine shall do this build, of the name `<build>-<attempt>`.
    fn plan(&self, name: &str) -> Plan;
    /// An attempt is about to begin: how long it goes on after a cancel, if longer than planned.
    fn lingers(&self, name: &str) -> Option<Duration>;
    /// A build runs.
    fn began(&self, name: &str);
    /// A build does not run any more.
    fn ended(&self, name: &str);
    /// A worker wants an image, `sha256:` and a build's name, to have another name.
    fn tagged(&self, image: &str, name: &str);
}

/// A model of a Docker Engine.
#[derive(Clone, Debug)]
pub struct ModelEngine(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    witness: Arc<dyn Witness>,
    /// Cancelled when the engine dies; none while it is away.
    life: Option<CancellationToken>,
    is_suspended: bool,
    resumed: Arc<Notify>,
    images: BTreeMap<String, String>,
}

impl ModelEngine {
    const ANSWER: Duration = Duration::from_millis(3);

    /// An engine that runs.
    pub fn new(witness: Arc<dyn Witness>) -> Self {
        let life = Some(CancellationToken::new());
        Self(Arc::new(Mutex::new(State {
            witness,
            life,
            is_suspended: false,
            resumed: Arc::default(),
            images: BTreeMap::new(),
        })))
    }

    pub(super) fn info() -> EngineInfo {
        EngineInfo { id: "model".to_owned(), version: "29.7.3".to_owned(), ..EngineInfo::default() }
    }

    /// Kills it: whatever runs ends.
    pub fn kill(&self) {
        if let Some(life) = self.state().life.take() {
            life.cancel();
        }
    }

    /// Starts it again.
    pub fn start(&self) {
        self.state().life.get_or_insert_default();
    }

    /// It answers nothing until it is resumed. What it runs goes on.
    pub fn suspend(&self) {
        self.state().is_suspended = true;
    }

    /// It answers again.
    pub fn resume(&self) {
        let mut state = self.state();
        state.is_suspended = false;
        state.resumed.notify_waiters();
    }

    /// What a registry says to an image.
    fn pushed(&self, reference: &str) -> Result<(), EngineError> {
        let state = self.state();
        let name = state.images.get(reference).map(|id| id.trim_start_matches("sha256:").to_owned());
        let Some(name) = name else {
            return Err(EngineError::Refused(format!("there is no {reference}")));
        };
        match state.witness.plan(&name).outcome {
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
        state.images.insert(order.tag.clone(), format!("sha256:{}", order.name));
        let (tell, told) = mpsc::channel(4);
        let run = Run {
            name: order.name.clone(),
            plan: {
                let plan = state.witness.plan(&order.name);
                Plan { dies_after: state.witness.lingers(&order.name).unwrap_or(plan.dies_after), ..plan }
            },
            witness: Arc::clone(&state.witness),
            tell,
        };
        tokio::spawn(run.run(life, cancel.clone()));
        Ok(Box::new(ModelWork { told, cancel, runs_processes: true }))
    }

    fn pull(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        Err(EngineError::Refused(format!("{reference}: this model reaches no registry")))
    }

    fn push(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (engine, reference) = (self.clone(), reference.to_owned());
        let cancel = CancellationToken::new();
        let (tell, told) = mpsc::channel(1);
        tokio::spawn(cancel.clone().run_until_cancelled_owned(async move {
            let pushed = engine.alive().await.and_then(|()| engine.pushed(&reference));
            if let Err(error) = pushed {
                // Nobody has to hear it.
                let _ = tell.send(Err(error)).await;
            }
        }));
        Ok(Box::new(ModelWork { told, cancel, runs_processes: false }))
    }

    async fn registry_digest(&self, reference: &str) -> Result<String, EngineError> {
        self.alive().await?;
        let digest = self.state().images.get(reference).cloned();
        digest.ok_or_else(|| EngineError::Refused(format!("{reference} is in no registry")))
    }

    async fn tag(&self, image: &str, name: &str) -> Result<(), EngineError> {
        let witness = Arc::clone(&self.state().witness);
        witness.tagged(image, name);
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
            // As its registry has it, if it was pushed.
            let names = state.images.iter().filter(|(_, of)| *of == id);
            let repo_digests = names.map(|(name, id)| format!("{}@{id}", reference::parts(name).0)).collect();
            EngineImage {
                id: id.clone(),
                config_digest: String::new(),
                size_bytes: 1,
                repo_digests,
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
    witness: Arc<dyn Witness>,
    tell: mpsc::Sender<Result<Told, EngineError>>,
}

impl Run {
    async fn run(self, life: CancellationToken, cancel: CancellationToken) {
        self.witness.began(&self.name);
        let Plan { dies_after, .. } = self.plan;
        let cancelled = async {
            cancel.cancelled().await;
            tokio::time::sleep(dies_after).await;
        };
        let abandoned = async {
            self.tell.closed().await;
            tokio::time::sleep(dies_after).await;
        };
        let last = tokio::select! {
            biased;
            () = life.cancelled() => Some(Err(EngineError::Broken("it was killed".to_owned()))),
            () = cancelled => Some(Err(EngineError::Refused("cancelled".to_owned()))),
            () = abandoned => None,
            last = self.work() => Some(last),
        };
        self.witness.ended(&self.name);
        if let Some(last) = last {
            // Nobody has to hear it.
            let _ = self.tell.send(last).await;
        }
    }

    async fn work(&self) -> Result<Told, EngineError> {
        let step = |state| Progress::Step {
            id: "1".to_owned(),
            name: "[1/1] COPY talk /".to_owned(),
            state,
            error: String::new(),
            at: None,
        };
        self.say(step(StepState::Started)).await;
        for line in 0..self.plan.lines {
            tokio::time::sleep(self.plan.pace).await;
            let bytes = format!("line {line}\n").into_bytes();
            self.say(Progress::Output { step: "1".to_owned(), stderr: false, bytes, at: None }).await;
        }
        match self.plan.outcome {
            Outcome::Succeeds | Outcome::RefusesPush => {
                self.say(step(StepState::Done)).await;
                let id = format!("sha256:{}", self.name);
                Ok(Told::Built(BuiltImage { id, config_digest: String::new() }))
            }
            Outcome::Fails => Err(EngineError::Refused("a step failed".to_owned())),
            Outcome::Breaks => Err(EngineError::Broken("it broke".to_owned())),
            Outcome::Hangs => std::future::pending().await,
        }
    }

    async fn say(&self, progress: Progress) {
        if self.tell.send(Ok(Told::Progress(vec![progress]))).await.is_err() {
            // It goes on until it notices that its connection has closed.
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Debug)]
struct ModelWork {
    told: mpsc::Receiver<Result<Told, EngineError>>,
    cancel: CancellationToken,
    runs_processes: bool,
}

#[tonic::async_trait]
impl RunningWork for ModelWork {
    async fn next(&mut self) -> Option<Result<Told, EngineError>> {
        self.told.recv().await
    }

    fn runs_processes(&self) -> bool {
        self.runs_processes
    }

    fn cancel(&self) {
        self.cancel.cancel();
    }
}
