//! Solve: the context is loaded, the build is recorded, and its script is played.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::sync::Arc;

use anyhow::Context as _;
use bollard::moby::buildkit::v1::{SolveRequest, SolveResponse};
use bytes::Bytes;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::connection::Connection;
use super::failure::Failure;
use super::player::Player;
use super::progress::Progress;
use super::script::End;
use super::{Ended, RecordedBuild, Shared, session};

/// Host in the URL of a context that the session serves.
const SESSION_HOST: &str = "buildkit-session";

/// A Solve call that waits for its build.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) connection: Connection,
    /// Cancelled when the client drops the call.
    pub(super) cancel: CancellationToken,
    pub(super) progress: Progress,
}

/// Runs a build, and answers its Solve call after the readers have taken the last progress.
pub(super) async fn run(
    request: SolveRequest,
    call: Call,
    answer: oneshot::Sender<Result<SolveResponse, Status>>,
    shared: Arc<Shared>,
) {
    let outcome = build(request, &call, &shared).await;
    call.progress.drained().await;
    call.progress.end();
    // A call that the client has dropped takes no answer.
    let _ = answer.send(outcome);
}

async fn build(request: SolveRequest, call: &Call, shared: &Arc<Shared>) -> Result<SolveResponse, Status> {
    let mut build = tokio::select! {
        build = take_in(request, call, shared) => build?,
        () = call.cancel.cancelled() => return Err(Status::cancelled("context canceled")),
        () = call.connection.gone() => return Err(Status::cancelled("context canceled")),
    };
    let script = shared.script_for(&build.dockerfile);
    let fails_at_once = matches!(script.end, End::InternalError);
    if fails_at_once {
        build.ended = Ended::Failed;
    }

    let mut index = 0;
    shared.state.send_modify(|state| {
        index = state.builds.len();
        state.builds.push(build.clone());
    });
    if fails_at_once {
        return Err(Status::internal("the fake engine has an internal error"));
    }
    Player::new(Arc::clone(shared), index, build, script, call.clone()).play().await
}

/// Fetches the context and returns the record of a new build.
async fn take_in(request: SolveRequest, call: &Call, shared: &Shared) -> Result<RecordedBuild, Status> {
    let (exporter, exporter_attributes) = exporter(&request);
    if !matches!(exporter, "" | "moby") {
        return Err(Failure::new(&format!("exporter {exporter:?} could not be found")).into_status());
    }
    let exporter = sorted(exporter_attributes);
    let attributes = sorted(&request.frontend_attrs);

    let (dockerfile, files) = context(&attributes, &request.session, shared).await?;
    Ok(RecordedBuild {
        tag: exporter.get("name").cloned(),
        session: request.session,
        build_id: request.r#ref,
        labels: labels(&attributes, &exporter),
        attributes,
        exporter,
        dockerfile,
        files,
        ended: Ended::Running,
        cancel: call.cancel.clone(),
    })
}

/// Returns the text of the Dockerfile and every file of the context.
///
/// A context from elsewhere has no files here.
async fn context(
    attributes: &BTreeMap<String, String>,
    session: &str,
    shared: &Shared,
) -> Result<(String, BTreeMap<String, Bytes>), Status> {
    let url = attributes.get("context").map_or("", String::as_str);
    let url = url.parse::<http::Uri>().unwrap_or_default();
    if url.host() != Some(SESSION_HOST) {
        return Ok(Default::default());
    }

    let archive = session::upload(session, &url, shared).await;
    // The answer has the code and message of the session's error, but not its details.
    let archive = archive.map_err(|status| Status::new(status.code(), status.message()))?;
    let files = unpack(&archive).map_err(|error| Failure::new(&format!("{error:#}")).into_status())?;
    let name = attributes.get("filename").map_or("Dockerfile", String::as_str);
    let dockerfile = match attributes.get("dockerfilekey") {
        Some(source) => Some(session::local_file(session, source, shared).await?),
        None => files.get(name.trim_start_matches("./")).cloned(),
    };
    let Some(dockerfile) = dockerfile else {
        let message = format!("failed to read dockerfile: open {name}: no such file or directory");
        return Err(Failure::new(&message).into_status());
    };
    Ok((String::from_utf8_lossy(&dockerfile).into_owned(), files))
}

/// Returns every regular file of a tar by its path.
fn unpack(archive: &[u8]) -> anyhow::Result<BTreeMap<String, Bytes>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries().context("the context as a plain tar")? {
        let mut entry = entry.context("the context as a plain tar")?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path()?.to_string_lossy().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        files.insert(path.trim_start_matches("./").to_owned(), Bytes::from(content));
    }
    Ok(files)
}

/// Returns the exporter and its attributes, from the deprecated fields or the new ones.
fn exporter(request: &SolveRequest) -> (&str, &HashMap<String, String>) {
    match request.exporters.first() {
        Some(exporter) if request.exporter_deprecated.is_empty() => (&exporter.r#type, &exporter.attrs),
        Some(_) | None => (&request.exporter_deprecated, &request.exporter_attrs_deprecated),
    }
}

/// Returns the labels of the image. A configuration given to the exporter replaces the frontend's.
fn labels(
    attributes: &BTreeMap<String, String>,
    exporter: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    if let Some(config) = exporter.get("containerimage.config") {
        let config: Value = serde_json::from_str(config).unwrap_or_default();
        return serde_json::from_value(config["config"]["Labels"].clone()).unwrap_or_default();
    }
    let labels = attributes.iter().filter_map(|(name, value)| Some((name.strip_prefix("label:")?, value)));
    labels.map(|(name, value)| (name.to_owned(), value.clone())).collect()
}

fn sorted(attributes: &HashMap<String, String>) -> BTreeMap<String, String> {
    attributes.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
}
