//! Vertexes of a build, and progress messages about them.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{SystemTime, UNIX_EPOCH};

use bollard::moby::buildkit::v1::{StatusResponse, Vertex, VertexLog, VertexStatus};

/// Returns a progress message about these vertexes.
pub(super) fn progress(vertexes: &[Vertex]) -> StatusResponse {
    StatusResponse { vertexes: vertexes.to_vec(), ..StatusResponse::default() }
}

/// Returns a progress message with output.
pub(super) fn output(logs: Vec<VertexLog>) -> StatusResponse {
    StatusResponse { logs, ..StatusResponse::default() }
}

/// Returns the vertexes in which a real engine loads the context.
pub(super) fn context(seed: &str) -> [Vertex; 2] {
    let load = announce("[internal] load remote build context", seed, None);
    let copy = announce("copy /context /", seed, Some(&load));
    [load, copy]
}

/// Returns the vertexes of steps with these names, none of which has started.
pub(super) fn steps<'a>(names: impl Iterator<Item = &'a str>, seed: &str) -> Vec<Vertex> {
    let [_, context] = context(seed);
    let mut steps: Vec<Vertex> = Vec::new();
    for name in names {
        let before = steps.last().unwrap_or(&context);
        steps.push(announce(name, seed, Some(before)));
    }
    steps
}

/// Returns a vertex that has not started. The vertexes of one build form a chain.
pub(super) fn announce(name: &str, seed: &str, before: Option<&Vertex>) -> Vertex {
    Vertex {
        digest: digest(&format!("{seed} {name}")),
        inputs: before.iter().map(|vertex| vertex.digest.clone()).collect(),
        name: name.to_owned(),
        ..Vertex::default()
    }
}

/// Marks the vertex as started now.
pub(super) fn start(vertex: &mut Vertex) {
    let at = vertex.started.get_or_insert_default();
    (at.seconds, at.nanos) = now();
}

/// Marks the vertex as completed now.
pub(super) fn complete(vertex: &mut Vertex) {
    let at = vertex.completed.get_or_insert_default();
    (at.seconds, at.nanos) = now();
}

/// Returns one piece of output. Stream 1 is the standard output, 2 the standard error.
pub(super) fn log(vertex: &Vertex, stream: i64, text: String) -> VertexLog {
    let mut log =
        VertexLog { vertex: vertex.digest.clone(), stream, msg: text.into_bytes(), ..VertexLog::default() };
    let at = log.timestamp.get_or_insert_default();
    (at.seconds, at.nanos) = now();
    log
}

/// Returns the status of a completed part of a vertex, like "writing image …".
pub(super) fn done(vertex: &Vertex, id: &str) -> VertexStatus {
    let mut status =
        VertexStatus { id: id.to_owned(), vertex: vertex.digest.clone(), ..VertexStatus::default() };
    let at = status.timestamp.get_or_insert_default();
    (at.seconds, at.nanos) = now();
    status.started = status.timestamp;
    status.completed = status.timestamp;
    status
}

/// Returns the command of a step like `[2/2] RUN make`, as the shell runs it.
pub(super) fn command(vertex: &Vertex) -> Option<String> {
    let (_, command) = vertex.name.split_once("] RUN ")?;
    Some(format!("/bin/sh -c {command}"))
}

/// Returns a made-up digest, which depends only on the seed.
pub(super) fn digest(seed: &str) -> String {
    let part = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, seed).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    };
    format!("sha256:{}{}{}{}", part(0), part(1), part(2), part(3))
}

fn now() -> (i64, i32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let nanos = i32::try_from(since.subsec_nanos()).unwrap_or_default();
    (seconds, nanos)
}
