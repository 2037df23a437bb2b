//! Pulls and pushes of images.

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
    engine::{EngineError, EngineEvent, Progress, RunningWork},
    reference,
    registry_credentials::{Credentials, CredentialsError},
};

/// A message of the engine about one layer, or about the whole transfer.
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
        let credentials = self.docker_config.credentials(reference).await?;
        let found = self.docker.inspect_registry_image(reference, credentials.map(Into::into)).await;
        found?
            .descriptor
            .digest
            .ok_or_else(|| EngineError::Broken(format!("no registry tells the digest of {reference}")))
    }

    /// Runs a transfer that reports layers; the engine aborts it when its connection closes.
    fn transfer<S>(
        &self,
        name: String,
        reference: &str,
        begin: impl Fn(&Docker, Option<DockerCredentials>) -> S + Send + 'static,
    ) -> Result<Box<dyn RunningWork>, EngineError>
    where
        S: Stream<Item = Result<Transferred, BollardError>> + Send,
    {
        /// Maximum number of attempts with credentials.
        ///
        /// An engine that finds a registry busy while it asks for the authentication scheme continues without the
        /// credentials, and is refused.
        const TRIES_WITH_CREDENTIALS: u32 = 2;
        const PAUSE: Duration = Duration::from_millis(500);

        let (docker_config, reference) = (self.docker_config.clone(), reference.to_owned());
        let connections = self.connections.separate();
        let docker = connect(&connections, Self::WORK_TIMEOUT_SECONDS)?;
        // Closing the connections makes the engine abort the transfer and ends the reader.
        let cancel = connections.closed().clone();
        Ok(Self::run(connections, cancel, false, async move |tell: Teller| {
            let mut layers = Layers::new(name);
            if !say(&tell, layers.begun()).await {
                return;
            }
            let ended = match docker_config.credentials(&reference).await {
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
            // The receiver may be gone.
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

/// Reports whether a registry refused for lack of credentials that it accepts.
fn wants_credentials(error: &EngineError) -> bool {
    const WORDS: [&str; 3] = ["unauthorized", "authentication required", "no basic auth credentials"];
    matches!(error, EngineError::Refused(message) if WORDS.iter().any(|words| message.contains(words)))
}

/// Relays the engine's messages until the transfer has ended or the receiver is gone.
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

/// Sends progress and reports whether the receiver is still there.
async fn say(tell: &Teller, progress: Vec<Progress>) -> bool {
    tell.send(Ok(EngineEvent::Progress(progress))).await.is_ok()
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
