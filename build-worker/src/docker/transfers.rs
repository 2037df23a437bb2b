//! Pulls and pushes.

use std::time::Duration;

use bollard::{
    Docker,
    auth::DockerCredentials,
    errors::Error as BollardError,
    models::ProgressDetail,
    query_parameters::{CreateImageOptionsBuilder, PushImageOptions},
};
use futures_util::{Stream, StreamExt};

use super::{DockerEngine, connect, layers::Layers, solve::Teller};
use crate::{
    engine::{EngineError, Progress, RunningWork, Told},
    reference,
    registries::{Credentials, CredentialsError},
};

/// What the engine says of a layer, or of all of them.
struct Transferred {
    id: Option<String>,
    status: Option<String>,
    detail: Option<ProgressDetail>,
}

impl DockerEngine {
    pub(super) fn start_pull(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (repository, tag) = reference::parts(reference);
        let options = CreateImageOptionsBuilder::new().from_image(repository).tag(tag).build();
        self.transfer(format!("pull {reference}"), reference, move |docker, credentials| {
            docker.create_image(Some(options.clone()), None, credentials).map(|info| {
                info.map(|info| Transferred {
                    id: info.id,
                    status: info.status,
                    detail: info.progress_detail,
                })
            })
        })
    }

    pub(super) fn start_push(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (repository, tag) = reference::parts(reference);
        let options = PushImageOptions { tag: Some(tag.to_owned()), ..PushImageOptions::default() };
        let repository = repository.to_owned();
        self.transfer(format!("push {reference}"), reference, move |docker, credentials| {
            docker.push_image(&repository, Some(options.clone()), credentials).map(|info| {
                info.map(|info| Transferred { id: None, status: info.status, detail: info.progress_detail })
            })
        })
    }

    pub(super) async fn digest_in_registry(&self, reference: &str) -> Result<String, EngineError> {
        let credentials = self.registries.credentials(reference).await?;
        let found = self.docker.inspect_registry_image(reference, credentials.map(Into::into)).await;
        found?
            .descriptor
            .digest
            .ok_or_else(|| EngineError::Broken(format!("no registry tells the digest of {reference}")))
    }

    /// Runs something that speaks of layers. The engine gives it up when its connection closes.
    fn transfer<S>(
        &self,
        name: String,
        reference: &str,
        begin: impl Fn(&Docker, Option<DockerCredentials>) -> S + Send + 'static,
    ) -> Result<Box<dyn RunningWork>, EngineError>
    where
        S: Stream<Item = Result<Transferred, BollardError>> + Send,
    {
        /// An engine that finds a registry busy when it asks what that wants goes on without the credentials, and is refused.
        const TRIES_WITH_CREDENTIALS: u32 = 2;
        const PAUSE: Duration = Duration::from_millis(500);

        let (registries, reference) = (self.registries.clone(), reference.to_owned());
        let connections = self.connections.separate();
        let docker = connect(&connections, Self::WORK_TIMEOUT_SECONDS)?;
        // Closing its connections makes the engine give it up, and ends what reads them.
        let cancel = connections.closed().clone();
        Ok(Self::run(connections, cancel, false, async move |tell: Teller| {
            let mut layers = Layers::new(name);
            if !say(&tell, layers.begun()).await {
                return;
            }
            let ended = match registries.credentials(&reference).await {
                Ok(credentials) => {
                    let mut tries = 1;
                    loop {
                        let stream = begin(&docker, credentials.clone().map(Into::into));
                        match tell_layers(stream, &mut layers, &tell).await {
                            Err(error)
                                if credentials.is_some()
                                    && tries < TRIES_WITH_CREDENTIALS
                                    && wants_credentials(&error) =>
                            {
                                tries += 1;
                                tokio::time::sleep(PAUSE).await;
                            }
                            ended => break ended,
                        }
                    }
                }
                Err(error) => Err(error.into()),
            };
            // Whoever does not listen any more need not hear it.
            match ended {
                Ok(()) => drop(say(&tell, layers.succeeded()).await),
                Err(error) => {
                    say(&tell, layers.failed(error.to_string())).await;
                    drop(tell.send(Err(error)).await);
                }
            }
        }))
    }
}

/// Returns whether a registry has refused because it was given no credentials, or none that it takes.
fn wants_credentials(error: &EngineError) -> bool {
    const WORDS: [&str; 3] = ["unauthorized", "authentication required", "no basic auth credentials"];
    matches!(error, EngineError::Refused(message) if WORDS.iter().any(|words| message.contains(words)))
}

/// Tells what the engine says, until it has ended, or nobody listens any more.
async fn tell_layers(
    stream: impl Stream<Item = Result<Transferred, BollardError>>,
    layers: &mut Layers,
    tell: &Teller,
) -> Result<(), EngineError> {
    let mut stream = std::pin::pin!(stream);
    while let Some(said) = stream.next().await {
        let Transferred { id, status, detail } = said?;
        let progress = layers.told(id, status, detail);
        if !progress.is_empty() && !say(tell, progress).await {
            break;
        }
    }
    Ok(())
}

/// Whether somebody listens.
async fn say(tell: &Teller, progress: Vec<Progress>) -> bool {
    tell.send(Ok(Told::Progress(progress))).await.is_ok()
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
