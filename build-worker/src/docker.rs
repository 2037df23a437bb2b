//! Client of the Docker Engine. Only this module names bollard.
//!
//! Builds use BuildKit's Control API; pulls, pushes, commits, tags and images use the engine's own. Each
//! piece of work has its own connections, so that closing them ends it and leaves no session behind.

use std::collections::HashMap;

use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error as BollardError,
    models::{ContainerConfig, ImageSummary},
    query_parameters::{
        CommitContainerOptionsBuilder, InspectContainerOptions, ListImagesOptionsBuilder,
        RemoveImageOptionsBuilder, TagImageOptionsBuilder,
    },
};
use tokio::sync::mpsc;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

use self::connection::{Connections, Host};
use crate::{
    engine::{
        BuildOrder, Configuration, Engine, EngineError, EngineEvent, EngineImage, EngineInfo, EventSender,
        LabelledImage, Manifest, RunningWork,
    },
    fault::{self, Fault},
    reference,
    registry_credentials::DockerConfig,
};

mod build;
mod clips;
mod connection;
mod control;
mod credentials;
mod image_config;
mod inspect;
mod layers;
mod progress;
mod session;
mod session_secrets;
mod solve;
mod source_policy;
mod squash;
mod transfers;

/// A client of a Docker Engine.
#[derive(Clone, Debug)]
pub(crate) struct DockerEngine {
    docker: Docker,
    connections: Connections,
    docker_config: DockerConfig,
}

/// Work that the engine runs over connections of its own.
#[derive(Debug)]
struct DockerWork {
    runs_processes: bool,
    cancel: CancellationToken,
    /// Progress of the work. The channel is bounded, so that a slow reader applies backpressure to the
    /// engine.
    events: mpsc::Receiver<Result<EngineEvent, EngineError>>,
    _reader: AbortOnDropHandle<()>,
    _close: DropGuard,
}

impl DockerEngine {
    const TIMEOUT_SECONDS: u64 = 60;
    /// Timeout of pulls, pushes and commits, in seconds; so long that only the caller limits them.
    const WORK_TIMEOUT_SECONDS: u64 = 24 * 3600;
    const EVENT_CAPACITY: usize = 16;
    /// Maximum number of attempts to list images, which fails if an image is removed meanwhile.
    const LIST_TRIES: u32 = 3;
    /// A reference that no image has; looking it up shows whether the image store works.
    const NO_REFERENCE: &str = "trailer.invalid/none";
    const CONTAINERD_STORE: &str = "io.containerd.snapshotter.v1";

    /// Creates a client of the engine at `unix:///path` or `tcp://host:port`; sends nothing yet.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if the address is invalid.
    pub(crate) fn new(address: &str, docker_config: DockerConfig) -> Result<Self, EngineError> {
        let host = Host::parse(address).map_err(EngineError::Refused)?;
        let connections = Connections::new(host);
        let docker = connect(&connections, Self::TIMEOUT_SECONDS)?;
        Ok(Self { docker, connections, docker_config })
    }

    /// Reports whether the engine's processes run on this host, as far as its address shows.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self.connections.host(), Host::Unix(_))
    }

    /// Runs work over connections of its own and relays the engine's messages about it.
    fn run<F>(
        connections: Connections,
        cancel: CancellationToken,
        runs_processes: bool,
        work: impl FnOnce(EventSender) -> F,
    ) -> Box<dyn RunningWork>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(Self::EVENT_CAPACITY);
        Box::new(DockerWork {
            runs_processes,
            cancel,
            _reader: AbortOnDropHandle::new(tokio::spawn(work(sender))),
            _close: connections.closed().clone().drop_guard(),
            events,
        })
    }

    async fn list(&self, filters: HashMap<&str, Vec<String>>) -> Result<Vec<ImageSummary>, EngineError> {
        let options = ListImagesOptionsBuilder::new().filters(&filters).build();
        let mut tries = 1;
        loop {
            match self.docker.list_images(Some(options.clone())).await {
                Err(error) if is_missing(&error) && tries < Self::LIST_TRIES => tries += 1,
                images => return Ok(images?),
            }
        }
    }
}

#[tonic::async_trait]
impl Engine for DockerEngine {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        let version =
            self.connections.negotiate().await.map_err(|error| EngineError::Broken(error.to_string()))?;
        let info = self.docker.info().await?;
        self.list(HashMap::from([("reference", vec![Self::NO_REFERENCE.to_owned()])])).await?;
        let status = info.driver_status.unwrap_or_default();
        Ok(EngineInfo {
            id: info.id.unwrap_or_default(),
            version: version.version,
            root: info.docker_root_dir.unwrap_or_default(),
            has_containerd_store: status.iter().flatten().any(|value| value == Self::CONTAINERD_STORE),
            pid: self.connections.peer().await,
        })
    }

    fn build(&self, order: BuildOrder) -> Result<Box<dyn RunningWork>, EngineError> {
        let (engine, connections) = (self.clone(), self.connections.separate());
        let cancel = CancellationToken::new();
        let work = {
            let (connections, cancel) = (connections.clone(), cancel.clone());
            async move |events: EventSender| {
                let last = match engine.build_image(&connections, &order, &cancel, &events).await {
                    Ok(None) => return,
                    Ok(Some(built)) => Ok(EngineEvent::Built(built)),
                    Err(error) => Err(error),
                };
                // The receiver may be gone.
                let _ = events.send(last).await;
            }
        };
        Ok(Self::run(connections, cancel, true, work))
    }

    fn pull(&self, name: &str, pinned: &str, creator: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        self.start_pull(name, pinned, creator)
    }

    fn push(&self, reference: &str, creator: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        self.start_push(reference, creator)
    }

    async fn registry_digest(&self, reference: &str, creator: &str) -> Result<String, EngineError> {
        let digest = self.inspect_in_registry(reference, creator).await?.descriptor.digest;
        digest.ok_or_else(|| EngineError::Broken(format!("no registry reports the digest of {reference}")))
    }

    async fn manifest(&self, image: &EngineImage, name: &str) -> Result<Manifest, EngineError> {
        self.inspect_manifest(image, name).await
    }

    async fn configuration(&self, name: &str) -> Result<Configuration, EngineError> {
        self.resolve_configuration(name).await
    }

    fn has_credentials(&self, reference: &str) -> bool {
        self.docker_config.covers(reference)
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
        let docker = connect(&self.connections.separate(), Self::WORK_TIMEOUT_SECONDS)?;
        Ok(docker.commit_container(options, config).await?.id)
    }

    async fn labelled(&self, labels: &[(&str, &str)]) -> Result<Vec<LabelledImage>, EngineError> {
        let wanted: Vec<String> = labels.iter().map(|(label, value)| format!("{label}={value}")).collect();
        let mut images = self.list(HashMap::from([("label", wanted)])).await?;
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

    async fn names(&self, pattern: &str) -> Result<Vec<String>, EngineError> {
        let images = self.list(HashMap::from([("reference", vec![pattern.to_owned()])])).await?;
        Ok(images.into_iter().flat_map(|image| image.repo_tags).collect())
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
        self.inspect(name).await
    }
}

#[tonic::async_trait]
impl RunningWork for DockerWork {
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

fn connect(connections: &Connections, timeout_seconds: u64) -> Result<Docker, EngineError> {
    // The host in this address is ignored, because the transport knows the engine's address.
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

impl From<BollardError> for EngineError {
    fn from(error: BollardError) -> Self {
        let (status_code, message) = if let BollardError::DockerStreamError { error } = error {
            (None, error)
        } else if let BollardError::DockerResponseServerError { status_code, message } = error {
            (Some(status_code), message)
        } else {
            return Self::Broken(error.to_string());
        };
        // A registry may be a server of any kind, whose answer is not for the build.
        let shown =
            if message.contains("response body") { fault::without_answer(&message) } else { message.clone() };
        match status_code {
            Some(429) => Self::Unreachable(shown),
            Some(400..=499) => Self::Refused(shown),
            Some(_) => Self::new(Fault::of_message(&message).unwrap_or(Fault::Engine), shown),
            None => Self::new(Fault::of_message(&message).unwrap_or(Fault::User), shown),
        }
    }
}
