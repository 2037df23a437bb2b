//! Pulls and pushes.

use bollard::{
    Docker,
    auth::DockerCredentials,
    errors::Error as BollardError,
    models::ProgressDetail,
    query_parameters::{CreateImageOptionsBuilder, PushImageOptions},
};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;

use super::{DockerEngine, layers::Layers};
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

type Teller = mpsc::Sender<Result<Told, EngineError>>;

impl DockerEngine {
    pub(super) fn start_pull(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (repository, tag) = reference::parts(reference);
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

    pub(super) fn start_push(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        let (repository, tag) = reference::parts(reference);
        let options = PushImageOptions { tag: Some(tag.to_owned()), ..PushImageOptions::default() };
        let repository = repository.to_owned();
        self.transfer(format!("push {reference}"), reference, move |docker, credentials| {
            docker.push_image(&repository, Some(options), credentials).map(|info| {
                info.map(|info| Transferred { id: None, status: info.status, detail: info.progress_detail })
            })
        })
    }

    pub(super) async fn digest_in_registry(&self, reference: &str) -> Result<String, EngineError> {
        let credentials = self.registries.credentials(reference).await?;
        let found = self.docker.inspect_registry_image(reference, credentials.map(Into::into)).await;
        found
            .map_err(of_registry)?
            .descriptor
            .digest
            .ok_or_else(|| EngineError::Broken(format!("no registry tells the digest of {reference}")))
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
        let (registries, reference) = (self.registries.clone(), reference.to_owned());
        self.run(None, async move |docker, tell| {
            let mut layers = Layers::new(name);
            if !say(&tell, layers.begun()).await {
                return;
            }
            let ended = match registries.credentials(&reference).await {
                Ok(credentials) => {
                    let stream = begin(docker, credentials.map(Into::into));
                    tell_layers(stream, &mut layers, &tell).await
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
        })
    }
}

/// Tells what the engine says, until it has ended, or nobody listens any more.
async fn tell_layers(
    stream: impl Stream<Item = Result<Transferred, BollardError>>,
    layers: &mut Layers,
    tell: &Teller,
) -> Result<(), EngineError> {
    let mut stream = std::pin::pin!(stream);
    while let Some(said) = stream.next().await {
        let Transferred { id, status, detail } = said.map_err(of_registry)?;
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
