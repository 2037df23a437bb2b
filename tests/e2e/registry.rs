//! A Docker registry that requires a password: Debian's `docker-registry` on a port of 127.0.0.1.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio_util::task::AbortOnDropHandle;

use crate::eventually::eventually_true;

pub(crate) const USER: &str = "trailer";
pub(crate) const PASSWORD: &str = "sesame-4711";

/// A running registry, killed when dropped.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) addr: SocketAddr,
    process: Child,
    directory: TempDir,
}

/// A Docker configuration directory.
#[derive(Debug)]
pub(crate) struct DockerConfig(TempDir);

impl Registry {
    /// The password as hashed by `htpasswd -B`.
    const HASH: &str = "$2y$05$0syeUZDwK0iKRErA1D4vIOEbs9CPae3MzRKdGtFsk21mhl1PvRnom";

    pub(crate) async fn start() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let passwords = directory.path().join("passwords");
        fs::write(&passwords, format!("{USER}:{}\n", Self::HASH))?;
        // The port was free a moment ago; the registry cannot choose one.
        let addr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let config = directory.path().join("config.yml");
        let text = serde_json::json!({
            "version": "0.1",
            "log": { "level": "error", "accesslog": { "disabled": true } },
            "storage": { "filesystem": { "rootdirectory": directory.path().join("storage") } },
            "http": { "addr": addr.to_string() },
            "auth": { "htpasswd": { "realm": "tests", "path": passwords } },
        });
        fs::write(&config, text.to_string())?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("the tests need docker-registry: run them by tests/run")?;
        let registry = Self { addr, process, directory };
        eventually_true("the registry listens", async || Ok(TcpStream::connect(addr).is_ok())).await?;
        Ok(registry)
    }
}

/// An answer of a registry.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) content_type: String,
    pub(crate) body: Bytes,
}

impl Registry {
    /// Calls the registry's API below `/v2/` with the right password; fails unless it succeeds.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: impl Into<Bytes>,
    ) -> anyhow::Result<Answer> {
        let stream = tokio::net::TcpStream::connect(self.addr).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        const MANIFESTS: &str = "application/vnd.docker.distribution.manifest.v2+json, \
             application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";
        let request = Request::builder()
            .method(method)
            .uri(format!("/v2/{path}"))
            .header("Host", self.addr.to_string())
            .header(
                "Authorization",
                format!("Basic {}", BASE64_STANDARD.encode(format!("{USER}:{PASSWORD}"))),
            )
            .header("Accept", MANIFESTS)
            .header("Content-Type", content_type)
            .body(Full::new(body.into()))?;
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        anyhow::ensure!(head.status.is_success(), "{path}: {} {body:?}", head.status);
        let content_type = head.headers.get("Content-Type").map(|value| value.to_str()).transpose()?;
        Ok(Answer { content_type: content_type.unwrap_or_default().to_owned(), body })
    }
}

impl Registry {
    /// Removes the content of a blob, which manifests and repositories still refer to.
    pub(crate) fn lose_blob(&self, digest: &str) -> anyhow::Result<()> {
        let (algorithm, hex) = digest.split_once(':').context("a digest")?;
        let blobs = self.directory.path().join("storage/docker/registry/v2/blobs").join(algorithm);
        Ok(fs::remove_dir_all(blobs.join(&hex[..2]).join(hex))?)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Errors cannot be reported here.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl DockerConfig {
    /// Creates a configuration that has a password for some registries.
    pub(crate) fn with(password: &str, registries: &[SocketAddr]) -> anyhow::Result<Self> {
        let this = Self(tempfile::tempdir()?);
        let auths: serde_json::Map<String, serde_json::Value> =
            registries.iter().map(|registry| (registry.to_string(), Self::entry(password))).collect();
        this.write(&serde_json::json!({ "auths": auths }).to_string())?;
        Ok(this)
    }

    /// Returns the entry that `docker login` writes for a registry.
    pub(crate) fn entry(password: &str) -> serde_json::Value {
        serde_json::json!({ "auth": BASE64_STANDARD.encode(format!("{USER}:{password}")) })
    }

    /// Replaces the content of the file.
    pub(crate) fn write(&self, content: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.0.path().join("config.json"), content)?)
    }

    pub(crate) fn path(&self) -> anyhow::Result<&str> {
        self.0.path().to_str().context("a path in UTF-8")
    }
}
