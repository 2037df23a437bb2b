//! A relay between a service and its Postgres server that can stall or close connections.

use std::sync::Arc;

use anyhow::Context as _;
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixListener, UnixStream},
    sync::watch,
};
use tokio_util::{sync::DropGuard, task::TaskTracker};

/// A relay to one server, which stops when dropped.
#[derive(Debug)]
pub(crate) struct Relay {
    url: String,
    state: watch::Sender<State>,
    _directory: TempDir,
    _stop: DropGuard,
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
struct State {
    /// Set while no bytes flow.
    stalled: bool,
    /// Set while connections are closed, and new ones at once.
    closed: bool,
}

impl Relay {
    /// Starts a relay to the database of a URL.
    pub(crate) fn start(url: &str) -> anyhow::Result<Self> {
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let host = query.split('&').find_map(|part| part.strip_prefix("host="));
        let directory = tempfile::tempdir()?;
        let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432"))?;
        let (upstream, own) = match host {
            Some(host) => {
                let port = query.split('&').find_map(|part| part.strip_prefix("port=")).unwrap_or("5432");
                let rest =
                    query.split('&').filter(|part| !part.starts_with("host=") && !part.starts_with("port="));
                let rest: String = rest.map(|part| format!("&{part}")).collect();
                (Upstream::Unix(format!("{host}/.s.PGSQL.{port}")), (base.to_owned(), rest))
            }
            None => {
                let (scheme, rest) = base.split_once("://").context("a URL")?;
                let (authority, path) = rest.split_once('/').context("a database in the URL")?;
                let (user, addr) = authority.rsplit_once('@').map_or(("", authority), |parts| parts);
                let addr = if addr.contains(':') { addr.to_owned() } else { format!("{addr}:5432") };
                let user = if user.is_empty() { String::new() } else { format!("{user}@") };
                (Upstream::Tcp(addr), (format!("{scheme}://{user}localhost/{path}"), format!("&{query}")))
            }
        };
        let url = format!("{}?host={}&port=5432{}", own.0, directory.path().display(), own.1);
        let state = watch::Sender::new(State::default());
        let stop = tokio_util::sync::CancellationToken::new();
        tokio::spawn({
            let (stop, state, upstream) = (stop.clone(), state.clone(), Arc::new(upstream));
            async move {
                let connections = TaskTracker::new();
                while let Some(Ok((client, _))) = stop.run_until_cancelled(listener.accept()).await {
                    let (state, upstream, stop) = (state.subscribe(), Arc::clone(&upstream), stop.clone());
                    connections.spawn(async move {
                        stop.run_until_cancelled(relay(client, &upstream, state)).await
                    });
                }
            }
        });
        Ok(Self { url, state, _directory: directory, _stop: stop.drop_guard() })
    }

    /// Returns the URL of the database through this relay.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Stops the flow in both directions while `on`.
    pub(crate) fn stall(&self, on: bool) {
        self.state.send_modify(|state| state.stalled = on);
    }

    /// Closes all connections, and new ones at once, while `on`.
    pub(crate) fn close(&self, on: bool) {
        self.state.send_modify(|state| state.closed = on);
    }
}

#[derive(Debug)]
enum Upstream {
    Unix(String),
    Tcp(String),
}

async fn relay(client: UnixStream, upstream: &Upstream, mut state: watch::Receiver<State>) {
    let flows = state.clone();
    let (read, write) = client.into_split();
    let copying = async {
        match upstream {
            Upstream::Unix(path) => {
                let (from, to) = UnixStream::connect(path).await?.into_split();
                both(read, to, from, write, flows).await
            }
            Upstream::Tcp(addr) => {
                let (from, to) = TcpStream::connect(addr).await?.into_split();
                both(read, to, from, write, flows).await
            }
        }
    };
    tokio::select! {
        _ = copying => {}
        _ = state.wait_for(|state| state.closed) => {}
    }
}

async fn both(
    read: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    from: impl AsyncRead + Unpin,
    write: impl AsyncWrite + Unpin,
    state: watch::Receiver<State>,
) -> std::io::Result<()> {
    tokio::select! {
        copied = copy(read, to, state.clone()) => copied,
        copied = copy(from, write, state) => copied,
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut bytes).await?;
        if count == 0 || state.wait_for(|state| !state.stalled).await.is_err() {
            return Ok(());
        }
        to.write_all(&bytes[..count]).await?;
    }
}
