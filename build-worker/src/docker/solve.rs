//! A build: one call of Solve, with its progress from Status, over a connection of its own.
//!
//! Dropping the call cancels the build; the engine has ended it once Status ends.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use bollard::moby::buildkit::v1::{CacheOptions, SolveRequest, StatusRequest};
use futures_util::StreamExt;
use prost::Message;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::{clips::Clips, control::Control, progress, session::DOCKERFILE_SOURCE, source_policy};
use crate::{
    engine::{BuildOrder, BuiltImage, Dockerfile, EngineError, EngineEvent, EventSender},
    fault::{Fault, without_answer},
};

/// The engine's own frontend.
const DOCKERFILE: &str = "dockerfile.v0";

/// Runs a build to its end; returns `None` if it was cancelled.
///
/// `stages` are those of its Dockerfile, as far as they are known.
///
/// # Errors
///
/// Returns the error that the build failed with.
pub(super) async fn solve(
    control: &Control,
    request: SolveRequest,
    stages: &[String],
    cancel: &CancellationToken,
    events: &EventSender,
) -> Result<Option<BuiltImage>, EngineError> {
    /// Time that the remaining progress may take once the outcome is known.
    const REST: Duration = Duration::from_secs(5);
    /// Time after which a build that was cancelled before any progress counts as not started.
    ///
    /// The engine looks for such a build for some seconds.
    const NOT_BEGUN: Duration = Duration::from_secs(1);
    const NOT_ALL: &str = "the Docker Engine does not report the rest of this build's progress";

    let mut client = control.client.clone();
    let has_begun = AtomicBool::new(false);
    let relaying = relay_progress(control, request.r#ref.clone(), stages, events, &has_begun);
    // Dropping the call leaves the engine no reason to continue.
    let solving = cancel.run_until_cancelled(client.solve(request));
    tokio::pin!(relaying, solving);
    let (solved, has_all_progress) = tokio::select! {
        solved = &mut solving => (solved, false),
        () = &mut relaying => (solving.await, true),
    };
    let Some(solved) = solved else {
        if !has_all_progress
            && tokio::time::timeout(NOT_BEGUN, &mut relaying).await.is_err()
            && has_begun.load(Ordering::Relaxed)
        {
            relaying.await;
        }
        return Ok(None);
    };
    if !has_all_progress && tokio::time::timeout(REST, relaying).await.is_err() {
        // The receiver may be gone.
        let _ = events.send(Ok(EngineEvent::Gap(NOT_ALL))).await;
    }
    let mut response = solved.map_err(|status| error_of(&status))?.into_inner().exporter_response;
    let mut digest = |key: &str| response.remove(key).unwrap_or_default();
    let built = BuiltImage {
        id: digest("containerimage.digest"),
        config_digest: digest("containerimage.config.digest"),
    };
    if built.id.is_empty() {
        return Err(EngineError::Broken("it ended the build without an image".to_owned()));
    }
    Ok(Some(built))
}

/// Relays progress until the engine has no more, or the receiver is gone.
async fn relay_progress(
    control: &Control,
    reference: String,
    stages: &[String],
    events: &EventSender,
    has_begun: &AtomicBool,
) {
    let mut client = control.client.clone();
    let mut messages = match client.status(StatusRequest { r#ref: reference }).await {
        Ok(messages) => messages.into_inner(),
        Err(error) => return tracing::debug!(%error, "a build has no progress"),
    };
    let mut clips = Clips::default();
    while let Some(message) = messages.next().await {
        has_begun.store(true, Ordering::Relaxed);
        match message.map(|message| progress::progress(message, stages, &mut clips)) {
            Ok(progress) if progress.is_empty() => {}
            Ok(progress) => {
                if events.send(Ok(EngineEvent::Progress(progress))).await.is_err() {
                    return;
                }
            }
            Err(error) => return tracing::debug!(%error, "the progress of a build has broken off"),
        }
    }
}

/// Returns the request for a build by this frontend, the name of an image, or else by the engine's own.
pub(super) fn request(order: &BuildOrder, name: &str, frontend: Option<&str>, session: &str) -> SolveRequest {
    let context = format!("http://buildkit-session/{session}");
    let (filename, is_beside) = match &order.dockerfile {
        Dockerfile::InContext(path) => (path, false),
        Dockerfile::Beside { name, .. } => (name, true),
    };
    let mut attributes = HashMap::from([
        ("context".to_owned(), context.clone()),
        ("filename".to_owned(), filename.clone()),
        ("cgroup-parent".to_owned(), order.cgroup_parent.clone()),
        // Keeps a frontend from fetching and running another one that the Dockerfile names: a client that
        // sends a command line counts as a frontend.
        ("cmdline".to_owned(), frontend.unwrap_or(DOCKERFILE).to_owned()),
        // The memory of a process may hold a secret: it is never dumped, not even to a program, as with 0.
        ("ulimit".to_owned(), "core=1:1".to_owned()),
        // What the engine has need not be asked for: the worker has decided what stands for each name.
        ("image-resolve-mode".to_owned(), "local".to_owned()),
    ]);
    // Frontends of the first kind run in a container, without the host's network.
    let kind = if frontend.is_some() { "gateway.v0" } else { DOCKERFILE };
    if is_beside {
        attributes.insert("dockerfilekey".to_owned(), DOCKERFILE_SOURCE.to_owned());
    }
    if let Some(image) = frontend {
        attributes.insert("source".to_owned(), image.to_owned());
    }
    if !order.target.is_empty() {
        attributes.insert("target".to_owned(), order.target.clone());
    }
    if order.no_cache {
        attributes.insert("no-cache".to_owned(), String::new());
    }
    for (prefix, values) in [("build-arg", &order.build_args), ("label", &order.labels)] {
        attributes.extend(values.iter().map(|(name, value)| (format!("{prefix}:{name}"), value.clone())));
    }
    let mut exporter = HashMap::from([("name".to_owned(), order.tag.clone())]);
    if !order.compression.is_empty() {
        exporter.insert("compression".to_owned(), order.compression.clone());
    }
    SolveRequest {
        r#ref: name.to_owned(),
        session: session.to_owned(),
        frontend: kind.to_owned(),
        frontend_attrs: attributes,
        exporter_deprecated: "moby".to_owned(),
        exporter_attrs_deprecated: exporter,
        cache: Some(CacheOptions::default()),
        source_policy: Some(source_policy::policy(order.sources.as_ref(), &context)),
        // The catalogue keeps the history of builds. The engine's history would store every log, and a cancel
        // would wait for it.
        internal: true,
        ..SolveRequest::default()
    }
}

/// The exit status of a step's process, as BuildKit attaches it to an error.
#[derive(Deserialize)]
struct ExitMessage {
    #[serde(rename = "Code")]
    _code: u32,
}

/// Converts the error of a call.
pub(super) fn error_of(status: &Status) -> EngineError {
    const EXIT: &str = "gatewayapi.ExitMessage+json";
    let message = status.message().to_owned();
    // An error on this side of the connection has a source; the engine's own errors have none.
    if let Some(source) = std::error::Error::source(status) {
        // The innermost says what happened.
        let innermost = std::iter::successors(Some(source), |error| error.source()).last().unwrap_or(source);
        return EngineError::Broken(format!("{message}: {innermost}"));
    }
    let details = tonic_types::pb::Status::decode(status.details()).unwrap_or_default().details;
    let is_exit = details.iter().any(|detail| {
        detail.type_url.ends_with(EXIT) && serde_json::from_slice::<ExitMessage>(&detail.value).is_ok()
    });
    let by_code = || match status.code() {
        Code::Unavailable | Code::Internal | Code::Aborted | Code::Cancelled | Code::ResourceExhausted => {
            Fault::Engine
        }
        Code::DeadlineExceeded => Fault::Remote,
        Code::Ok
        | Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::DataLoss
        | Code::Unauthenticated => Fault::User,
    };
    let fault = if is_exit { Fault::User } else { Fault::of_message(&message).unwrap_or_else(by_code) };
    let quotes_an_answer = !is_exit && message.contains("response body");
    EngineError::new(fault, if quotes_an_answer { without_answer(&message) } else { message })
}
