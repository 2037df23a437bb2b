//! A Docker Engine that plays scripts.
//!
//! [`FakeEngine`] listens on a unix socket and speaks what Engine 20.10 (API 1.41, with BuildKit)
//! speaks to bollard: ping, version, info, sessions, builds, cancels and a small image table. What
//! a build does is decided by a [`Script`], chosen by a piece of text in its Dockerfile. The order
//! and the words of every message follow captures of a real Engine 20.10.24.
//!
//! Promises: a request that is not known is answered 404 and recorded; a build is recorded before
//! its first line goes out, and how it ended before its last; dropping the engine ends every task
//! and closes every connection.

mod builds;
mod images;
mod player;
mod routes;
mod script;
mod state;
mod wire;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Context as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

pub(crate) use images::Image;
pub(crate) use script::{Gate, Script};
pub(crate) use state::{Ended, RecordedBuild, State};

/// A scripted engine on a unix socket in a directory of its own.
#[derive(Debug)]
pub(crate) struct FakeEngine {
    shared: Arc<Shared>,
    socket: PathBuf,
    _stop: DropGuard,
    _directory: TempDir,
}

impl FakeEngine {
    /// Starts an engine. It accepts connections when this returns.
    #[expect(clippy::unused_async, reason = "a listener needs a runtime, and callers await a start")]
    pub(crate) async fn start() -> anyhow::Result<FakeEngine> {
        let directory = tempfile::tempdir().context("a directory for the engine's socket")?;
        let socket = directory.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).context("the engine's socket")?;

        let shared = Arc::new(Shared {
            name: socket.display().to_string(),
            state: watch::Sender::new(State::default()),
            scripts: Mutex::new(Vec::new()),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        shared.spawn(accept(listener, Arc::clone(&shared)));

        Ok(FakeEngine { _stop: shared.stop.clone().drop_guard(), shared, socket, _directory: directory })
    }

    /// Where the engine listens, as `DOCKER_HOST` writes it: `unix:///…/docker.sock`.
    pub(crate) fn docker_host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Builds whose Dockerfile contains `marker` play `script` from now on. The newest rule that
    /// matches wins, so a later call overrides an earlier one.
    pub(crate) fn on(&self, marker: &str, script: Script) {
        self.shared.scripts().push((marker.to_owned(), script));
    }

    /// Every build plays `script` from now on.
    pub(crate) fn script(&self, script: Script) {
        self.on("", script);
    }

    /// Every build that was asked for, oldest first.
    pub(crate) fn builds(&self) -> Vec<RecordedBuild> {
        self.shared.state.borrow().builds.clone()
    }

    /// How many builds have not ended.
    pub(crate) fn running(&self) -> usize {
        self.shared.state.borrow().running()
    }

    /// Every tag and the id of the image that it names.
    pub(crate) fn tags(&self) -> BTreeMap<String, String> {
        self.shared.state.borrow().images.tags().clone()
    }

    /// The requests that this engine does not know, as `METHOD path`.
    pub(crate) fn unexpected(&self) -> Vec<String> {
        self.shared.state.borrow().unexpected.clone()
    }

    /// Waits until `condition` holds for the engine's state, at most for `within`.
    pub(crate) async fn wait_for(
        &self,
        condition: impl FnMut(&State) -> bool,
        within: Duration,
    ) -> anyhow::Result<()> {
        let mut state = self.shared.state.subscribe();
        let waited = tokio::time::timeout(within, state.wait_for(condition)).await.map(|held| held.is_ok());
        match waited {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => {
                let seen = self.shared.state.borrow();
                anyhow::bail!("not within {within:?}; the engine's state is {seen:#?}")
            }
        }
    }
}

/// What the engine's tasks share.
#[derive(Debug)]
struct Shared {
    /// Unique for each engine; image ids are made from it.
    name: String,
    state: watch::Sender<State>,
    scripts: Mutex<Vec<(String, Script)>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Shared {
    /// Runs `task` until it ends or the engine stops, whichever comes first.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled_owned(task).await;
        });
    }

    fn scripts(&self) -> MutexGuard<'_, Vec<(String, Script)>> {
        self.scripts.lock().expect("no code panics while it holds the scripts")
    }

    /// The script for a Dockerfile: the newest rule that matches, or the default script.
    fn script_for(&self, dockerfile: &str) -> Script {
        self.scripts()
            .iter()
            .rev()
            .find(|(marker, _)| dockerfile.contains(marker))
            .map(|(_, script)| script.clone())
            .unwrap_or_default()
    }
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        shared.spawn(serve(stream, Arc::clone(&shared)));
    }
}

/// Serves one connection. Its errors are clients that went away, which is no news here.
async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(routes::answer(request, &shared).await) }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await;
}
