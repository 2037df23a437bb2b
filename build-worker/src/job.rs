//! One attempt at a build, from its assignment to its last report.

use std::{collections::HashMap, sync::Arc, time::Duration};

use proto::dispatch::{
    Assignment, Built, Failed, FailureKind, HandedBack, Started, Stopped, Succeeded, assignment::Work,
    report_event::Event,
};
use tokio::time::Instant;

use crate::{
    artifact_name::ArtifactName,
    base_images::BaseImages,
    engine::Engine,
    outbox::Outbox,
    output::{FailedStep, Output},
    readiness::Readiness,
    remote_context::RemoteContexts,
    secrets::SecretStore,
    service_client::ServiceClient,
    source_rules::SourceRules,
    spool::Spool,
    stale_tags::ATTEMPTS,
    step_processes::{StepGroup, StepProcesses},
    steps::StepsUnderWay,
};

pub(crate) use self::control::{Control, StopReason};
use self::outcome::{Artifact, Ended, Rest, Stop};

mod control;
mod docker_build;
mod outcome;
mod progress;
mod publication;
mod pull;
mod snapshot;
mod stop;

/// An attempt, with everything that it needs to run.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) assignment: Assignment,
    pub(crate) worker: String,
    pub(crate) catalogue: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) readiness: Arc<Readiness>,
    pub(crate) service: Arc<dyn ServiceClient>,
    /// Storage for a large context until the engine fetches it.
    pub(crate) spool: Arc<dyn Spool>,
    pub(crate) remotes: Arc<RemoteContexts>,
    pub(crate) secrets: SecretStore,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) control: Arc<Control>,
    pub(crate) steps: StepsUnderWay,
    /// Parent control group of the steps.
    pub(crate) group: StepGroup,
    /// Processes of steps; `None` if the engine's processes are not on this host.
    pub(crate) processes: Option<StepProcesses>,
    pub(crate) bases: Arc<BaseImages>,
    /// The operator's rules on the sources of builds.
    pub(crate) source_rules: Arc<SourceRules>,
    /// Build arguments that name the proxies of builds.
    pub(crate) proxies: HashMap<String, String>,
    /// Compression of layers; the engine's default if empty.
    pub(crate) compression: String,
    pub(crate) log_limit: usize,
    /// Time after which a stop counts as unconfirmed.
    pub(crate) stop_timeout: Duration,
    /// Deadline for the start, after which the service may have given the attempt to another worker.
    pub(crate) begin_by: Instant,
}

impl Job {
    /// Maximum time that a build waits for an engine that does not respond.
    const ENGINE_PATIENCE: Duration = Duration::from_secs(10);
    /// Maximum time that the last report waits for the removal of the attempt's tag.
    const UNTAG_LIMIT: Duration = Duration::from_secs(1);
    /// Maximum time that a terminating worker waits for the grant of a finished build.
    const LAST_GRANT: Duration = Duration::from_secs(5);

    /// Runs the attempt, reports on it, and waits until every report is durable.
    ///
    /// Work that has not stopped by then is left to [`Self::reap`].
    pub(crate) async fn run(&self) -> Rest {
        let mut output = Output::new(self.log_limit);
        let ended = {
            let work = self.work(&mut output);
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
            Err(_) => tracing::warn!(tag = self.attempt_tag(), "the engine does not remove an attempt's tag"),
        }
        let mut rest = Rest::default();
        let event = match ended {
            Ok(Artifact { image_id, config_digest, size_bytes, repo_digest, replaced }) => {
                rest.replaced = replaced.filter(|replaced| *replaced != image_id);
                Some(Event::Succeeded(Succeeded { image_id, size_bytes, repo_digest, config_digest }))
            }
            Err(Ended::NotBegun(reason)) => Some(Event::HandedBack(HandedBack { reason, base: None })),
            Err(Ended::Elsewhere { reason, base }) => {
                Some(Event::HandedBack(HandedBack { reason, base: Some(base) }))
            }
            Err(Ended::Failed { mut failed, suspects_engine }) => {
                failed.message = output.scrubbed(failed.message);
                if suspects_engine {
                    // This comes before the report, upon which the service reassigns the build.
                    self.readiness.engine.suspect();
                }
                Some(Event::Failed(failed))
            }
            Err(Ended::Stopped(stop)) => {
                let event = self.stopped(&stop, &output);
                if let Stop::Failed(left) = stop {
                    rest.left = Some(left);
                }
                event
            }
        };
        if rest.left.is_none() {
            self.steps.remove(&self.name());
        }
        match event {
            Some(event) => self.outbox.push(None, event).await,
            None => self.outbox.drop_all(),
        }
        self.outbox.flushed().await;
        rest
    }

    /// Returns the report on an attempt whose stop was requested.
    fn stopped(&self, stop: &Stop, output: &Output) -> Option<Event> {
        let has_ended = !matches!(stop, Stop::Failed(_));
        match self.control.reason.get() {
            Some(StopReason::Cancelled) => {
                Some(Event::Stopped(Stopped { confirmed: matches!(stop, Stop::Confirmed) }))
            }
            Some(StopReason::TimedOut) => {
                let timeout = self.timeout().unwrap_or_default();
                let FailedStep { name, last_lines, .. } = output.interrupted_step().unwrap_or_default();
                Some(Event::Failed(Failed {
                    kind: FailureKind::Timeout.into(),
                    step: name,
                    message: format!("the build was stopped after {timeout:?}, as configured"),
                    last_lines,
                }))
            }
            // A granted attempt cannot be handed back.
            Some(StopReason::HandBack) if has_ended && self.control.granted.is_cancelled() => {
                Some(Event::Failed(Failed {
                    kind: FailureKind::Infrastructure.into(),
                    message: "the worker is shutting down".to_owned(),
                    ..Failed::default()
                }))
            }
            Some(StopReason::HandBack) if has_ended => Some(Event::HandedBack(HandedBack {
                reason: "the worker is shutting down".to_owned(),
                base: None,
            })),
            // Work that may still go on is not given to other workers before the lease expires.
            Some(StopReason::HandBack | StopReason::Fenced) | None => None,
        }
    }

    /// Returns the maximum duration of the attempt.
    fn timeout(&self) -> Option<Duration> {
        self.assignment.timeout.as_ref().and_then(|&timeout| Duration::try_from(timeout).ok())
    }

    /// Waits until the attempt has reached its maximum duration.
    async fn run_out(&self) {
        match self.timeout() {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    }

    async fn work(&self, output: &mut Output) -> Result<Artifact, Ended> {
        tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped(Stop::Confirmed)),
            waited = tokio::time::timeout(Self::ENGINE_PATIENCE, self.readiness.engine.answering()) => {
                waited.map_err(|_| Ended::NotBegun("the Docker Engine does not respond".to_owned()))?;
            }
        }
        if let Some(obstacle) = self.obstacle() {
            return Err(Ended::NotBegun(obstacle));
        }
        self.outbox.push(None, Event::Started(Started {})).await;
        if self.control.stop.is_cancelled() {
            return Err(Ended::Stopped(Stop::Confirmed));
        }
        match &self.assignment.work {
            Some(Work::DockerBuild(order)) => {
                let secrets = tokio::select! {
                    biased;
                    () = self.control.stop.cancelled() => return Err(Ended::Stopped(Stop::Confirmed)),
                    secrets = self.secrets.resolve(&self.assignment, order) => Arc::new(secrets?),
                };
                output.hide(Arc::clone(&secrets.scrubber));
                let context = tokio::select! {
                    biased;
                    () = self.control.stop.cancelled() => return Err(Ended::Stopped(Stop::Confirmed)),
                    context = self.context(order, &secrets.remote_credentials) => context?,
                };
                let build = self.start(order, context, secrets)?;
                let built = self.relay_progress(build, output).await?.ok_or_else(|| {
                    Ended::by_broken_engine("the engine ended the build without an image".to_owned())
                })?;
                self.outbox.push(None, Event::Built(Built {})).await;
                self.granted().await?;
                self.publish(&built, order.push, output).await
            }
            Some(Work::Pull(pull)) => self.pull(&pull.reference, output).await,
            Some(Work::Snapshot(order)) => self.snapshot(order).await,
            None => Err(Ended::by_infrastructure("this worker does not know this kind of build".to_owned())),
        }
    }

    /// Returns the reason why nothing can start here now, if there is one.
    fn obstacle(&self) -> Option<String> {
        if self.readiness.has_unconfirmed_stops() {
            return Some("an earlier build on this worker has not stopped".to_owned());
        }
        if self.readiness.is_disk_full() {
            return Some("the disk is nearly full".to_owned());
        }
        if Instant::now() >= self.begin_by {
            return Some("it could not be started in time".to_owned());
        }
        self.readiness.support().unsupported
    }

    /// Waits until the image's own tag may be set.
    async fn granted(&self) -> Result<(), Ended> {
        tokio::select! {
            biased;
            () = self.control.granted.cancelled() => Ok(()),
            () = self.control.stop.cancelled() => {
                // A finished build need not be repeated because the worker terminates: its grant is on the
                // way.
                let wanted = self.control.reason.get() == Some(&StopReason::HandBack);
                let granted = tokio::time::timeout(Self::LAST_GRANT, self.control.granted.cancelled());
                if wanted && granted.await.is_ok() { Ok(()) } else { Err(Ended::Stopped(Stop::Confirmed)) }
            }
        }
    }

    /// Returns the name of the build in the engine, unique to the attempt.
    fn name(&self) -> String {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        format!("{}-{}", attempt.build_id, attempt.number)
    }

    /// Returns the name that the artifact of the build has in the engine.
    fn artifact_name(&self) -> ArtifactName {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        ArtifactName {
            catalogue: self.catalogue.clone(),
            image_id: self.assignment.image_id.clone(),
            build_id: attempt.build_id,
        }
    }

    fn attempt_tag(&self) -> String {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        format!("{ATTEMPTS}{}:{}", attempt.build_id, attempt.number)
    }
}
