//! Pulls and pushes of images.

use std::time::Duration;

use bollard::{
    Docker,
    auth::DockerCredentials,
    errors::Error as BollardError,
    models::{DistributionInspect, ProgressDetail},
    query_parameters::{CreateImageOptionsBuilder, PushImageOptions},
};
use futures_util::{Stream, StreamExt, TryStreamExt};

use super::{DockerEngine, connect, credentials::Found, layers::Layers};
use crate::{
    engine::{EngineError, EngineEvent, EventSender, Progress, RunningWork},
    reference,
};

/// A transfer of an image between a registry and the engine.
#[derive(Clone, Debug)]
enum Transfer {
    /// A pull of a reference with a digest, which its progress calls by another name.
    Pull { name: String, pinned: String },
    /// A push of a reference.
    Push(String),
}

/// A message of the engine about one layer, or about the whole transfer.
struct Transferred {
    id: Option<String>,
    status: Option<String>,
    detail: Option<ProgressDetail>,
}

impl Transfer {
    fn reference(&self) -> &str {
        match self {
            Self::Pull { pinned: reference, .. } | Self::Push(reference) => reference,
        }
    }

    /// Returns the name of the step for the whole transfer.
    fn name(&self) -> String {
        match self {
            Self::Pull { name, .. } => format!("pull {name}"),
            Self::Push(reference) => format!("push {reference}"),
        }
    }

    /// Runs the transfer to its end.
    async fn run(
        &self,
        docker: &Docker,
        credentials: Option<DockerCredentials>,
        layers: &mut Layers,
        events: &EventSender,
    ) -> Result<(), EngineError> {
        match self {
            // A pull by digest sets no tag; one by tag would take the tag from the image that has it.
            Self::Pull { pinned, .. } => {
                let (repository, digest) = reference::parts(pinned);
                let options = CreateImageOptionsBuilder::new().from_image(repository).tag(digest).build();
                let pulling = docker.create_image(Some(options), None, credentials).map_ok(|info| {
                    Transferred { id: info.id, status: info.status, detail: info.progress_detail }
                });
                relay_layers(pulling, layers, events).await
            }
            Self::Push(reference) => {
                let (repository, tag) = reference::parts(reference);
                let options = PushImageOptions { tag: Some(tag.to_owned()), ..PushImageOptions::default() };
                let pushing = docker.push_image(repository, Some(options), credentials).map_ok(|info| {
                    Transferred { id: None, status: info.status, detail: info.progress_detail }
                });
                relay_layers(pushing, layers, events).await
            }
        }
    }
}

impl DockerEngine {
    pub(super) fn start_pull(
        &self,
        name: &str,
        pinned: &str,
        creator: &str,
    ) -> Result<Box<dyn RunningWork>, EngineError> {
        let transfer = Transfer::Pull { name: name.to_owned(), pinned: pinned.to_owned() };
        self.transfer(transfer, creator)
    }

    pub(super) fn start_push(
        &self,
        reference: &str,
        creator: &str,
    ) -> Result<Box<dyn RunningWork>, EngineError> {
        self.transfer(Transfer::Push(reference.to_owned()), creator)
    }

    /// Asks the registry of a reference for the image.
    pub(super) async fn inspect_in_registry(
        &self,
        reference: &str,
        creator: &str,
    ) -> Result<DistributionInspect, EngineError> {
        let found = Found::look_up(&self.docker_config, reference, creator).await;
        let inspected = self.docker.inspect_registry_image(reference, found.credentials.clone()).await;
        inspected.map_err(|error| found.explain(error.into()))
    }

    /// Runs a transfer that reports layers; the engine aborts it when its connection closes.
    fn transfer(&self, transfer: Transfer, creator: &str) -> Result<Box<dyn RunningWork>, EngineError> {
        /// Maximum number of attempts with credentials.
        ///
        /// An engine that finds a registry busy while it asks for the authentication scheme continues without
        /// the credentials, and is refused.
        const TRIES_WITH_CREDENTIALS: u32 = 2;
        const PAUSE: Duration = Duration::from_millis(500);

        let (docker_config, creator) = (self.docker_config.clone(), creator.to_owned());
        let connections = self.connections.separate();
        let docker = connect(&connections, Self::WORK_TIMEOUT_SECONDS)?;
        // Closing the connections makes the engine abort the transfer and ends the reader.
        let cancel = connections.closed().clone();
        let closed = cancel.clone();
        Ok(Self::run(connections, cancel, false, async move |events: EventSender| {
            let mut layers = Layers::new(transfer.name());
            if !send_progress(&events, layers.begun()).await {
                return;
            }
            // This may run a helper, which ends when the transfer is cancelled.
            let look_up = Found::look_up(&docker_config, transfer.reference(), &creator);
            let Some(found) = closed.run_until_cancelled(look_up).await else { return };
            let mut tries = 1;
            let ended = loop {
                let may_try = found.credentials.is_some() && tries < TRIES_WITH_CREDENTIALS;
                match transfer.run(&docker, found.credentials.clone(), &mut layers, &events).await {
                    Err(error) if may_try && wants_credentials(&error) => {
                        tries += 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    ended => break ended.map_err(|error| found.explain(error)),
                }
            };
            // The receiver may be gone.
            match ended {
                Ok(()) => drop(send_progress(&events, layers.succeeded()).await),
                Err(error) => {
                    send_progress(&events, layers.failed(error.to_string())).await;
                    drop(events.send(Err(error)).await);
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
async fn relay_layers(
    stream: impl Stream<Item = Result<Transferred, BollardError>>,
    layers: &mut Layers,
    events: &EventSender,
) -> Result<(), EngineError> {
    let mut stream = std::pin::pin!(stream);
    while let Some(message) = stream.next().await {
        let Transferred { id, status, detail } = message?;
        let progress = layers.convert(id, status, detail);
        if !progress.is_empty() && !send_progress(events, progress).await {
            break;
        }
    }
    Ok(())
}

/// Sends progress and reports whether the receiver is still there.
async fn send_progress(events: &EventSender, progress: Vec<Progress>) -> bool {
    events.send(Ok(EngineEvent::Progress(progress))).await.is_ok()
}
