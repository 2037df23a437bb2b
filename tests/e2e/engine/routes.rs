//! Which request does what.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::header::{CONNECTION, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use super::images::{Refused, with_tag};
use super::wire::{self, Body};
use super::{Shared, State, builds};

/// What an HTTP/2 client says first: its preface and empty settings.
const CLIENT_HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// What an HTTP/2 server says first: empty settings.
const SERVER_HELLO: &[u8] = b"\0\0\0\x04\0\0\0\0\0";

/// Answers one request.
pub(super) async fn answer(request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Body> {
    let method = request.method().clone();
    let path = unversioned(request.uri().path()).to_owned();
    let query = query(request.uri().query().unwrap_or_default());

    match (method.as_str(), path.as_str()) {
        ("GET", "/_ping") => wire::answer(StatusCode::OK, "text/plain; charset=utf-8", "OK"),
        ("HEAD", "/_ping") => wire::answer(StatusCode::OK, "text/plain; charset=utf-8", ""),
        ("GET", "/version") => version(),
        ("GET", "/info") => info(&shared.state.borrow()),
        ("POST", "/session") => upgrade(request, shared, CLIENT_HELLO, true),
        ("POST", "/grpc") => upgrade(request, shared, SERVER_HELLO, false),
        ("POST", "/build") => builds::start(query, request.into_body(), shared).await,
        ("POST", "/build/cancel") => builds::cancel(&query, shared),
        ("GET", "/images/json") => list(&query, shared),
        (_, path) => image(&method, path, &query, shared).unwrap_or_else(|| {
            let unexpected = format!("{method} {path}");
            shared.state.send_modify(|state| state.unexpected.push(unexpected));
            wire::problem(StatusCode::NOT_FOUND, "page not found")
        }),
    }
}

fn list(query: &BTreeMap<String, String>, shared: &Shared) -> Response<Body> {
    let filters = query.get("filters").map_or("{}", String::as_str);
    match serde_json::from_str::<BTreeMap<String, Vec<String>>>(filters) {
        Ok(filters) => {
            let labels = filters.get("label").map_or(&[][..], Vec::as_slice);
            wire::json_answer(StatusCode::OK, &shared.state.borrow().images.list(labels))
        }
        Err(error) => wire::problem(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

/// Answers a request about one image; `None` if it is not one. The name may contain slashes.
fn image(
    method: &Method,
    path: &str,
    query: &BTreeMap<String, String>,
    shared: &Shared,
) -> Option<Response<Body>> {
    let path = path.strip_prefix("/images/")?;
    match method.as_str() {
        "POST" => Some(tag(&decoded(path.strip_suffix("/tag")?), query, shared)),
        "GET" => Some(inspect(&decoded(path.strip_suffix("/json")?), shared)),
        "DELETE" => Some(remove(&decoded(path), query, shared)),
        _ => None,
    }
}

fn tag(name: &str, query: &BTreeMap<String, String>, shared: &Shared) -> Response<Body> {
    let parameter = |key: &str| query.get(key).map_or("", String::as_str);
    let repo = parameter("repo");
    let target = match parameter("tag") {
        "" => with_tag(repo),
        tag => format!("{repo}:{tag}"),
    };

    let mut known = false;
    shared.state.send_modify(|state| {
        if let Some(id) = state.images.find(name).map(|image| image.id.clone()) {
            state.images.tag(&id, &target);
            known = true;
        }
    });
    if known { wire::answer(StatusCode::CREATED, "application/json", "") } else { no_such_image(name) }
}

fn inspect(name: &str, shared: &Shared) -> Response<Body> {
    match shared.state.borrow().images.inspect(name) {
        Some(image) => wire::json_answer(StatusCode::OK, &image),
        None => {
            let name = with_tag(name);
            let message = format!("no such image: {name}: No such image: {name}");
            wire::problem(StatusCode::NOT_FOUND, &message)
        }
    }
}

fn remove(name: &str, query: &BTreeMap<String, String>, shared: &Shared) -> Response<Body> {
    let force = matches!(query.get("force").map(String::as_str), Some("1" | "true"));
    let mut removed = Err(Refused::Unknown);
    shared.state.send_modify(|state| removed = state.images.remove(name, force));
    match removed {
        Ok(answer) => wire::json_answer(StatusCode::OK, &answer),
        Err(Refused::Unknown) => no_such_image(name),
        Err(Refused::InUse) => {
            let id = name.trim_start_matches("sha256:");
            let short = id.get(..12).unwrap_or(id);
            let message = format!(
                "conflict: unable to delete {short} (must be forced) - image is referenced in multiple repositories"
            );
            wire::problem(StatusCode::CONFLICT, &message)
        }
    }
}

fn no_such_image(name: &str) -> Response<Body> {
    let message = format!("No such image: {}", with_tag(name));
    wire::problem(StatusCode::NOT_FOUND, &message)
}

/// Hands the connection over to HTTP/2, says `hello`, and reads until the client closes it. As with
/// a real engine, a session does not end with its build.
fn upgrade(
    request: Request<Incoming>,
    shared: &Arc<Shared>,
    hello: &'static [u8],
    counts: bool,
) -> Response<Body> {
    let held = Arc::clone(shared);
    shared.spawn(async move {
        let Ok(connection) = hyper::upgrade::on(request).await else {
            return;
        };
        let _open = counts.then(|| OpenSession::new(held));
        drain(TokioIo::new(connection), hello).await;
    });

    let mut answer = wire::answer(StatusCode::SWITCHING_PROTOCOLS, "application/json", "");
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, http::HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, http::HeaderValue::from_static("h2c"));
    answer
}

async fn drain(connection: impl AsyncRead + AsyncWrite, hello: &[u8]) {
    let (mut reader, mut writer) = tokio::io::split(connection);
    if writer.write_all(hello).await.is_ok() && writer.flush().await.is_ok() {
        let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
    }
}

/// Counts a session as long as it lives.
struct OpenSession(Arc<Shared>);

impl OpenSession {
    fn new(shared: Arc<Shared>) -> OpenSession {
        shared.state.send_modify(|state| state.sessions += 1);
        OpenSession(shared)
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.sessions -= 1);
    }
}

fn version() -> Response<Body> {
    let engine = json!({ "Name": "Engine", "Version": "20.10.24", "Details": { "ApiVersion": "1.41", "MinAPIVersion": "1.12" } });
    let version = json!({
        "Platform": { "Name": "" },
        "Components": [engine],
        "Version": "20.10.24",
        "ApiVersion": "1.41",
        "MinAPIVersion": "1.12",
        "GitCommit": "5d6db84",
        "GoVersion": "go1.19.8",
        "Os": "linux",
        "Arch": "amd64",
        "KernelVersion": "6.1.0",
        "BuildTime": "2026-05-07T21:09:36.000000000+00:00",
    });
    wire::json_answer(StatusCode::OK, &version)
}

fn info(state: &State) -> Response<Body> {
    let info = json!({
        "ID": "7YJD:ZR4O:266C:UJGN:UFPS:6K7G:NMUI:CYU2:VITL:3DNV:P6EX:6JML",
        "Containers": 0,
        "Images": state.images.list(&[]).as_array().map_or(0, Vec::len),
        "Driver": "overlay2",
        "OperatingSystem": "A scripted engine",
        "OSType": "linux",
        "Architecture": "x86_64",
        "NCPU": 2,
        "MemTotal": 4_294_967_296_u64,
        // No process of this host runs there.
        "DockerRootDir": "/nonexistent/scripted-engine",
        "ServerVersion": "20.10.24",
    });
    wire::json_answer(StatusCode::OK, &info)
}

/// The path without a prefix like `/v1.41`.
fn unversioned(path: &str) -> &str {
    let Some(rest) = path.strip_prefix("/v") else {
        return path;
    };
    match rest.find('/') {
        Some(slash) if rest.starts_with(|c: char| c.is_ascii_digit()) => &rest[slash..],
        Some(_) | None => path,
    }
}

/// The parameters of a query, decoded. The first of several with one name counts.
fn query(text: &str) -> BTreeMap<String, String> {
    let mut query = BTreeMap::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        query.entry(decoded(&key.replace('+', " "))).or_insert_with(|| decoded(&value.replace('+', " ")));
    }
    query
}

/// The text with every `%2F` and the like decoded.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..2).filter(|_| *first == b'%');
        let code = code.and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
