//! Listener for a tonic server: accepts connections, encrypted or not.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use opentelemetry::metrics::Counter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::mpsc,
    task::JoinSet,
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::Stream;
use tokio_util::{either::Either, sync::WaitForCancellationFutureOwned, task::AbortOnDropHandle};
use tonic::transport::{Server, server::Connected};

pub use self::{
    connections::{ConnectionCall, OpenConnection},
    flushes::Flushes,
};
use self::{
    connections::{Connections, Limits},
    write_buffer::WriteBuffer,
};
use crate::{tally::Tally, tls::Current};

mod connections;
mod flushes;
mod write_buffer;

const LIMITS: Limits = Limits { all: 10_000, reserved: 100, unadmitted: 512, of_address: 8_000 };
/// Time in which a connection has to be admitted, unless it has a call in progress.
const ADMISSION: Duration = Duration::from_secs(30);
/// Maximum time for a client to complete the TLS handshake, and then to begin with HTTP/2.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause after the system has failed to accept a connection, as when file descriptors run out.
const PAUSE: Duration = Duration::from_millis(100);
/// Length of the HTTP/2 preface, in bytes; until it has arrived the server sends no pings.
const PREFACE: usize = 24;
/// Maximum number of connections that wait for the server; the listener waits when that is reached.
const WAITING: usize = 16;

/// Returns a server with the limits of all ports: calls of a connection, size of headers, keepalive.
pub fn server() -> Server {
    const CALLS: u32 = 1_024;
    /// Maximum size of headers that are read, in bytes. Those over the limit of calls get a status that tells it.
    const HEADERS: u32 = 64 * 1024;
    const KEEPALIVE: Duration = Duration::from_secs(20);
    Server::builder()
        .max_concurrent_streams(CALLS)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}

/// Binds a port, with room for many connections that are not accepted yet.
///
/// # Errors
///
/// Returns the error of the operating system, for example if the port is taken.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    /// Maximum number of them. Of those beyond, the system tries again only after a second.
    const BACKLOG: u32 = 4_096;
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The connections of a listener, for `serve_with_incoming`; dropping it stops accepting.
#[derive(Debug)]
pub struct Incoming {
    accepted: mpsc::Receiver<Connection>,
    _accepting: AbortOnDropHandle<()>,
}

impl Incoming {
    /// Starts to accept connections, with TLS if it is configured.
    pub fn new(listener: TcpListener, tls: Option<Current>) -> Self {
        let (sender, accepted) = mpsc::channel(WAITING);
        Self { accepted, _accepting: AbortOnDropHandle::new(tokio::spawn(accept(listener, tls, sender))) }
    }
}

impl Stream for Incoming {
    type Item = Result<Connection, io::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.accepted.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

async fn accept(listener: TcpListener, tls: Option<Current>, sender: mpsc::Sender<Connection>) {
    let connections = Connections::new(LIMITS);
    let failures = Arc::new(HandshakeFailures::new());
    // A client with a slow handshake does not delay others.
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Some(open) = connections.open(from) else {
            continue;
        };
        // Otherwise responses wait for delayed acknowledgements. An error is ignored: a connection that is
        // gone shows when it is read.
        let _ = tcp.set_nodelay(true);
        match &tls {
            None => {
                if sender.send(Connection::new(Io::Left(tcp), open)).await.is_err() {
                    return;
                }
            }
            Some(tls) => {
                let acceptor = TlsAcceptor::from(tls.config());
                handshakes.spawn(shake_hands(acceptor, tcp, open, sender.clone(), Arc::clone(&failures)));
            }
        }
    }
}

async fn shake_hands(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    open: OpenConnection,
    sender: mpsc::Sender<Connection>,
    failures: Arc<HandshakeFailures>,
) {
    let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp));
    match open.closing().clone().run_until_cancelled(handshake).await {
        Some(Ok(Ok(stream))) => {
            // The server is gone, and the client's connection with it.
            let _ = sender.send(Connection::new(Io::Right(Box::new(stream)), open)).await;
        }
        Some(Ok(Err(error))) => failures.count(open.peer(), &error.to_string()),
        Some(Err(_)) => failures.count(open.peer(), "it took too long"),
        // Another connection has taken its place.
        None => {}
    }
}

/// The count of TLS handshakes that failed, which are logged together.
#[derive(Debug)]
struct HandshakeFailures {
    tally: Mutex<Tally>,
    counter: Counter<u64>,
}

impl HandshakeFailures {
    fn new() -> Self {
        let counter = opentelemetry::global::meter(env!("CARGO_PKG_NAME"))
            .u64_counter("trailer.tls.handshakes.failed")
            .with_unit("{handshake}")
            .with_description("TLS handshakes that failed")
            .build();
        Self { tally: Mutex::default(), counter }
    }

    fn count(&self, from: SocketAddr, error: &str) {
        self.counter.add(1, &[]);
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = tally.count(Instant::now()) {
            tracing::info!(count, %from, error, "TLS handshakes failed; the last one is shown");
        }
    }
}

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    io: WriteBuffer<Io>,
    open: Arc<OpenConnection>,
    closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Number of bytes of the HTTP/2 preface that have arrived.
    begun: usize,
    /// Deadline of the preface, and then of the first call that is admitted; `None` once that has been.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// The connection of a request, among its extensions.
#[derive(Clone, Debug)]
pub struct ConnectInfo(Arc<OpenConnection>);

impl ConnectInfo {
    /// Returns the connection.
    pub fn connection(&self) -> &Arc<OpenConnection> {
        &self.0
    }
}

impl Connection {
    fn new(io: Io, open: OpenConnection) -> Self {
        Self {
            io: WriteBuffer::new(io),
            closing: Box::pin(open.closing().clone().cancelled_owned()),
            open: Arc::new(open),
            begun: 0,
            deadline: Some(Box::pin(tokio::time::sleep(HANDSHAKE))),
        }
    }

    /// Reports whether the client has let a deadline pass.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        loop {
            let Some(deadline) = &mut self.deadline else { return false };
            if deadline.as_mut().poll(cx).is_pending() {
                return false;
            }
            if self.begun < PREFACE || self.open.is_unused() {
                return true;
            }
            if self.open.is_admitted() {
                self.deadline = None;
            } else {
                deadline.as_mut().reset(tokio::time::Instant::now() + ADMISSION);
            }
        }
    }
}

/// A plain or encrypted stream.
type Io = Either<TcpStream, Box<TlsStream<TcpStream>>>;

impl Connected for Connection {
    type ConnectInfo = ConnectInfo;

    fn connect_info(&self) -> ConnectInfo {
        ConnectInfo(Arc::clone(&self.open))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.closing.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buffer);
        if this.begun < PREFACE {
            this.begun += buffer.filled().len() - before;
            if let Some(deadline) = this.deadline.as_mut().filter(|_| this.begun >= PREFACE) {
                deadline.as_mut().reset(tokio::time::Instant::now() + ADMISSION);
            }
        }
        if polled.is_pending() && this.is_late(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_flush(cx);
        if polled.is_ready() && self.io.is_empty() {
            self.open.flushes().flushed();
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
