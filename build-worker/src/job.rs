//! One attempt at one build, from its assignment to its last report.

use std::{collections::HashMap, sync::Arc, time::Duration};

use proto::dispatch::{
    Assignment, Built, DockerBuild, Failed, FailureKind, HandedBack, Started, Stopped, Succeeded,
    assignment::Work, report_event::Event,
};
use tokio::time::Instant;

use crate::{
    context::{self, Context},
    dial::Dial,
    engine::{BuildOrder, Engine, EngineError, RunningWork, Told},
    fetching,
    labels::{CATALOGUE_LABEL, IMAGE_LABEL, REFERENCE_LABEL, WORKER_LABEL},
    leftovers::ATTEMPTS,
    outbox::Outbox,
    output::{FailedStep, Output},
    readiness::{Doubt, Readiness},
    residue::StepProcesses,
    spool::Spool,
    steps::StepsUnderWay,
    telling::StepSpans,
};

pub(crate) use self::control::{Control, StopReason};

mod control;
mod publishing;
mod pulling;
mod snapshot;
mod stopping;

/// What a job works with.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) assignment: Assignment,
    pub(crate) worker: String,
    pub(crate) catalogue: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) readiness: Arc<Readiness>,
    pub(crate) dial: Arc<dyn Dial>,
    /// Where a large context waits for the engine.
    pub(crate) spool: Arc<dyn Spool>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) control: Arc<Control>,
    pub(crate) steps: StepsUnderWay,
    /// None when the engine's processes cannot be seen from here.
    pub(crate) processes: Option<StepProcesses>,
    pub(crate) log_limit: usize,
    /// How long stopping may take before it counts as not confirmed.
    pub(crate) stop_limit: Duration,
    /// The service may have given it to others afterwards, if it has not begun.
    pub(crate) begin_by: Instant,
}

/// What an attempt has come to.
struct Made {
    image_id: String,
    size_bytes: i64,
    /// Empty for what no registry holds.
    repo_digest: String,
}

/// How an attempt ended without an artifact.
enum Ended {
    /// It was not begun, and why.
    NotBegun(&'static str),
    Failed(Failed),
    /// `left` is what has not stopped in time.
    Stopped {
        left: Option<Left>,
    },
}

/// What goes on of a build that was to stop.
#[derive(Debug)]
pub(crate) struct Left {
    /// None when the engine has ended it, or tells nothing more of it.
    build: Option<Box<dyn RunningWork>>,
    begun: Instant,
    /// From before anybody is told, for the service gives out builds until it hears that none are taken.
    _doubt: Doubt,
}

impl Job {
    /// How long a build waits for an engine that does not answer.
    const ENGINE_PATIENCE: Duration = Duration::from_secs(10);
    /// What the log says when the engine tells nothing more.
    const SILENT: &str = "the Docker Engine tells nothing more of this build, as version 20.10 does when a step prints too much at once";
    /// How long the last report may wait for the attempt's tag to go.
    const UNTAG_LIMIT: Duration = Duration::from_secs(1);
    /// How long a worker that ends waits for the grant of what it has built.
    const LAST_GRANT: Duration = Duration::from_secs(5);

    /// Works, reports, and waits until every report is durable. What has not stopped by then is left to [`Self::linger`].
    pub(crate) async fn run(&self) -> Option<Left> {
        let ended = {
            let work = self.work();
            tokio::pin!(work);
            tokio::select! {
                biased;
                ended = &mut work => ended,
                () = self.run_out() => {
                    self.control.stop(StopReason::TimedOut);
                    work.await
                }
            }
        };
        match tokio::time::timeout(Self::UNTAG_LIMIT, self.engine.untag(&self.attempt_tag())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(tag = self.attempt_tag(), %error, "cannot remove the tag of an attempt");
            }
            Err(_) => {
                tracing::warn!(tag = self.attempt_tag(), "the engine does not remove the tag of an attempt")
            }
        }
        let mut left = None;
        let event = match ended {
            Ok(Made { image_id, size_bytes, repo_digest }) => {
                Some(Event::Succeeded(Succeeded { image_id, size_bytes, repo_digest }))
            }
            Err(Ended::NotBegun(reason)) => Some(Event::HandedBack(HandedBack { reason: reason.to_owned() })),
            Err(Ended::Failed(failed)) => {
                if failed.kind() == FailureKind::Infrastructure {
                    // Before the service hears of it, which gives the build back at once.
                    self.readiness.engine.suspect();
                }
                Some(Event::Failed(failed))
            }
            Err(Ended::Stopped { left: found }) => {
                left = found;
                self.stopped(left.is_none())
            }
        };
        if left.is_none() {
            self.steps.forget(&self.name());
        }
        match event {
            Some(event) => self.outbox.push(None, event).await,
            None => self.outbox.drop_all(),
        }
        self.outbox.settled().await;
        left
    }

    /// What to tell of an attempt that was to stop.
    fn stopped(&self, confirmed: bool) -> Option<Event> {
        match self.control.reason.get() {
            Some(StopReason::Cancelled) => Some(Event::Stopped(Stopped { confirmed })),
            Some(StopReason::TimedOut) => Some(Event::Failed(Failed {
                kind: FailureKind::Timeout.into(),
                message: format!(
                    "the build was stopped after {:?}, as configured",
                    self.timeout().unwrap_or_default()
                ),
                ..Failed::default()
            })),
            // What has been granted cannot be handed back.
            Some(StopReason::HandBack) if confirmed && self.control.granted.is_cancelled() => {
                Some(Event::Failed(Failed {
                    kind: FailureKind::Infrastructure.into(),
                    message: "the worker is shutting down".to_owned(),
                    ..Failed::default()
                }))
            }
            Some(StopReason::HandBack) if confirmed => {
                Some(Event::HandedBack(HandedBack { reason: "the worker is shutting down".to_owned() }))
            }
            // Work that may still go on is not given to others before the lease is over.
            Some(StopReason::HandBack | StopReason::Fenced) | None => None,
        }
    }

    /// How long the attempt may run.
    fn timeout(&self) -> Option<Duration> {
        self.assignment.timeout.as_ref().and_then(|&timeout| Duration::try_from(timeout).ok())
    }

    /// Waits until the attempt has run for as long as it may.
    async fn run_out(&self) {
        match self.timeout() {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    }

    async fn work(&self) -> Result<Made, Ended> {
        tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped { left: None }),
            waited = tokio::time::timeout(Self::ENGINE_PATIENCE, self.readiness.engine.answering()) => {
                waited.map_err(|_| Ended::NotBegun("the Docker Engine does not answer"))?;
            }
        }
        if self.readiness.has_doubts() {
            return Err(Ended::NotBegun("a build that was to stop goes on here"));
        }
        if self.readiness.is_disk_full() {
            return Err(Ended::NotBegun("the disk is nearly full"));
        }
        if Instant::now() >= self.begin_by {
            return Err(Ended::NotBegun("it could not be begun in time"));
        }
        self.outbox.push(None, Event::Started(Started {})).await;
        if self.control.stop.is_cancelled() {
            return Err(Ended::Stopped { left: None });
        }
        let mut output = Output::new(self.log_limit);
        match &self.assignment.work {
            Some(Work::DockerBuild(order)) => {
                let context = tokio::select! {
                    biased;
                    () = self.control.stop.cancelled() => return Err(Ended::Stopped { left: None }),
                    context = self.context(order) => context?,
                };
                let build = self.start(order, context).map_err(broken)?;
                let built = self.follow(build, &mut output).await?.ok_or_else(|| {
                    infrastructure("the engine ended the build without an image".to_owned())
                })?;
                self.outbox.push(None, Event::Built(Built {})).await;
                self.granted().await?;
                self.publish(&built, order.push, &mut output).await
            }
            Some(Work::Pull(pull)) => self.pull(&pull.reference, &mut output).await,
            Some(Work::Snapshot(order)) => self.snapshot(order).await,
            None => Err(infrastructure("this worker does not know this kind of build".to_owned())),
        }
    }

    /// Waits until the image's own tag may be set.
    async fn granted(&self) -> Result<(), Ended> {
        tokio::select! {
            biased;
            () = self.control.granted.cancelled() => Ok(()),
            () = self.control.stop.cancelled() => {
                // What is built need not be built again because the worker ends: the grant is on its way.
                let wanted = self.control.reason.get() == Some(&StopReason::HandBack);
                let granted = tokio::time::timeout(Self::LAST_GRANT, self.control.granted.cancelled());
                if wanted && granted.await.is_ok() { Ok(()) } else { Err(Ended::Stopped { left: None }) }
            }
        }
    }

    /// Reports what the engine says of its work, until that has ended; the image's id, where the engine has told one.
    async fn follow(
        &self,
        mut build: Box<dyn RunningWork>,
        output: &mut Output,
    ) -> Result<Option<String>, Ended> {
        let begun = Instant::now();
        let mut image_id = None;
        let mut failure = None;
        let mut is_silent = false;
        let mut spans = StepSpans::new();
        loop {
            let told = tokio::select! {
                biased;
                () = self.control.stop.cancelled() => {
                    return Err(self.stop(build, output, Vec::new(), begun, is_silent).await);
                }
                told = build.next() => told,
                () = self.idle(begun), if is_silent => {
                    failure = Some(EngineError::Broken("it tells nothing more of the build".to_owned()));
                    None
                }
            };
            let mut events = Vec::new();
            let mut is_over = false;
            is_silent |= matches!(told, Some(Ok(Told::Silent)));
            match told {
                Some(Ok(Told::Progress(progress))) => {
                    for progress in progress {
                        output.take(progress, &mut events);
                    }
                    if build.runs_processes() {
                        self.steps.set(&self.name(), output.steps_under_way());
                    }
                }
                Some(Ok(Told::ImageId(id))) => image_id = Some(id),
                Some(Ok(Told::Silent)) => output.leave_out(Self::SILENT, &mut events),
                Some(Err(error)) => failure = Some(error),
                None => is_over = true,
            }
            is_over |= is_silent && image_id.is_some();
            if is_over {
                output.finish(&mut events);
            }
            spans.take(&events);
            let mut events = events.into_iter();
            while let Some((at, event)) = events.next() {
                if is_over {
                    // There is nothing left to stop.
                    self.outbox.push(at, event).await;
                    continue;
                }
                let is_pushed = tokio::select! {
                    biased;
                    () = self.outbox.push(at, event.clone()) => true,
                    () = self.control.stop.cancelled() => false,
                };
                if !is_pushed {
                    let untold = std::iter::once((at, event)).chain(events).collect();
                    return Err(self.stop(build, output, untold, begun, is_silent).await);
                }
            }
            if is_over {
                break;
            }
        }
        match (failure, image_id) {
            (Some(error), _) => Err(Ended::Failed(failed(&error, output.failed_step()))),
            (None, image_id) => Ok(image_id),
        }
    }

    async fn context(&self, order: &DockerBuild) -> Result<Context, Ended> {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        let context = fetching::context_of(order, &attempt, self.dial.as_ref(), self.spool.as_ref()).await;
        context.map_err(|error| {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            infrastructure(format!("{error}{}", source.unwrap_or_default()))
        })
    }

    fn start(&self, order: &DockerBuild, context: Context) -> Result<Box<dyn RunningWork>, EngineError> {
        self.engine.build(BuildOrder {
            name: self.name(),
            tag: self.attempt_tag(),
            context,
            dockerfile: context::dockerfile_path(order),
            build_args: order.build_args.clone().into_iter().collect(),
            target: order.target.clone(),
            pull_base: order.pull_base,
            no_cache: order.no_cache,
            squash: order.squash,
            labels: self.labels(),
        })
    }

    /// The labels of what is made.
    fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (IMAGE_LABEL.to_owned(), self.assignment.image_id.clone()),
            (WORKER_LABEL.to_owned(), self.worker.clone()),
            (REFERENCE_LABEL.to_owned(), self.assignment.reference.clone()),
            (CATALOGUE_LABEL.to_owned(), self.catalogue.clone()),
        ])
    }

    /// Names the build in the engine, uniquely.
    fn name(&self) -> String {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        format!("{}-{}", attempt.build_id, attempt.number)
    }

    fn attempt_tag(&self) -> String {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        format!("{ATTEMPTS}{}:{}", attempt.build_id, attempt.number)
    }
}

fn failed(error: &EngineError, step: Option<FailedStep>) -> Failed {
    let kind = match error {
        EngineError::Refused(_) => FailureKind::User,
        EngineError::Broken(_) => FailureKind::Infrastructure,
    };
    let step = step.unwrap_or_default();
    Failed { kind: kind.into(), step: step.name, message: error.to_string(), last_lines: step.last_lines }
}

fn broken(error: EngineError) -> Ended {
    infrastructure(error.to_string())
}

fn infrastructure(message: String) -> Ended {
    Ended::Failed(Failed { kind: FailureKind::Infrastructure.into(), message, ..Failed::default() })
}
