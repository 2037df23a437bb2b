//! The lines of a build's stream, and the answers around it, as Engine 20.10 writes them.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::moby::buildkit::v1::{StatusResponse, Vertex, VertexLog, VertexStatus};
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;
use serde_json::{Value, json};

/// The body of every answer.
pub(super) type Body = BoxBody<Bytes, io::Error>;

/// An answer with a plain body and the headers that the engine puts on every answer.
pub(super) fn answer(status: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(body.into()).map_err(|never| match never {});
    with_headers(status, content_type, body.boxed())
}

/// An answer with any body and the headers that the engine puts on every answer.
pub(super) fn with_headers(status: StatusCode, content_type: &str, body: Body) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("Api-Version", "1.41")
        .header("Content-Type", content_type)
        .header("Docker-Experimental", "false")
        .header("Ostype", "linux")
        .header("Server", "Docker/20.10.24 (linux)")
        .body(body)
        .expect("the headers are constant text")
}

pub(super) fn json_answer(status: StatusCode, value: &Value) -> Response<Body> {
    answer(status, "application/json", format!("{value}\n"))
}

/// An error as the engine words it: a status and `{"message":"…"}`.
pub(super) fn problem(status: StatusCode, message: &str) -> Response<Body> {
    json_answer(status, &json!({ "message": message }))
}

/// A line of progress.
pub(super) fn trace(status: &StatusResponse) -> Bytes {
    let aux = STANDARD.encode(status.encode_to_vec());
    Bytes::from(format!("{{\"id\":\"moby.buildkit.trace\",\"aux\":\"{aux}\"}}\n"))
}

/// A line of progress about steps.
pub(super) fn vertexes(vertexes: &[Vertex]) -> Bytes {
    trace(&StatusResponse { vertexes: vertexes.to_vec(), ..StatusResponse::default() })
}

/// A line of progress with output.
pub(super) fn logs(logs: Vec<VertexLog>) -> Bytes {
    trace(&StatusResponse { logs, ..StatusResponse::default() })
}

/// The line with the id of the image.
pub(super) fn image_id(id: &str) -> Bytes {
    line(&json!({ "id": "moby.image.id", "aux": { "ID": id } }))
}

/// The last line of a build that had a tag.
pub(super) fn tagged(tag: &str) -> Bytes {
    line(&json!({ "stream": format!("Successfully tagged {tag}\n") }))
}

/// The last line of a build that did not succeed.
pub(super) fn error(message: &str) -> Bytes {
    line(&json!({ "errorDetail": { "message": message }, "error": message }))
}

fn line(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}

/// A step that is known, but has not started. Steps of one build form a chain.
pub(super) fn vertex(name: &str, seed: &str, before: Option<&Vertex>) -> Vertex {
    Vertex {
        digest: digest(&format!("{seed} {name}")),
        inputs: before.iter().map(|vertex| vertex.digest.clone()).collect(),
        name: name.to_owned(),
        ..Vertex::default()
    }
}

/// The step has started now.
pub(super) fn start(vertex: &mut Vertex) {
    let at = vertex.started.get_or_insert_default();
    (at.seconds, at.nanos) = now();
}

/// The step has come to its end now.
pub(super) fn complete(vertex: &mut Vertex) {
    let at = vertex.completed.get_or_insert_default();
    (at.seconds, at.nanos) = now();
}

/// One piece of a step's output; stream 1 is the standard output, 2 the standard error.
pub(super) fn log(vertex: &Vertex, stream: i64, text: String) -> VertexLog {
    let mut log =
        VertexLog { vertex: vertex.digest.clone(), stream, msg: text.into_bytes(), ..VertexLog::default() };
    let at = log.timestamp.get_or_insert_default();
    (at.seconds, at.nanos) = now();
    log
}

/// A part of a step that has been done, like "writing image …".
pub(super) fn done(vertex: &Vertex, id: &str) -> VertexStatus {
    let mut status =
        VertexStatus { id: id.to_owned(), vertex: vertex.digest.clone(), ..VertexStatus::default() };
    let (seconds, nanos) = now();
    let at = status.timestamp.get_or_insert_default();
    (at.seconds, at.nanos) = (seconds, nanos);
    status.started = status.timestamp;
    status.completed = status.timestamp;
    status
}

/// A made-up digest: the same for the same seed, and different for another.
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
