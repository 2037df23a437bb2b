//! The Docker Engine: builds by BuildKit, tags and images. The only file that names bollard.
//!
//! Every build gets connections of its own, named by its attempt: so it can be cancelled by that name, read to its real end,
//! and leaves no session behind.

use std::{collections::HashMap, time::Duration};

use bollard::{
    API_DEFAULT_VERSION, Docker,
    auth::DockerCredentials,
    errors::Error as BollardError,
    models::ContainerConfig,
    query_parameters::{
        BuildImageOptions, BuilderVersion, CommitContainerOptionsBuilder, CreateImageOptionsBuilder,
        InspectContainerOptions, ListImagesOptionsBuilder, PushImageOptions, RemoveImageOptionsBuilder,
        TagImageOptionsBuilder,
    },
};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::{sync::DropGuard, task::AbortOnDropHandle};

use self::{
    layers::Layers,
    silence::Silence,
    transport::{Connections, Host},
};
use crate::{
    engine::{BuildOrder, Canceller, Engine, EngineError, EngineImage, EngineInfo, RunningWork, Told},
    registries::{Credentials, CredentialsError, Registries},
};

mod layers;
mod progress;
mod silence;
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

    /// Runs something that speaks of layers. The engine gives it up when its connection closes.
    fn transfer<S>(
        &self,
        name: String,
        reference: &str,
        begin: impl FnOnce(Docker, Option<DockerCredentials>) -> S + Send + 'static,
    ) -> Result<Box<dyn RunningWork>, EngineError>
    where
        S: Stream<Item = Result<Transferred, BollardError>> + Send,
    {
        let connections = Connections::to(self.host.clone(), None);
        let docker = connect(&connections, Self::BUILD_TIMEOUT_SECONDS)?;
        let (tell, hear) = mpsc::channel(Self::TOLD);
        let (registries, reference) = (self.registries.clone(), reference.to_owned());
        let reader = tokio::spawn(async move {
            let mut layers = Layers::new(name);
            let tell = |told| async { tell.send(told).await.is_ok() };
            if !tell(Ok(Told::Progress(layers.begun()))).await {
                return;
            }
            let ended = match registries.credentials(&reference).await {
                Ok(credentials) => {
                    let mut stream = std::pin::pin!(begin(docker, credentials.map(Into::into)));
                    loop {
                        match stream.next().await {
                            Some(Ok(Transferred { id, status, detail })) => {
                                let progress = layers.told(id, status, detail);
                                if !progress.is_empty() && !tell(Ok(Told::Progress(progress))).await {
                                    return;
                                }
                            }
                            Some(Err(error)) => break Err(of_registry(error)),
                            None => break Ok(()),
                        }
                    }
                }
                Err(error) => Err(error.into()),
            };
            match ended {
                Ok(()) => {
                    tell(Ok(Told::Progress(layers.succeeded()))).await;
                }
                Err(error) => {
                    if tell(Ok(Told::Progress(layers.failed(error.to_string())))).await {
                        tell(Err(error)).await;
                    }
                }
            }
        });
        Ok(Box::new(DockerWork {
            name: None,
            _close: connections.closed().clone().drop_guard(),
            connections,
            told: hear,
            _reader: AbortOnDropHandle::new(reader),
        }))
    }
}

/// What the engine says of a layer, or of all of them.
struct Transferred {
    id: Option<String>,
    status: Option<String>,
    detail: Option<bollard::models::ProgressDetail>,
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
        let connections = Connections::to(self.host.clone(), Some(order.name.clone()));
        let docker = connect(&connections, Self::BUILD_TIMEOUT_SECONDS)?;
        let options = BuildImageOptions {
            dockerfile: "Dockerfile".to_owned(),
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
        let (tell, hear) = mpsc::channel(Self::TOLD);
        let registries = self.registries.clone();
        let reader = tokio::spawn(async move {
            let credentials = registries.all().await.into_iter().map(|(name, found)| (name, found.into()));
            let mut stream = docker.build_image(
                options,
                Some(credentials.collect()),
                Some(bollard::body_full(order.context)),
            );
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
        });
        Ok(Box::new(DockerWork {
            name: Some(order.name),
            _close: connections.closed().clone().drop_guard(),
            connections,
            told: hear,
            _reader: AbortOnDropHandle::new(reader),
        }))
    }

    fn pull(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (repository, tag) = split(reference);
        let options = CreateImageOptionsBuilder::new().from_image(repository).tag(tag).build();
        self.transfer(format!("pull {reference}"), reference, |docker, credentials| {
            docker.create_image(Some(options), None, credentials).map(|info| {
                info.map(|info| Transferred {
                    id: info.id,
                    status: info.status,
                    detail: info.progress_detail,
                })
            })
        })
    }

    fn push(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (repository, tag) = split(reference);
        let options = PushImageOptions { tag: Some(tag.to_owned()), ..PushImageOptions::default() };
        let repository = repository.to_owned();
        self.transfer(format!("push {reference}"), reference, move |docker, credentials| {
            docker.push_image(&repository, Some(options), credentials).map(|info| {
                info.map(|info| Transferred { id: None, status: info.status, detail: info.progress_detail })
            })
        })
    }

    async fn registry_digest(&self, reference: &str) -> Result<String, EngineError> {
        let credentials = self.registries.credentials(reference).await?;
        let found = self.docker.inspect_registry_image(reference, credentials.map(Into::into)).await;
        found
            .map_err(of_registry)?
            .descriptor
            .digest
            .ok_or_else(|| EngineError::Broken(format!("no registry tells the digest of {reference}")))
    }

    async fn tag(&self, image: &str, repository: &str, tag: &str) -> Result<(), EngineError> {
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
        let (repository, tag) = split(name);
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

    async fn tags_of(&self, label: &str, value: &str) -> Result<Vec<String>, EngineError> {
        let filters = HashMap::from([("label", vec![format!("{label}={value}")])]);
        let options = ListImagesOptionsBuilder::new().filters(&filters).build();
        let mut images = self.docker.list_images(Some(options)).await?;
        images.retain(|image| image.labels.get(label).is_some_and(|found| found == value));
        Ok(images.into_iter().flat_map(|image| image.repo_tags).collect())
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

/// A reference as repository and tag, or repository and digest.
fn split(reference: &str) -> (&str, &str) {
    if let Some(parts) = reference.split_once('@') {
        return parts;
    }
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        Some(_) | None => (reference, "latest"),
    }
}

/// What a registry has refused is nobody else's trouble, though the engine calls much of it an error of its own.
fn of_registry(error: BollardError) -> EngineError {
    const REFUSALS: [&str; 7] = [
        "unauthorized",
        "authentication required",
        "no basic auth credentials",
        "denied",
        "manifest unknown",
        "not found",
        "server gave HTTP response to HTTPS client",
    ];
    match EngineError::from(error) {
        EngineError::Broken(message) if REFUSALS.iter().any(|refusal| message.contains(refusal)) => {
            EngineError::Refused(message)
        }
        error @ (EngineError::Broken(_) | EngineError::Refused(_)) => error,
    }
}

impl From<Credentials> for DockerCredentials {
    fn from(credentials: Credentials) -> Self {
        match credentials {
            Credentials::Password { user, password } => {
                Self { username: Some(user), password: Some(password), ..Self::default() }
            }
            Credentials::IdentityToken(token) => Self { identitytoken: Some(token), ..Self::default() },
        }
    }
}

impl From<CredentialsError> for EngineError {
    fn from(error: CredentialsError) -> Self {
        Self::Refused(error.to_string())
    }
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
