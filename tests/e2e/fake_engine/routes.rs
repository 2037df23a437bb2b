//! Routes of the REST API.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::json;

use super::images::{Refused, with_tag};
use super::wire::{self, Body};
use super::{Shared, connection, query};

/// Answers one request.
pub(super) fn answer(request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Body> {
    let mut answer = route(request, shared);
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        wire::sign(&mut answer, &shared.release);
    }
    answer
}

fn route(request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Body> {
    let method = request.method().clone();
    let (version, path) = query::split_version(request.uri().path());
    if let Err(message) = version.map_or(Ok(()), |version| shared.release.check(version)) {
        return wire::problem(StatusCode::BAD_REQUEST, &message);
    }
    let path = path.to_owned();
    let query = query::parameters(request.uri().query().unwrap_or_default());

    match (method.as_str(), path.as_str()) {
        ("GET", "/_ping") => wire::answer(StatusCode::OK, "text/plain; charset=utf-8", "OK"),
        ("HEAD", "/_ping") => wire::answer(StatusCode::OK, "text/plain; charset=utf-8", ""),
        ("GET", "/version") => wire::json_answer(StatusCode::OK, &shared.release.describe()),
        ("GET", "/info") => info(shared),
        ("GET", "/images/json") => list(&query, shared),
        ("POST", "/images/create") => refuse_access(&request, shared),
        ("GET", path) if path.starts_with("/distribution/") => refuse_access(&request, shared),
        ("POST", "/grpc") if !shared.release.takes_grpc_on_its_socket() => upgrade(request, shared),
        (_, path) => image(&method, path, &query, shared).unwrap_or_else(|| {
            shared.record_unexpected(format!("{method} {path}"));
            wire::problem(StatusCode::NOT_FOUND, "page not found")
        }),
    }
}

/// Answers a request that concerns a registry as if that refused access, and records the credentials for it.
fn refuse_access(request: &Request<Incoming>, shared: &Shared) -> Response<Body> {
    let auth = request.headers().get("x-registry-auth").and_then(|value| value.to_str().ok());
    let auth = auth.unwrap_or_default().to_owned();
    shared.state.send_modify(|state| state.registry_auths.push(auth));
    wire::problem(
        StatusCode::NOT_FOUND,
        "pull access denied: denied: requested access to the resource is denied",
    )
}

fn list(query: &BTreeMap<String, String>, shared: &Shared) -> Response<Body> {
    let filters = query.get("filters").map_or("{}", String::as_str);
    match serde_json::from_str::<BTreeMap<String, Vec<String>>>(filters) {
        Ok(filters) => {
            let filter = |name: &str| filters.get(name).map_or(&[][..], Vec::as_slice);
            let images = shared.state.borrow().images.list(filter("label"), filter("reference"));
            wire::json_answer(StatusCode::OK, &images)
        }
        Err(error) => wire::problem(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

/// Answers a request about one image, or returns `None` if it is about something else.
///
/// The name may contain slashes.
fn image(
    method: &Method,
    path: &str,
    query: &BTreeMap<String, String>,
    shared: &Shared,
) -> Option<Response<Body>> {
    let path = path.strip_prefix("/images/")?;
    match method.as_str() {
        "POST" => Some(tag(&query::decode(path.strip_suffix("/tag")?), query, shared)),
        "GET" => Some(inspect(&query::decode(path.strip_suffix("/json")?), shared)),
        "DELETE" => Some(remove(&query::decode(path), query, shared)),
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
        None => no_such_image(name),
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

/// Hands the connection over to gRPC.
fn upgrade(request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Body> {
    let held = Arc::clone(shared);
    shared.spawn(async move {
        if let Ok(connection) = hyper::upgrade::on(request).await {
            connection::serve_grpc(TokioIo::new(connection), Bytes::new(), held).await;
        }
    });

    let mut answer = wire::answer(StatusCode::SWITCHING_PROTOCOLS, "application/grpc", "");
    let headers = answer.headers_mut();
    headers.clear();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("h2c"));
    answer
}

fn info(shared: &Shared) -> Response<Body> {
    let info = json!({
        "ID": "7YJD:ZR4O:266C:UJGN:UFPS:6K7G:NMUI:CYU2:VITL:3DNV:P6EX:6JML",
        "Containers": 0,
        "Images": shared.state.borrow().images.count(),
        "Driver": "overlay2",
        "DriverStatus": [["Backing Filesystem", "extfs"], ["Supports d_type", "true"], ["userxattr", "false"]],
        "CgroupDriver": "cgroupfs",
        "CgroupVersion": "2",
        "ExperimentalBuild": false,
        "OperatingSystem": "A scripted engine",
        "OSType": "linux",
        "Architecture": "x86_64",
        "NCPU": 2,
        "MemTotal": 4_294_967_296_u64,
        // No process of this host has files there.
        "DockerRootDir": "/nonexistent/scripted-engine",
        "ServerVersion": shared.release.version(),
    });
    wire::json_answer(StatusCode::OK, &info)
}
