//! A client that drives the fake engine as a worker drives a real one.

use std::io;
use std::time::Duration;

use anyhow::Context as _;
use bollard::moby::buildkit::v1::control_client::ControlClient;
use bollard::moby::buildkit::v1::{
    BytesMessage, SolveRequest, SolveResponse, StatusRequest, StatusResponse, Vertex,
};
use bollard::moby::upload::v1::BytesMessage as UploadPart;
use bollard::moby::upload::v1::upload_server::{Upload, UploadServer};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::super::FakeEngine;

/// Maximum time that a test waits.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// A connection to the engine and the tasks that serve its sessions. Dropping it cuts the
/// connection.
pub(super) struct Client {
    pub(super) control: ControlClient<Channel>,
    tasks: JoinSet<()>,
    sessions: CancellationToken,
}

impl Client {
    /// Connects through `POST /grpc`.
    pub(super) async fn connect(engine: &FakeEngine) -> anyhow::Result<Client> {
        let mut stream = UnixStream::connect(&engine.socket).await?;
        let head = "POST /v1.45/grpc HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await?);
        }
        let answer = String::from_utf8_lossy(&answer);
        anyhow::ensure!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        Client::speak(stream).await
    }

    /// Connects with HTTP/2 on the socket itself.
    pub(super) async fn connect_directly(engine: &FakeEngine) -> anyhow::Result<Client> {
        Client::speak(UnixStream::connect(&engine.socket).await?).await
    }

    async fn speak(mut stream: UnixStream) -> anyhow::Result<Client> {
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut theirs).await;
        });
        let mut ours = Some(TokioIo::new(ours));
        let connector = tower::service_fn(move |_| {
            std::future::ready(ours.take().ok_or_else(|| io::Error::other("one connection only")))
        });
        let channel = Endpoint::from_static("http://buildkit").connect_with_connector(connector).await?;
        Ok(Client { control: ControlClient::new(channel), tasks, sessions: CancellationToken::new() })
    }

    /// Opens a session that serves these files as the context `/context`.
    pub(super) async fn open_session(&mut self, id: &str, files: &[(&str, &str)]) -> anyhow::Result<()> {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let (reader, mut writer) = tokio::io::split(theirs);
        let outgoing = stream::unfold(reader, |mut reader| async {
            let mut data = vec![0; 4096];
            let count = reader.read(&mut data).await.ok().filter(|count| *count > 0)?;
            data.truncate(count);
            Some((BytesMessage { data }, reader))
        });
        let outgoing = outgoing.take_until(self.sessions.clone().cancelled_owned());
        let mut request = Request::new(outgoing);
        request.metadata_mut().insert("x-docker-expose-session-uuid", id.parse()?);
        request.metadata_mut().insert("x-docker-expose-session-name", "selftest".parse()?);
        let mut incoming = self.control.session(request).await?.into_inner();
        self.tasks.spawn(async move {
            while let Ok(Some(part)) = incoming.message().await {
                if writer.write_all(&part.data).await.is_err() {
                    break;
                }
            }
        });
        let connections =
            stream::once(async { Ok::<DuplexStream, io::Error>(ours) }).chain(stream::pending());
        let upload = UploadServer::new(Context(archive(files)?));
        self.tasks.spawn(async move {
            let _ = Server::builder().add_service(upload).serve_with_incoming(connections).await;
        });
        Ok(())
    }

    /// Ends every session.
    pub(super) fn close_sessions(&self) {
        self.sessions.cancel();
    }

    /// Opens a session for this Dockerfile and calls Solve.
    pub(super) async fn build(
        &mut self,
        id: &str,
        dockerfile: &str,
    ) -> anyhow::Result<Result<SolveResponse, Status>> {
        self.open_session(id, &[("Dockerfile", dockerfile)]).await?;
        let solved = tokio::time::timeout(LIMIT, self.control.solve(request(id))).await?;
        Ok(solved.map(Response::into_inner))
    }
}

/// Follows the progress of a build to its end, in a task of its own.
pub(super) fn follow(mut control: ControlClient<Channel>, id: &str) -> Following {
    let request = StatusRequest { r#ref: id.to_owned() };
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut stream = control.status(request).await?.into_inner();
        let mut seen = Vec::new();
        while let Some(message) = stream.message().await? {
            seen.push(message);
        }
        Ok(seen)
    });
    Following(tasks)
}

/// A Status stream that is being read.
pub(super) struct Following(JoinSet<Result<Vec<StatusResponse>, Status>>);

impl Following {
    /// Waits for the end of the stream and returns every message.
    pub(super) async fn ended(mut self) -> anyhow::Result<Vec<StatusResponse>> {
        let ended = tokio::time::timeout(LIMIT, self.0.join_next()).await?;
        Ok(ended.context("one task")???)
    }
}

/// Returns a request to build the context that the session `id` serves.
pub(super) fn request(id: &str) -> SolveRequest {
    let pairs = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    SolveRequest {
        r#ref: id.to_owned(),
        session: id.to_owned(),
        frontend: "dockerfile.v0".to_owned(),
        frontend_attrs: pairs(&[
            ("context", "http://buildkit-session/context"),
            ("label:owner", "alice"),
            ("target", "tools"),
        ]),
        exporter_deprecated: "moby".to_owned(),
        exporter_attrs_deprecated: pairs(&[("name", &format!("selftest/{id}"))]),
        ..SolveRequest::default()
    }
}

/// Sends one request over HTTP/1.1 and returns the whole answer.
pub(super) async fn rest(engine: &FakeEngine, request: &str) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(&engine.socket).await?;
    let request = request.replace('"', "%22");
    let head = format!("{request} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(LIMIT, stream.read_to_string(&mut answer)).await??;
    Ok(answer)
}

/// Returns the last state of the vertex with this name.
pub(super) fn vertex<'a>(progress: &'a [StatusResponse], name: &str) -> Option<&'a Vertex> {
    progress.iter().flat_map(|message| &message.vertexes).rfind(|vertex| vertex.name == name)
}

/// Returns everything that the steps printed.
pub(super) fn output(progress: &[StatusResponse]) -> String {
    let logs = progress.iter().flat_map(|message| &message.logs);
    logs.map(|log| String::from_utf8_lossy(&log.msg)).collect()
}

/// An upload service with a single archive.
struct Context(Vec<u8>);

#[tonic::async_trait]
impl Upload for Context {
    type PullStream = BoxStream<'static, Result<UploadPart, Status>>;

    async fn pull(
        &self,
        request: Request<Streaming<UploadPart>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let path = request.metadata().get("urlpath").and_then(|path| path.to_str().ok());
        if path != Some("/context") {
            return Err(Status::not_found(format!("{path:?}")));
        }
        let parts: Vec<_> = self.0.chunks(1000).map(|part| Ok(UploadPart { data: part.to_vec() })).collect();
        Ok(Response::new(stream::iter(parts).boxed()))
    }
}

fn archive(files: &[(&str, &str)]) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, content.as_bytes())?;
    }
    Ok(archive.into_inner()?)
}
