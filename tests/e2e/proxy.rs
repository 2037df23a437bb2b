//! A TCP proxy that breaks connections on demand.
//!
//! [`Proxy`] stands between a client and a server. It forwards bytes unchanged and in order, and
//! can cut every connection, refuse new ones, or stop the flow for a while. A stall loses nothing:
//! bytes in flight arrive when it ends. Dropping the proxy resets its connections and closes its
//! port.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// A proxy in front of one server.
#[derive(Debug)]
pub(crate) struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl Proxy {
    /// Starts a proxy on a free port of 127.0.0.1, which accepts connections once this returns.
    pub(crate) async fn start(upstream: SocketAddr) -> io::Result<Proxy> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            refuses: AtomicBool::new(false),
            stalls: watch::Sender::new(false),
            connections: Mutex::new(HashMap::new()),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });

        let accepting = accept(listener, Arc::clone(&shared));
        let stop = shared.stop.clone();
        shared.tasks.spawn(async move {
            stop.run_until_cancelled_owned(accepting).await;
        });
        Ok(Proxy { addr, _stop: shared.stop.clone().drop_guard(), shared })
    }

    /// Returns the address that clients connect to.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Resets every open connection on both sides. New connections work.
    pub(crate) fn cut(&self) {
        for (_, cut) in self.shared.connections().drain() {
            cut.cancel();
        }
    }

    /// Resets new connections at once while `on`. Open ones continue.
    pub(crate) fn refuse(&self, on: bool) {
        self.shared.refuses.store(on, Ordering::SeqCst);
    }

    /// Stops the flow in both directions while `on`.
    ///
    /// Connections stay open and new ones are accepted.
    pub(crate) fn stall(&self, on: bool) {
        self.shared.stalls.send_replace(on);
    }
}

/// State shared by the proxy's tasks.
#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    refuses: AtomicBool,
    stalls: watch::Sender<bool>,
    /// Open connections by number, each with the token that cuts it.
    connections: Mutex<HashMap<u64, CancellationToken>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, HashMap<u64, CancellationToken>> {
        self.connections.lock().expect("no code panics while it holds the connections")
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    for number in 0.. {
        let Ok((client, _)) = listener.accept().await else {
            return;
        };
        if shared.refuses.load(Ordering::SeqCst) {
            reset(&client);
            continue;
        }
        let cut = shared.stop.child_token();
        shared.connections().insert(number, cut.clone());
        let shared_by_task = Arc::clone(&shared);
        shared.tasks.spawn(async move {
            carry(client, cut, &shared_by_task).await;
            shared_by_task.connections().remove(&number);
        });
    }
}

/// Forwards one connection until both sides have ended it, one fails, or it is cut.
async fn carry(mut client: TcpStream, cut: CancellationToken, shared: &Shared) {
    let connected = cut.run_until_cancelled(TcpStream::connect(shared.upstream));
    let Some(Ok(mut server)) = connected.await else {
        reset(&client);
        return;
    };

    let carried = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let both = async {
            tokio::try_join!(
                pump(from_client, to_server, shared.stalls.subscribe()),
                pump(from_server, to_client, shared.stalls.subscribe()),
            )
        };
        cut.run_until_cancelled(both).await
    };
    let ended_well = matches!(carried, Some(Ok(_)));
    if !ended_well {
        reset(&client);
        reset(&server);
    }
}

/// Copies bytes until the reader ends, and then shuts down the writer.
async fn pump(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    mut stalls: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = reader.read(&mut buffer).await?;
        // Wait after the read, so that bytes read before a stall do not slip through.
        if stalls.wait_for(|stalled| !stalled).await.is_err() {
            return Ok(());
        }
        if count == 0 {
            return writer.shutdown().await;
        }
        writer.write_all(&buffer[..count]).await?;
    }
}

/// Makes the socket close with a reset instead of an orderly shutdown.
fn reset(socket: &TcpStream) {
    // A broken socket needs no reset.
    let _ = socket.set_zero_linger();
}
