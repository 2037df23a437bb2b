//! Connections to an engine: one per API request, and byte streams for protocols other than HTTP/1.
//!
//! The client library neither sends the API version nor lets a connection be closed from outside. Therefore
//! every connection is made here: paths get the prefix of the negotiated version, and all connections of one
//! piece of work close together.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};

use bollard::{BollardRequest, errors::Error as BollardError};
use http::{
    Method, Request, Response, StatusCode, Uri,
    header::{CONNECTION, HOST, UPGRADE},
    uri::PathAndQuery,
};
use http_body_util::{BodyExt, Empty};
use hyper::{
    body::{Body, Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

/// The address of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    Unix(String),
    /// An address such as `host:port`.
    Tcp(String),
}

/// A group of connections to one engine that close together.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    host: Host,
    api: Arc<NegotiatedApi>,
    closed: CancellationToken,
    tasks: TaskTracker,
}

/// The API version in requests to an engine, shared by all connections to it.
#[derive(Debug, Default)]
pub(super) struct NegotiatedApi(AtomicU32);

/// A version of the engine's API, such as 1.45.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ApiVersion {
    major: u16,
    minor: u16,
}

/// The fields of the engine's answer to `GET /version` that are used here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct EngineVersion {
    /// Version of the engine, such as `26.1.5`.
    pub(super) version: String,
    api_version: String,
    #[serde(rename = "MinAPIVersion", default)]
    min_api_version: String,
}

impl Host {
    /// Parses `unix:///path` or `tcp://host:port`.
    ///
    /// # Errors
    ///
    /// Returns a message that describes a valid address if `address` is not one.
    pub(super) fn parse(address: &str) -> Result<Self, String> {
        match address.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.to_owned())),
            Some(("tcp" | "http", authority)) if authority.contains(':') => {
                Ok(Self::Tcp(authority.trim_end_matches('/').to_owned()))
            }
            _ => Err(format!(
                "{address:?} is no address of a Docker Engine: it must be unix:///path or tcp://host:port"
            )),
        }
    }
}

impl ApiVersion {
    /// Newest version that the client library's types support.
    pub(super) const NEWEST_KNOWN: Self = Self { major: 1, minor: 53 };
    /// First version that accepts gRPC directly on the engine's socket.
    ///
    /// Before it, `POST /grpc` upgrades a connection.
    pub(super) const DIRECT_GRPC: Self = Self { major: 1, minor: 53 };

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl NegotiatedApi {
    fn get(&self) -> Option<ApiVersion> {
        let [_, _, major, minor] = self.0.load(Ordering::Acquire).to_be_bytes();
        (major > 0).then_some(ApiVersion { major: major.into(), minor: minor.into() })
    }

    fn set(&self, version: ApiVersion) {
        let byte = |number: u16| u8::try_from(number).unwrap_or(u8::MAX);
        let bytes = [0, 0, byte(version.major), byte(version.minor)];
        self.0.store(u32::from_be_bytes(bytes), Ordering::Release);
    }
}

impl EngineVersion {
    /// Returns the newest API version that both sides support.
    fn api(&self) -> Option<ApiVersion> {
        let newest = ApiVersion::parse(&self.api_version)?.min(ApiVersion::NEWEST_KNOWN);
        Some(ApiVersion::parse(&self.min_api_version).map_or(newest, |oldest| newest.max(oldest)))
    }
}

impl Connections {
    /// Returns connections to `host`; nothing is sent before the first request.
    pub(super) fn new(host: Host) -> Self {
        Self { host, api: Arc::default(), closed: CancellationToken::new(), tasks: TaskTracker::new() }
    }

    /// Returns further connections to the same engine, which close independently of these.
    pub(super) fn separate(&self) -> Self {
        let (closed, tasks) = (CancellationToken::new(), TaskTracker::new());
        Self { host: self.host.clone(), api: Arc::clone(&self.api), closed, tasks }
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// Returns the token that closes all of these connections when it is cancelled.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Returns the transport by which the client library sends its requests.
    pub(super) fn transport(&self) -> impl Fn(BollardRequest) -> Answer + Send + Sync + 'static {
        let connections = self.clone();
        move |request| {
            let connections = connections.clone();
            Box::pin(async move {
                connections.send_versioned(request).await.map_err(|err| BollardError::IOError { err })
            })
        }
    }

    /// Asks the engine for its version and negotiates the API version again.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot be reached, or the peer is not a Docker Engine.
    pub(super) async fn negotiate(&self) -> io::Result<EngineVersion> {
        let (_, version) = body_of(self.send(get("/version")?).await?).await?;
        let version: EngineVersion = serde_json::from_value(version)?;
        let api = version
            .api()
            .ok_or_else(|| io::Error::other(format!("it has the API version {:?}", version.api_version)))?;
        self.api.set(api);
        Ok(version)
    }

    /// Gets a path of the engine's API and returns the status and the body of the response.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot be reached, or the body is not JSON.
    pub(super) async fn get_json(&self, path: &str) -> io::Result<(StatusCode, Value)> {
        body_of(self.send_versioned(get(path)?).await?).await
    }

    /// Opens a byte stream that speaks HTTP/2 to the engine's BuildKit.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot be reached, or refuses gRPC.
    pub(super) async fn grpc(&self) -> io::Result<ByteStream> {
        if self.api().await? >= ApiVersion::DIRECT_GRPC {
            return self.open().await;
        }
        let mut request = get("/grpc")?;
        *request.method_mut() = Method::POST;
        request.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("Upgrade"));
        request.headers_mut().insert(UPGRADE, http::HeaderValue::from_static("h2c"));
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(io::Error::other(format!("it answered {} to /grpc", response.status())));
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(io::Error::other)?;
        Ok(self.closable(TokioIo::new(upgraded)))
    }

    /// Returns the process that listens on the engine's socket, if it is visible on this host.
    pub(super) async fn peer(&self) -> Option<i32> {
        match &self.host {
            Host::Unix(path) => UnixStream::connect(path).await.ok()?.peer_cred().ok()?.pid(),
            Host::Tcp(_) => None,
        }
    }

    async fn api(&self) -> io::Result<ApiVersion> {
        if self.api.get().is_none() {
            self.negotiate().await?;
        }
        self.api.get().ok_or_else(|| io::Error::other("it has no API version"))
    }

    async fn send_versioned<B>(&self, mut request: Request<B>) -> io::Result<Response<Incoming>>
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + Unpin + 'static,
    {
        *request.uri_mut() = versioned(self.api().await?, request.uri())?;
        self.send(request).await
    }

    async fn send<B>(&self, mut request: Request<B>) -> io::Result<Response<Incoming>>
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + Unpin + 'static,
    {
        let host = match &self.host {
            Host::Unix(_) => "docker",
            Host::Tcp(authority) => authority,
        };
        let host = http::HeaderValue::from_str(host).map_err(io::Error::other)?;
        request.headers_mut().insert(HOST, host);
        let io = TokioIo::new(self.open().await?);
        let (mut sender, connection) = http1::handshake(io).await.map_err(io::Error::other)?;
        // The task ends with the connection: when that is closed, or after its response.
        self.tasks.spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to the Docker Engine ended");
            }
        });
        sender.send_request(request).await.map_err(io::Error::other)
    }

    async fn open(&self) -> io::Result<ByteStream> {
        Ok(match &self.host {
            Host::Unix(path) => self.closable(UnixStream::connect(path).await?),
            Host::Tcp(authority) => self.closable(TcpStream::connect(authority).await?),
        })
    }

    fn closable(&self, io: impl Io + 'static) -> ByteStream {
        ByteStream { io: Box::new(io), closed: Box::pin(self.closed.clone().cancelled_owned()) }
    }
}

fn get(path: &str) -> io::Result<Request<Empty<Bytes>>> {
    Request::builder().uri(path).body(Empty::new()).map_err(io::Error::other)
}

async fn body_of(response: Response<Incoming>) -> io::Result<(StatusCode, Value)> {
    let status = response.status();
    let body = response.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    Ok((status, serde_json::from_slice(&body)?))
}

/// Returns the path and query of a request, prefixed with an API version.
fn versioned(api: ApiVersion, uri: &Uri) -> io::Result<Uri> {
    let ApiVersion { major, minor } = api;
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let target: PathAndQuery =
        format!("/v{major}.{minor}{}{query}", uri.path()).parse().map_err(io::Error::other)?;
    Ok(Uri::from(target))
}

/// The response of a transport, as the client library awaits it.
type Answer = Pin<Box<dyn Future<Output = Result<Response<Incoming>, BollardError>> + Send>>;

/// A bidirectional stream of bytes.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection that reads its end and refuses writes once it is closed.
pub(super) struct ByteStream {
    io: Box<dyn Io>,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl ByteStream {
    fn is_closed(&mut self, cx: &mut Context<'_>) -> bool {
        self.closed.as_mut().poll(cx).is_ready()
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_closed(cx) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_closed(cx) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_listens_on_a_socket_or_a_port() {
        assert_eq!(Host::parse("unix:///run/d.sock"), Ok(Host::Unix("/run/d.sock".to_owned())));
        assert_eq!(Host::parse("tcp://h:2375"), Ok(Host::Tcp("h:2375".to_owned())));
        for wrong in ["", "/run/d.sock", "unix://d.sock", "tcp://h", "ssh://h:22"] {
            assert!(Host::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn requests_name_the_newest_version_that_both_sides_speak() {
        for (newest, oldest, path) in [
            ("1.41", "1.12", "/v1.41/images/json?all=1"),
            ("1.45", "1.24", "/v1.45/images/json?all=1"),
            ("1.53", "1.44", "/v1.53/images/json?all=1"),
            ("1.60", "1.44", "/v1.53/images/json?all=1"),
            ("1.60", "1.55", "/v1.55/images/json?all=1"),
        ] {
            let engine = EngineVersion {
                version: String::new(),
                api_version: newest.to_owned(),
                min_api_version: oldest.to_owned(),
            };
            let negotiated = NegotiatedApi::default();
            assert_eq!(negotiated.get(), None);
            negotiated.set(engine.api().expect("a version"));
            let uri = "http://docker/images/json?all=1".parse().expect("a URI");
            let api = negotiated.get().expect("it was set");
            assert_eq!(versioned(api, &uri).expect("a path").to_string(), path);
        }
    }
}
