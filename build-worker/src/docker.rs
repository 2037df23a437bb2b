//! The Docker Engine: builds by BuildKit's Control API; pulls, pushes, commits, tags and images by the engine's own. Only this
//! module names bollard.
//!
//! Every piece of work gets connections of its own, so that it can be ended by closing them, and leaves no session behind.

use std::{collections::HashMap, sync::Arc};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error as BollardError,
    models::{ContainerConfig, ImageInspect, ImageSummary},
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

use self::{
    connection::{Connections, Host},
    control::Control,
    solve::Teller,
};
use crate::{
    engine::{
        BuildOrder, BuiltImage, Engine, EngineError, EngineImage, EngineInfo, LabelledImage, RunningWork,
        Told,
    },
    fault::Fault,
    reference,
    registries::Registries,
};

mod connection;
mod control;
mod layers;
mod progress;
mod session;
mod solve;
mod squash;
mod transfers;

/// A Docker Engine.
#[derive(Clone, Debug)]
pub(crate) struct DockerEngine {
    docker: Docker,
    connections: Connections,
    registries: Registries,
}

/// Something that the engine runs, over connections of its own.
#[derive(Debug)]
struct DockerWork {
    runs_processes: bool,
    cancel: CancellationToken,
    /// Bounded: when nobody reads on, the engine's stream is not read either.
    told: mpsc::Receiver<Result<Told, EngineError>>,
    _reader: AbortOnDropHandle<()>,
    _close: DropGuard,
}

impl DockerEngine {
    const TIMEOUT_SECONDS: u64 = 60;
    /// Nothing bounds how long a pull, a push or a commit takes but whoever waits for it.
    const WORK_TIMEOUT_SECONDS: u64 = 24 * 3600;
    const TOLD: usize = 16;
    /// The times that a list is asked for, which fails when an image is removed meanwhile.
    const LIST_TRIES: u32 = 3;
    /// A reference that no image has: whether its lookup works shows that the image store does.
    const NO_REFERENCE: &str = "trailer.invalid/none";
    const CONTAINERD_STORE: &str = "io.containerd.snapshotter.v1";

    /// Takes an address, `unix:///path` or `tcp://host:port`. Nothing is sent yet.
    ///
    /// # Errors
    ///
    /// The address is none.
    pub(crate) fn new(address: &str, registries: Registries) -> Result<Self, EngineError> {
        let host = Host::parse(address).map_err(EngineError::Refused)?;
        let connections = Connections::new(host);
        let docker = connect(&connections, Self::TIMEOUT_SECONDS)?;
        Ok(Self { docker, connections, registries })
    }

    /// Returns whether the engine's processes run on this host, as far as the address tells.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self.connections.host(), Host::Unix(_))
    }

    /// Runs something over connections of its own, and passes on what the engine says of it.
    fn run<F>(
        connections: Connections,
        cancel: CancellationToken,
        runs_processes: bool,
        work: impl FnOnce(Teller) -> F,
    ) -> Box<dyn RunningWork>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (tell, told) = mpsc::channel(Self::TOLD);
        Box::new(DockerWork {
            runs_processes,
            cancel,
            _reader: AbortOnDropHandle::new(tokio::spawn(work(tell))),
            _close: connections.closed().clone().drop_guard(),
            told,
        })
    }

    /// Builds, and squashes where that is wanted; none when it was cancelled.
    async fn build_image(
        &self,
        connections: &Connections,
        order: &BuildOrder,
        cancel: &CancellationToken,
        tell: &Teller,
    ) -> Result<Option<BuiltImage>, EngineError> {
        let Some(built) = self.solve(connections, order, cancel, tell).await? else {
            return Ok(None);
        };
        if !order.squash {
            return Ok(Some(built));
        }
        let squashed = self.solve(connections, &squash::order(connections, order).await?, cancel, tell).await;
        // It has lost its only name, or goes with that.
        if let Err(error) = self.remove(&built.id).await {
            tracing::warn!(id = built.id, %error, "cannot remove what was squashed");
        }
        squashed
    }

    async fn solve(
        &self,
        connections: &Connections,
        order: &BuildOrder,
        cancel: &CancellationToken,
        tell: &Teller,
    ) -> Result<Option<BuiltImage>, EngineError> {
        let open = Control::open(connections, Arc::clone(&order.context), self.registries.clone());
        let Some(control) = cancel.run_until_cancelled(open).await else {
            return Ok(None);
        };
        let control = control?;
        let request = solve::request(order, &control.session);
        solve::solve(&control, request, &order.stages, cancel, tell).await
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

    /// Returns the bytes that an image takes on the engine's disk. Where containerd stores it, inspecting it tells less.
    async fn size(&self, name: &str, image: &ImageInspect) -> Result<i64, EngineError> {
        let inspected = image.size.unwrap_or(0);
        if has_graph_driver(image) {
            return Ok(inspected);
        }
        let (repository, tag) = reference::parts(name);
        let listed = self.list(HashMap::from([("reference", vec![format!("{repository}:{tag}")])])).await?;
        let listed = listed.into_iter().find(|listed| Some(&listed.id) == image.id.as_ref());
        Ok(listed.map_or(inspected, |listed| listed.size))
    }
}

/// Returns whether a graph driver holds an image. Only containerd's store tells nothing of the driver's data.
fn has_graph_driver(image: &ImageInspect) -> bool {
    image.graph_driver.as_ref().is_some_and(|driver| !driver.data.is_empty())
}

/// Returns the digest of an image's configuration; empty when the engine does not tell it, as Docker before 28 does not where
/// containerd stores the images.
fn config_digest(image: &ImageInspect) -> String {
    if has_graph_driver(image) {
        return image.id.clone().unwrap_or_default();
    }
    let annotations = image.descriptor.as_ref().and_then(|descriptor| descriptor.annotations.as_ref());
    annotations.and_then(|annotations| annotations.get("config.digest")).cloned().unwrap_or_default()
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
            async move |tell: Teller| {
                let last = match engine.build_image(&connections, &order, &cancel, &tell).await {
                    Ok(None) => return,
                    Ok(Some(built)) => Ok(Told::Built(built)),
                    Err(error) => Err(error),
                };
                // Whoever does not listen any more need not hear it.
                let _ = tell.send(last).await;
            }
        };
        Ok(Self::run(connections, cancel, true, work))
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
        let image = match self.docker.inspect_image(name).await {
            Ok(image) => image,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(id) = image.id.clone() else { return Ok(None) };
        Ok(Some(EngineImage {
            id,
            config_digest: config_digest(&image),
            size_bytes: self.size(name, &image).await?,
            repo_digests: image.repo_digests.unwrap_or_default(),
            names: image.repo_tags.unwrap_or_default(),
            labels: image.config.and_then(|config| config.labels).unwrap_or_default(),
        }))
    }
}

#[tonic::async_trait]
impl RunningWork for DockerWork {
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

impl From<BollardError> for EngineError {
    fn from(error: BollardError) -> Self {
        if let BollardError::DockerStreamError { error } = error {
            return Self::new(Fault::of_message(&error).unwrap_or(Fault::User), error);
        }
        let BollardError::DockerResponseServerError { status_code, message } = error else {
            return Self::Broken(error.to_string());
        };
        match status_code {
            429 => Self::Unreachable(message),
            400..=499 => Self::Refused(message),
            _ => Self::new(Fault::of_message(&message).unwrap_or(Fault::Engine), message),
        }
    }
}
