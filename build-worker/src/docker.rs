//! The Docker Engine: builds by BuildKit, pulls, pushes, commits, tags and images. Only this module names bollard.
//!
//! Every build gets connections of its own, named by its attempt: so it can be cancelled by that name, read to its real end,
//! and leaves no session behind.

use std::{collections::HashMap, time::Duration};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error as BollardError,
    models::ContainerConfig,
    query_parameters::{
        BuildImageOptions, BuilderVersion, CommitContainerOptionsBuilder, InspectContainerOptions,
        ListImagesOptionsBuilder, RemoveImageOptionsBuilder, TagImageOptionsBuilder,
    },
};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_util::{sync::DropGuard, task::AbortOnDropHandle};

use self::{
    silence::Silence,
    transport::{Connections, Host},
};
use crate::{
    context::Context,
    engine::{
        BuildOrder, Canceller, Engine, EngineError, EngineImage, EngineInfo, LabelledImage, RunningWork, Told,
    },
    reference,
    registries::Registries,
};

mod layers;
mod progress;
mod silence;
mod transfers;
mod transport;

/// A Docker Engine of version 20.10 or later.
#[derive(Clone, Debug)]
pub(crate) struct DockerEngine {
    docker: Docker,
    host: Host,
    registries: Registries,
}

/// Something that the engine runs, over connections of its own.
#[derive(Debug)]
struct DockerWork {
    /// A build's: it can be cancelled by it. Everything else ends with its connections.
    name: Option<String>,
    connections: Connections,
    /// Bounded: when nobody reads on, the engine's stream is not read either.
    told: mpsc::Receiver<Result<Told, EngineError>>,
    _reader: AbortOnDropHandle<()>,
    _close: DropGuard,
}

#[derive(Debug)]
struct DockerCanceller {
    name: Option<String>,
    connections: Connections,
}

impl DockerEngine {
    const TIMEOUT_SECONDS: u64 = 60;
    /// The engine answers a build when its first step begins, which may be after another one's.
    const BUILD_TIMEOUT_SECONDS: u64 = 24 * 3600;
    const TOLD: usize = 16;

    /// Takes an address, `unix:///path` or `tcp://host:port`. Nothing is sent yet.
    pub(crate) fn new(address: &str, registries: Registries) -> Result<Self, EngineError> {
        let host = Host::parse(address).map_err(EngineError::Refused)?;
        let docker = connect(&Connections::to(host.clone(), None), Self::TIMEOUT_SECONDS)?;
        Ok(Self { docker, host, registries })
    }

    /// Whether the engine's processes run on this host, as far as the address tells.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self.host, Host::Unix(_))
    }

    /// Runs something over connections of its own, which tells what the engine says. A build has a name.
    fn run<F>(
        &self,
        name: Option<String>,
        work: impl FnOnce(Docker, mpsc::Sender<Result<Told, EngineError>>) -> F,
    ) -> Result<Box<dyn RunningWork>, EngineError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let connections = Connections::to(self.host.clone(), name.clone());
        let docker = connect(&connections, Self::BUILD_TIMEOUT_SECONDS)?;
        let (tell, told) = mpsc::channel(Self::TOLD);
        Ok(Box::new(DockerWork {
            name,
            _reader: AbortOnDropHandle::new(tokio::spawn(work(docker, tell))),
            _close: connections.closed().clone().drop_guard(),
            connections,
            told,
        }))
    }
}

#[tonic::async_trait]
impl Engine for DockerEngine {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        let info = self.docker.info().await?;
        Ok(EngineInfo {
            version: info.server_version.unwrap_or_default(),
            root: info.docker_root_dir.unwrap_or_default(),
            // Engines squash only among their experiments.
            squashes: info.experimental_build.unwrap_or_default(),
        })
    }

    fn build(&self, order: BuildOrder) -> Result<Box<dyn RunningWork>, EngineError> {
        let (body, remote) = match order.context {
            Context::Small(archive) => (bollard::body_full(archive), None),
            Context::Large(archive) => (bollard::body_try_stream(archive.into_stream()), None),
            // The client library wants one.
            Context::Remote(url) => (bollard::body_full(Bytes::new()), Some(url)),
        };
        let options = BuildImageOptions {
            dockerfile: order.dockerfile,
            remote,
            t: Some(order.tag),
            labels: Some(order.labels),
            buildargs: Some(order.build_args),
            target: order.target,
            pull: order.pull_base.then(|| "true".to_owned()),
            nocache: order.no_cache,
            squash: Some(order.squash),
            version: BuilderVersion::BuilderBuildKit,
            session: Some(order.name.clone()),
            rm: true,
            ..BuildImageOptions::default()
        };
        let registries = self.registries.clone();
        self.run(Some(order.name), async move |docker, tell| {
            let credentials = registries.all().await.into_iter().map(|(name, found)| (name, found.into()));
            let mut stream = docker.build_image(options, Some(credentials.collect()), Some(body));
            let mut silence = Silence::default();
            while let Some(info) = stream.next().await {
                let told = match info {
                    Ok(info) => progress::told(info).and_then(|told| silence.hear(told)).map(Ok),
                    Err(error) => Some(Err(error.into())),
                };
                let Some(told) = told else {
                    silence.pass().await;
                    continue;
                };
                if tell.send(told).await.is_err() {
                    return;
                }
            }
        })
    }

    fn pull(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        self.start_pull(reference)
    }

    fn push(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        self.start_push(reference)
    }

    async fn registry_digest(&self, reference: &str) -> Result<String, EngineError> {
        self.digest_in_registry(reference).await
    }

    async fn tag(&self, image: &str, name: &str) -> Result<(), EngineError> {
        let (repository, tag) = reference::parts(name);
        let options = TagImageOptionsBuilder::new().repo(repository).tag(tag).build();
        Ok(self.docker.tag_image(image, Some(options)).await?)
    }

    async fn untag(&self, name: &str) -> Result<(), EngineError> {
        let options = RemoveImageOptionsBuilder::new().force(false).noprune(true).build();
        match self.docker.remove_image(name, Some(options), None).await {
            Ok(_) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn container_labels(
        &self,
        container: &str,
    ) -> Result<Option<HashMap<String, String>>, EngineError> {
        match self.docker.inspect_container(container, None::<InspectContainerOptions>).await {
            Ok(found) => Ok(Some(found.config.and_then(|config| config.labels).unwrap_or_default())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn commit(
        &self,
        container: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<String, EngineError> {
        let (repository, tag) = reference::parts(name);
        let options = CommitContainerOptionsBuilder::new()
            .container(container)
            .repo(repository)
            .tag(tag)
            .pause(true)
            .build();
        let config = ContainerConfig { labels: Some(labels), ..ContainerConfig::default() };
        let connections = Connections::to(self.host.clone(), None);
        let docker = connect(&connections, Self::BUILD_TIMEOUT_SECONDS)?;
        Ok(docker.commit_container(options, config).await?.id)
    }

    async fn labelled(&self, labels: &[(&str, &str)]) -> Result<Vec<LabelledImage>, EngineError> {
        let wanted: Vec<String> = labels.iter().map(|(label, value)| format!("{label}={value}")).collect();
        let options = ListImagesOptionsBuilder::new().filters(&HashMap::from([("label", wanted)])).build();
        let mut images = self.docker.list_images(Some(options)).await?;
        let has = |found: &HashMap<String, String>, (label, value): &(&str, &str)| {
            found.get(*label).is_some_and(|found| found == value)
        };
        images.retain(|image| labels.iter().all(|label| has(&image.labels, label)));
        let labelled = images.into_iter().map(|image| LabelledImage {
            id: image.id,
            names: image.repo_tags,
            labels: image.labels,
        });
        Ok(labelled.collect())
    }

    async fn remove(&self, id: &str) -> Result<bool, EngineError> {
        let options = RemoveImageOptionsBuilder::new().force(false).noprune(true).build();
        match self.docker.remove_image(id, Some(options), None).await {
            Ok(_) => Ok(true),
            Err(error) if is_missing(&error) => Ok(true),
            Err(BollardError::DockerResponseServerError { status_code: 409, .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn image(&self, name: &str) -> Result<Option<EngineImage>, EngineError> {
        match self.docker.inspect_image(name).await {
            Ok(image) => Ok(image.id.map(|id| EngineImage {
                id,
                size_bytes: image.size.unwrap_or(0),
                repo_digests: image.repo_digests.unwrap_or_default(),
            })),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[tonic::async_trait]
impl RunningWork for DockerWork {
    async fn next(&mut self) -> Option<Result<Told, EngineError>> {
        self.told.recv().await
    }

    fn runs_processes(&self) -> bool {
        self.name.is_some()
    }

    fn canceller(&self) -> Box<dyn Canceller> {
        Box::new(DockerCanceller { name: self.name.clone(), connections: self.connections.clone() })
    }
}

impl DockerCanceller {
    /// How long the engine may take to hear of a cancel.
    const TIMEOUT: Duration = Duration::from_secs(5);
}

#[tonic::async_trait]
impl Canceller for DockerCanceller {
    async fn cancel(&self) -> Result<(), EngineError> {
        let Some(name) = &self.name else {
            self.connections.closed().cancel();
            return Ok(());
        };
        let path = format!("/build/cancel?id={name}");
        tokio::time::timeout(Self::TIMEOUT, self.connections.post(&path))
            .await
            .map_err(|_| EngineError::Broken("it did not answer a cancel in time".to_owned()))?
            .map_err(|error| EngineError::Broken(error.to_string()))
    }
}

fn connect(connections: &Connections, timeout_seconds: u64) -> Result<Docker, EngineError> {
    // The host of this address is of no account: the connections know where to.
    let docker = Docker::connect_with_custom_transport(
        connections.transport(),
        Some("http://docker"),
        timeout_seconds,
        API_DEFAULT_VERSION,
    )?;
    Ok(docker)
}

fn is_missing(error: &BollardError) -> bool {
    matches!(error, BollardError::DockerResponseServerError { status_code: 404, .. })
}

/// What an engine says when it is itself the cause.
const OWN_TROUBLES: [&str; 5] = [
    "context canceled",
    "no space left on device",
    "transport is closing",
    "error reading from server: EOF",
    "cannot allocate memory",
];

impl From<BollardError> for EngineError {
    fn from(error: BollardError) -> Self {
        if let BollardError::DockerStreamError { error } = error {
            // The text quotes the command of a step that has failed, which may hold anything.
            let is_exit =
                error.rsplit_once("exit code: ").is_some_and(|(_, code)| code.trim().parse::<i32>().is_ok());
            return if !is_exit && OWN_TROUBLES.iter().any(|trouble| error.contains(trouble)) {
                Self::Broken(error)
            } else {
                Self::Refused(error)
            };
        }
        if let BollardError::DockerResponseServerError { status_code: 400..=499, message } = error {
            return Self::Refused(message);
        }
        Self::Broken(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_fails_is_no_trouble_of_the_engine() {
        let is_broken = |error: &str| {
            let error = BollardError::DockerStreamError { error: error.to_owned() };
            matches!(EngineError::from(error), EngineError::Broken(_))
        };
        assert!(is_broken("failed to copy: write /x: no space left on device"));
        assert!(is_broken("context canceled"));
        assert!(!is_broken("executor failed running [/bin/sh -c false]: exit code: 1"));
        assert!(!is_broken(
            "executor failed running [/bin/sh -c grep 'no space left on device' x]: exit code: 1"
        ));
    }
}
