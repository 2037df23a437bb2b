//! `POST /build` and `POST /build/cancel`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::player::Player;
use super::script::End;
use super::wire::{self, Body};
use super::{Ended, RecordedBuild, Shared};

/// How many lines wait for a client that does not read. It is small, so that a script cannot run
/// far ahead of its client.
const LINES_AHEAD: usize = 16;

/// Takes in the context, records the build, and starts its script as the answer's body.
pub(super) async fn start(
    query: BTreeMap<String, String>,
    body: Incoming,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let mut build = match record(query, body).await {
        Ok(build) => build,
        Err(error) => {
            return wire::problem(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}"));
        }
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
        return wire::problem(StatusCode::INTERNAL_SERVER_ERROR, "the fake engine has an internal error");
    }

    let (lines, body) = mpsc::channel(LINES_AHEAD);
    let player = Player::new(Arc::clone(shared), index, build, script, lines);
    shared.spawn(player.play());
    let body = StreamBody::new(ReceiverStream::new(body).map_ok(Frame::data));
    wire::with_headers(StatusCode::OK, "application/json", BodyExt::boxed(body))
}

/// Asks every running build with this id to end. Like the engine, it does not mind if there is none.
pub(super) fn cancel(query: &BTreeMap<String, String>, shared: &Shared) -> Response<Body> {
    let Some(id) = query.get("id") else {
        return wire::problem(StatusCode::INTERNAL_SERVER_ERROR, "build ID not provided");
    };
    shared.state.send_modify(|state| {
        for build in &state.builds {
            if build.ended == Ended::Running && build.build_id.as_ref() == Some(id) {
                build.cancel.cancel();
            }
        }
    });
    wire::answer(StatusCode::OK, "application/json", "")
}

async fn record(query: BTreeMap<String, String>, body: Incoming) -> anyhow::Result<RecordedBuild> {
    let context = body.collect().await.context("the context")?.to_bytes();
    let files = unpack(&context).context("the context as a plain tar")?;

    let path = query.get("dockerfile").filter(|path| !path.is_empty());
    let path = path.map_or("Dockerfile", String::as_str);
    let dockerfile = files.get(path.trim_start_matches("./")).with_context(|| {
        format!("failed to solve with frontend dockerfile.v0: failed to read dockerfile: open {path}: no such file or directory")
    })?;
    let dockerfile = String::from_utf8_lossy(dockerfile).into_owned();

    let labels = match query.get("labels") {
        Some(labels) => serde_json::from_str(labels).context("the labels")?,
        None => BTreeMap::new(),
    };

    Ok(RecordedBuild {
        tag: query.get("t").cloned(),
        session: query.get("session").cloned(),
        build_id: query.get("buildid").cloned(),
        labels,
        query,
        dockerfile,
        files,
        ended: Ended::Running,
        cancel: CancellationToken::new(),
    })
}

/// Every regular file of a tar by its path.
fn unpack(context: &[u8]) -> anyhow::Result<BTreeMap<String, Bytes>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(context).entries()? {
        let mut entry = entry?;
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
