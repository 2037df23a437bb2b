//! Listener for a tonic server: accepts connections, encrypted or not.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::Stream;
use tokio_util::{either::Either, task::AbortOnDropHandle};
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo},
};

use self::write_buffer::WriteBuffer;
use crate::tls::Current;

mod write_buffer;

/// Maximum number of connections; further ones wait to be accepted.
const CONNECTIONS: usize = 10_000;
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
    /// Maximum size of headers, in bytes; a token with many claims takes a few thousand.
    const HEADERS: u32 = 16 * 1024;
    const KEEPALIVE: Duration = Duration::from_secs(20);
    Server::builder()
        .max_concurrent_streams(CALLS)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
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
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // A client with a slow handshake does not delay others.
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // Otherwise responses wait for delayed acknowledgements. An error is ignored: a connection that is
        // gone shows when it is read.
        let _ = tcp.set_nodelay(true);
        match &tls {
            None => {
                if sender.send(Connection::new(Io::Left(tcp), place)).await.is_err() {
                    return;
                }
            }
            Some(tls) => {
                let acceptor = TlsAcceptor::from(tls.config());
                handshakes.spawn(shake_hands(acceptor, tcp, from, place, sender.clone()));
            }
        }
    }
}

async fn shake_hands(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    from: SocketAddr,
    place: OwnedSemaphorePermit,
    sender: mpsc::Sender<Connection>,
) {
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => {
            // The server is gone, and the client's connection with it.
            let _ = sender.send(Connection::new(Io::Right(Box::new(stream)), place)).await;
        }
        Ok(Err(error)) => tracing::info!(%from, %error, "a TLS handshake failed"),
        Err(_) => tracing::info!(%from, "a TLS handshake timed out"),
    }
}

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    io: WriteBuffer<Io>,
    /// Deadline of the HTTP/2 preface; `None` once it has arrived.
    begins: Option<Beginning>,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Beginning {
    read: usize,
    too_late: Pin<Box<Sleep>>,
}

impl Connection {
    fn new(io: Io, place: OwnedSemaphorePermit) -> Self {
        let too_late = Box::pin(tokio::time::sleep(HANDSHAKE));
        Self { io: WriteBuffer::new(io), begins: Some(Beginning { read: 0, too_late }), _place: place }
    }
}

/// A plain or encrypted stream.
type Io = Either<TcpStream, Box<TlsStream<TcpStream>>>;

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        match self.io.inner() {
            Io::Left(tcp) => tcp.connect_info(),
            Io::Right(tls) => tls.get_ref().0.connect_info(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buffer);
        let Some(begins) = &mut this.begins else {
            return polled;
        };
        begins.read += buffer.filled().len() - before;
        if begins.read >= PREFACE {
            this.begins = None;
        } else if polled.is_pending() && begins.too_late.as_mut().poll(cx).is_ready() {
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
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
