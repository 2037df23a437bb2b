//! The connections to the engine, which are ours: a build's can be named and closed.
//!
//! The client library can neither name a build nor end the session that it opens for one. So every request of a build goes
//! over a connection made here: `/build` gets the build's name, and closing ends them all.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bollard::{BollardRequest, errors::Error as BollardError};
use http::{Method, Request, Response, Uri, header::HOST, uri::PathAndQuery};
use http_body_util::Empty;
use hyper::{
    body::{Body, Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

/// Where an engine listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    Unix(String),
    /// `host:port`.
    Tcp(String),
}

/// Connections to an engine that can be closed together.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    host: Host,
    build: Option<Arc<str>>,
    closed: CancellationToken,
    tasks: TaskTracker,
}

impl Host {
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

impl Connections {
    /// Connects when the first request comes. With a name, builds get it.
    pub(super) fn to(host: Host, build: Option<String>) -> Self {
        Self {
            host,
            build: build.map(Into::into),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Closes all connections when cancelled.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// What the client library sends its requests by.
    pub(super) fn transport(&self) -> impl Fn(BollardRequest) -> Answer + Send + Sync + 'static {
        let connections = self.clone();
        move |request| {
            let connections = connections.clone();
            Box::pin(
                async move { connections.send(request).await.map_err(|err| BollardError::IOError { err }) },
            )
        }
    }

    /// Posts a request that the client library does not know; fails unless the engine agrees.
    pub(super) async fn post(&self, path: &str) -> io::Result<()> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .body(Empty::<Bytes>::new())
            .map_err(io::Error::other)?;
        let response = self.send(request).await?;
        if response.status().is_success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("it answered {}", response.status())))
        }
    }

    async fn send<B>(&self, mut request: Request<B>) -> io::Result<Response<Incoming>>
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + Unpin + 'static,
    {
        *request.uri_mut() = self.target(request.uri())?;
        let host = match &self.host {
            Host::Unix(_) => "docker",
            Host::Tcp(authority) => authority,
        };
        let host = http::HeaderValue::from_str(host).map_err(io::Error::other)?;
        request.headers_mut().insert(HOST, host);
        match &self.host {
            Host::Unix(path) => self.exchange(UnixStream::connect(path).await?, request).await,
            Host::Tcp(authority) => self.exchange(TcpStream::connect(authority).await?, request).await,
        }
    }

    async fn exchange<T, B>(&self, io: T, request: Request<B>) -> io::Result<Response<Incoming>>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + Unpin + 'static,
    {
        let io = Closable { io, closed: Box::pin(self.closed.clone().cancelled_owned()) };
        let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(io::Error::other)?;
        // Ends with the connection; a build's are closed with it, others after their answer.
        self.tasks.spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to the Docker Engine ended");
            }
        });
        sender.send_request(request).await.map_err(io::Error::other)
    }

    /// The path of a request, with the build's name where one is begun.
    fn target(&self, uri: &Uri) -> io::Result<Uri> {
        let path = uri.path();
        let mut query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        if let Some(build) = self.build.as_deref().filter(|_| path.ends_with("/build")) {
            query = format!("{query}&buildid={build}");
        }
        let target: PathAndQuery = format!("{path}{query}").parse().map_err(io::Error::other)?;
        Ok(Uri::from(target))
    }
}

/// What the client library awaits of a transport.
type Answer = Pin<Box<dyn Future<Output = Result<Response<Incoming>, BollardError>> + Send>>;

/// A connection that reads its end, and cannot be written to, once it is closed.
struct Closable<T> {
    io: T,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<T> Closable<T> {
    fn is_closed(&mut self, cx: &mut Context<'_>) -> bool {
        self.closed.as_mut().poll(cx).is_ready()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Closable<T> {
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

impl<T: AsyncWrite + Unpin> AsyncWrite for Closable<T> {
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
    fn only_a_build_gets_the_name() {
        let connections = Connections::to(Host::Unix("/s".to_owned()), Some("b1".to_owned()));
        let target =
            |uri: &str| connections.target(&uri.parse().expect("a uri")).expect("a target").to_string();
        assert_eq!(target("http://d/build?t=x"), "/build?t=x&buildid=b1");
        assert_eq!(target("http://d/v1.41/build?t=x"), "/v1.41/build?t=x&buildid=b1");
        assert_eq!(target("http://d/session"), "/session");
        assert_eq!(target("/build/cancel?id=b1"), "/build/cancel?id=b1");
    }
}
