//! Connections: their protocol, and whether the client is still there.
//!
//! Every task of a connection is one of the engine's own, so that none outlives the engine.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bollard::moby::buildkit::v1::control_server::ControlServer;
use bytes::{Buf as _, Bytes, BytesMut};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::controller::Controller;
use super::{Shared, routes};

/// The preface with which an HTTP/2 client begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Serves one connection to the socket.
///
/// Errors are ignored, because they only mean that the client went away.
pub(super) async fn serve(mut stream: UnixStream, shared: Arc<Shared>) {
    let mut read = Bytes::new();
    if shared.release.takes_grpc_on_its_socket() {
        let Ok((bytes, is_http2)) = peek(&mut stream).await else {
            return;
        };
        if is_http2 {
            return serve_grpc(stream, bytes, shared).await;
        }
        read = bytes;
    }

    let io = TokioIo::new(Transport::new(stream, read, Connection::default()));
    let service = service_fn(move |request| {
        let answer = routes::answer(request, &shared);
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let _ = http1::Builder::new().serve_connection(io, service).with_upgrades().await;
}

/// Serves the Control API on a connection that speaks HTTP/2 after the bytes in `read`.
pub(super) async fn serve_grpc<T>(io: T, read: Bytes, shared: Arc<Shared>)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let connection = Connection::default();
    let io = TokioIo::new(Transport::new(io, read, connection.clone()));
    let control = ControlServer::new(Controller::new(Arc::clone(&shared), connection.clone()));
    let service = service_fn(move |request: http::Request<Incoming>| control.clone().oneshot(request));
    let served = http2::Builder::new(Tasks(shared)).serve_connection(io, service);
    let _ = connection.cut.run_until_cancelled(served).await;
}

/// Reads until it is clear whether the client begins with the HTTP/2 preface.
async fn peek(stream: &mut UnixStream) -> io::Result<(Bytes, bool)> {
    let mut read = BytesMut::with_capacity(PREFACE.len());
    while read.len() < PREFACE.len() && PREFACE.starts_with(&read) {
        if stream.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let is_http2 = read.starts_with(PREFACE);
    Ok((read.freeze(), is_http2))
}

/// An executor that spawns the tasks of HTTP/2 as tasks of the engine.
#[derive(Clone, Debug)]
pub(super) struct Tasks(pub(super) Arc<Shared>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// A handle of one connection. Clones are the same connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Connection {
    gone: CancellationToken,
    cut: CancellationToken,
}

impl Connection {
    /// Waits until the client has closed the connection, or the engine has cut it.
    pub(super) async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Returns whether the client has closed the connection.
    ///
    /// This is known before the handlers of the connection are dropped.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// Closes the connection.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }
}

/// A byte stream that returns what was read ahead, and notifies its [`Connection`] when it ends.
struct Transport<T> {
    io: T,
    read: Bytes,
    connection: Connection,
}

impl<T> Transport<T> {
    fn new(io: T, read: Bytes, connection: Connection) -> Transport<T> {
        Transport { io, read, connection }
    }

    /// Marks the connection as gone if `result` is an error.
    fn watch<R>(&self, result: io::Result<R>) -> io::Result<R> {
        result.inspect_err(|_| self.connection.gone.cancel())
    }
}

impl<T> Drop for Transport<T> {
    fn drop(&mut self) {
        self.connection.gone.cancel();
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Transport<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.read.is_empty() {
            let count = self.read.len().min(buffer.remaining());
            buffer.put_slice(&self.read[..count]);
            self.read.advance(count);
            return Poll::Ready(Ok(()));
        }
        let (filled, room) = (buffer.filled().len(), buffer.remaining());
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buffer));
        if room > 0 && buffer.filled().len() == filled {
            self.connection.gone.cancel();
        }
        Poll::Ready(self.watch(result))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Transport<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, bytes));
        Poll::Ready(self.watch(result))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.io).poll_flush(cx));
        Poll::Ready(self.watch(result))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
