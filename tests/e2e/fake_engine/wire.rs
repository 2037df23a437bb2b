//! Answers of the REST API, in the engine's format.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use http_body_util::combinators::BoxBody;
use serde_json::{Value, json};

use super::release::Release;

/// The body of every answer.
pub(super) type Body = BoxBody<Bytes, Infallible>;

/// Returns an answer with this body.
pub(super) fn answer(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Body> {
    let mut answer = Response::new(BoxBody::new(Full::new(body.into())));
    *answer.status_mut() = status;
    answer.headers_mut().insert("Content-Type", HeaderValue::from_static(content_type));
    answer
}

pub(super) fn json_answer(status: StatusCode, value: &Value) -> Response<Body> {
    answer(status, "application/json", format!("{value}\n"))
}

/// Returns an error in the engine's format: a status and `{"message":"…"}`.
pub(super) fn problem(status: StatusCode, message: &str) -> Response<Body> {
    json_answer(status, &json!({ "message": message }))
}

/// Adds the headers that the engine puts on every answer.
pub(super) fn sign(answer: &mut Response<Body>, release: &Release) {
    let server = format!("Docker/{} (linux)", release.version());
    let values = [
        ("Api-Version", release.api()),
        ("Docker-Experimental", "false".to_owned()),
        ("Ostype", "linux".to_owned()),
        ("Server", server),
    ];
    for (name, value) in values {
        let value = HeaderValue::try_from(value).expect("a version is plain text");
        answer.headers_mut().insert(name, value);
    }
}
