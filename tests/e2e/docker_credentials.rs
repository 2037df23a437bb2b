//! Credentials that the worker sends to a registry, beside those that the docker command sends with the same
//! configuration.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE};
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use proto::images::{BuildState, Image};
use serde_json::{Value, json};
use tokio::{net::TcpListener, process::Command, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    engine_fixture,
    fake_engine::FakeEngine,
    registries::pulled,
    registry::DockerConfig,
    registry_credentials::{finished, from, start_worker},
    stack::{Service, Worker},
};

/// Credentials in one line: `user:password`, `identity TOKEN`, `registry TOKEN` or `nothing`.
type Sent = BTreeSet<String>;

/// A registry that refuses everybody, and records the credentials that it is given.
#[derive(Debug)]
struct RecordingRegistry {
    addr: SocketAddr,
    sent: Arc<Mutex<Sent>>,
    _serving: AbortOnDropHandle<()>,
}

impl RecordingRegistry {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = listener.local_addr()?;
        let sent = Arc::<Mutex<Sent>>::default();
        let recorded = Arc::clone(&sent);
        let serving = async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                let recorded = Arc::clone(&recorded);
                connections.spawn(async move {
                    let service = service_fn(|request| refuse(request, addr, &recorded));
                    // A client may break a connection off.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
                });
            }
        };
        Ok(Self { addr, sent, _serving: AbortOnDropHandle::new(tokio::spawn(serving)) })
    }

    /// Returns the credentials that were sent since the last call.
    fn take(&self) -> Sent {
        std::mem::take(&mut *self.sent.lock().expect("no code panics while it holds them"))
    }
}

/// Refuses a request as a registry with a token server does, and records its credentials.
async fn refuse(
    request: Request<Incoming>,
    addr: SocketAddr,
    recorded: &Mutex<Sent>,
) -> io::Result<Response<Full<Bytes>>> {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let is_for_token = request.uri().path() == "/token";
    let form = request.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    let form = String::from_utf8_lossy(&form).into_owned();
    let field = |name: &str| {
        let value = form.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        value.map(str::to_owned)
    };
    let sent = if let Some(token) = field("refresh_token") {
        Some(format!("identity {token}"))
    } else if let Some((user, password)) = field("username").zip(field("password")) {
        Some(format!("{user}:{password}"))
    } else if let Some(basic) = authorization.strip_prefix("Basic ") {
        let decoded = BASE64_STANDARD.decode(basic).map_err(io::Error::other)?;
        Some(String::from_utf8_lossy(&decoded).into_owned())
    } else if let Some(token) = authorization.strip_prefix("Bearer ") {
        Some(format!("registry {token}"))
    } else {
        is_for_token.then(|| "nothing".to_owned())
    };
    if let Some(sent) = sent {
        recorded.lock().expect("no code panics while it holds them").insert(sent);
    }
    let challenge = format!("Bearer realm=\"http://{addr}/token\",service=\"tests\"");
    let refusal = json!({ "errors": [{ "code": "UNAUTHORIZED", "message": "authentication required" }] });
    let response = Response::builder()
        .status(StatusCode::UNAUTHORIZED)
        .header(header::WWW_AUTHENTICATE, challenge)
        .header(header::CONTENT_TYPE, "application/json")
        .body(refusal.to_string().into());
    response.map_err(io::Error::other)
}

/// Pulls by the docker command, with a configuration and the helpers in a directory.
async fn pull_by_command(
    docker_host: &str,
    config: &DockerConfig,
    helpers: &Path,
    reference: &str,
) -> anyhow::Result<()> {
    let root = std::env::var_os("TRAILER_TEST_ENGINE_ROOT");
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docker");
    let mut command = Command::new(if root.is_some() { scripts.as_path() } else { Path::new("docker") });
    if let Some(root) = root {
        command.env("TRAILER_DOCKER_ROOT", root);
    }
    command
        .args(["--host", docker_host, "--config", config.path()?, "pull", "--quiet", reference])
        .env("DOCKER_HOST", docker_host)
        .env("PATH", format!("{}:{}", helpers.display(), std::env::var("PATH")?))
        .kill_on_drop(true);
    let output = tokio::time::timeout(crate::stack::LIMIT, command.output()).await??;
    let error = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(!output.status.success(), "the registry refuses everybody");
    let words = ["unauthorized", "authentication required", "denied"];
    anyhow::ensure!(words.iter().any(|word| error.contains(word)), "{error}");
    Ok(())
}

fn install_helpers(directory: &Path) -> anyhow::Result<()> {
    for (name, script) in [
        ("finds", r#"echo '{"Username": "helped", "Secret": "1"}'"#),
        ("token", r#"echo '{"Username": "<token>", "Secret": "t0"}'"#),
        ("lacks", "echo 'credentials not found in native keychain'; exit 1"),
        ("fails", "echo 'no such keychain'; exit 2"),
        ("lower", r#"echo '{"username": "helped", "secret": "1"}'; echo '}'"#),
        ("leaves", r#"echo '{"Username": "helped", "Secret": "1"}'; sleep 3 &"#),
    ] {
        let path = directory.join(format!("docker-credential-{name}"));
        fs::write(&path, format!("#!/bin/sh\ncat > /dev/null\n{script}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// `plain:secret` in base64.
const AUTH: &str = "cGxhaW46c2VjcmV0";

/// A helper that hangs is in `registry_credentials`: the docker command waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_gets_what_the_docker_command_sends() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retry-backoff=10ms"]).await?;
    let registry = RecordingRegistry::start().await?;
    let host = registry.addr.to_string();
    let (_, docker_host) = engine_fixture::connect().await?;
    let directory = tempfile::tempdir()?;
    let helpers = directory.path().join("helpers");
    fs::create_dir(&helpers)?;
    install_helpers(&helpers)?;
    let config = DockerConfig::with("", &[])?;
    let name = format!("like-docker-{}", uuid::Uuid::new_v4().simple());
    let mut worker = start_worker(&service, &name, directory.path(), config.path()?).await?;
    let alice = service.builder("alice");
    let auths = |key: String, entry: Value| json!({ "auths": { key: entry } });
    let plain = json!({ "auth": AUTH });
    let stored = |store: &str| json!({ "auths": { &host: {} }, "credsStore": store });
    let helped = |helper: &str| json!({ "credHelpers": { &host: helper } });
    for (row, (content, sent, failure)) in [
        (json!({}), "nothing", ""),
        (json!({ "auths": null, "credsStore": "", "credHelpers": null }), "nothing", ""),
        (auths(host.clone(), plain.clone()), "plain:secret", ""),
        (auths(format!("https://{host}"), plain.clone()), "plain:secret", ""),
        (auths(format!("http://{host}/v1/"), plain.clone()), "plain:secret", ""),
        (auths(format!("https://{host}/v2/"), plain.clone()), "plain:secret", ""),
        (auths("other.example".to_owned(), plain.clone()), "nothing", ""),
        (auths(host.clone(), json!({})), "nothing", ""),
        (auths(host.clone(), json!({ "username": "u", "password": "p" })), "u:p", ""),
        (auths(host.clone(), json!({ "auth": AUTH, "username": "u", "password": "p" })), "plain:secret", ""),
        (auths(host.clone(), json!({ "auth": AUTH, "identitytoken": "t1" })), "identity t1", ""),
        (auths(host.clone(), json!({ "registrytoken": "t2" })), "registry t2", ""),
        (json!({ "credsStore": "finds" }), "helped:1", ""),
        (stored("finds"), "helped:1", ""),
        (stored("token"), "identity t0", ""),
        (stored("lacks"), "nothing", ""),
        (json!({ "auths": { &host: plain.clone() }, "credsStore": "lacks" }), "nothing", ""),
        (helped("finds"), "helped:1", ""),
        (helped("lacks"), "nothing", ""),
        (
            json!({ "auths": { &host: plain.clone() }, "credHelpers": { "other.example": "fails" } }),
            "plain:secret",
            "",
        ),
        (json!({ "auths": { &host: plain }, "credHelpers": { &host: "finds" } }), "helped:1", ""),
        (helped("lower"), "helped:1", ""),
        (helped("leaves"), "helped:1", ""),
        (json!({ "auths": { &host: plain.clone() }, "credsStore": "missing" }), "plain:secret", ""),
        (json!({ "auths": { &host: plain.clone() }, "credsStore": "fails" }), "plain:secret", ""),
        (json!({ "Auths": { &host: { "Auth": AUTH } } }), "plain:secret", ""),
        (auths(host.clone(), json!({ "auth": "cGxhaW46\nc2VjcmV0" })), "plain:secret", ""),
        // The docker command ignores these; so does the worker, but it reports them with the refusal.
        (stored("fails"), "nothing", "docker-credential-fails has failed"),
        (helped("fails"), "nothing", "docker-credential-fails has failed"),
        (helped("missing"), "nothing", "docker-credential-missing cannot be run"),
    ]
    .into_iter()
    .enumerate()
    {
        config.write(&content.to_string())?;
        // The engine may cache what it was given for a repository.
        let reference = format!("{host}/row{row}:1");
        pull_by_command(&docker_host, &config, &helpers, &reference).await?;
        assert_eq!(registry.take(), Sent::from([sent.to_owned()]), "docker pull with {content}");
        for wanted in [pulled("Pulled", &reference), from(&reference)] {
            let build = finished(&alice, pinned(wanted, &name)).await?;
            let what = format!("{build:?} with {content}");
            assert_eq!(build.state(), BuildState::Failed, "{what}");
            assert_eq!(registry.take(), Sent::from([sent.to_owned()]), "{what}");
            let message = build.error.context("an error")?.message;
            assert!(message.contains(failure), "{message} of {content}");
        }
    }
    worker.require_life()
}

fn pinned(mut wanted: Image, worker: &str) -> Image {
    if let Some(config) = &mut wanted.config {
        worker.clone_into(&mut config.worker);
    }
    wanted
}

/// Returns the credentials in an `X-Registry-Auth`, in the form of [`Sent`].
fn in_header(header: &str) -> anyhow::Result<String> {
    let decoded = BASE64_URL_SAFE.decode(header).with_context(|| header.to_owned())?;
    let sent: Value = if decoded.is_empty() { json!({}) } else { serde_json::from_slice(&decoded)? };
    let field = |name: &str| sent[name].as_str().filter(|value| !value.is_empty());
    Ok(if let Some(token) = field("identitytoken") {
        format!("identity {token}")
    } else if let Some((user, password)) = field("username").zip(field("password")) {
        format!("{user}:{password}")
    } else {
        "nothing".to_owned()
    })
}

/// Docker Hub itself is out of reach: the credentials are those that the engine is given for it.
#[tokio::test(flavor = "multi_thread")]
async fn docker_hub_gets_what_the_docker_command_sends() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let engine = FakeEngine::start().await?;
    let directory = tempfile::tempdir()?;
    install_helpers(directory.path())?;
    let config = DockerConfig::with("", &[])?;
    let flags = ["--docker-config", config.path()?];
    let _worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let alice = service.builder("alice");
    let entry = |key: &str| json!({ "auths": { key: { "auth": AUTH } } });
    for (content, reference, sent) in [
        (json!({}), "acme/private:1", "nothing"),
        (entry("https://index.docker.io/v1/"), "acme/private:1", "plain:secret"),
        (entry("https://index.docker.io/v1/"), "docker.io/acme/private:1", "plain:secret"),
        (entry("https://index.docker.io/v1/"), "index.docker.io/acme/private:1", "plain:secret"),
        (entry("https://index.docker.io/v1/"), "ubuntu:24.04", "plain:secret"),
        (entry("https://index.docker.io/v1/"), "docker.example/acme/private:1", "nothing"),
        (entry("other.example"), "acme/private:1", "nothing"),
    ] {
        config.write(&content.to_string())?;
        let take = || {
            let taken = engine.take_registry_auths();
            taken.iter().map(|header| in_header(header)).collect::<anyhow::Result<Sent>>()
        };
        pull_by_command(&engine.docker_host(), &config, directory.path(), reference).await?;
        assert_eq!(take()?, Sent::from([sent.to_owned()]), "docker pull {reference} with {content}");
        let build = finished(&alice, pulled("Pulled", reference)).await?;
        assert_eq!(build.state(), BuildState::Failed, "{build:?}");
        assert_eq!(take()?, Sent::from([sent.to_owned()]), "{reference} with {content}");
    }
    Ok(())
}
