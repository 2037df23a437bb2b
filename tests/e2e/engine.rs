//! A Docker Engine that plays scripts.
//!
//! [`FakeEngine`] listens on a Unix socket and speaks what Engine 26.1 (API 1.45) speaks to a
//! worker: over HTTP/1.1 ping, version, info and a small image table, and over gRPC the sessions,
//! solves and progress of `BuildKit`'s Control API. A client reaches gRPC by `POST /grpc`, or, from
//! API 1.53 on, by HTTP/2 on the socket itself. A [`Script`], chosen by a piece of text in the
//! Dockerfile, decides what a build does. The words of messages and the form of errors follow
//! captures of a real Engine 26.1.5 and the source of its `BuildKit`, 0.13.2.
//!
//! Promises: a REST request that is not known is answered 404 and recorded; a build is recorded
//! before its first progress goes out, and how it ended before its last; Solve answers after an open
//! Status stream has taken the last progress; dropping the engine ends every task and closes every
//! connection.

mod builds;
mod connection;
mod controller;
mod failure;
mod images;
mod player;
mod progress;
mod query;
mod release;
mod routes;
mod script;
#[cfg(test)]
mod selftest;
mod session;
mod state;
mod vertex;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::Context as _;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

pub(crate) use images::Image;
pub(crate) use script::{Gate, Script};
pub(crate) use state::{Ended, RecordedBuild, State};

use release::Release;
use session::Sessions;

/// The name of an engine's process, which the test's own process takes: it holds the socket.
const PROCESS: &str = "dockerd";

/// A scripted engine on a Unix socket in a directory of its own.
#[derive(Debug)]
pub(crate) struct FakeEngine {
    shared: Arc<Shared>,
    socket: PathBuf,
    _stop: DropGuard,
    _directory: TempDir,
}

impl FakeEngine {
    /// Starts an engine of version 26.1.5. It accepts connections when this returns.
    pub(crate) async fn start() -> anyhow::Result<FakeEngine> {
        FakeEngine::start_as("26.1.5", "1.45").await
    }

    /// Starts an engine that says it has this version and this newest API version, like `1.45`.
    #[expect(clippy::unused_async, reason = "a listener needs a runtime, and callers await a start")]
    pub(crate) async fn start_as(version: &str, api_version: &str) -> anyhow::Result<FakeEngine> {
        // A worker looks for the processes of steps only beside an engine that it can see.
        std::fs::write("/proc/self/comm", PROCESS).context("the engine's name as a process")?;
        let directory = tempfile::tempdir().context("a directory for the engine's socket")?;
        let socket = directory.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).context("the engine's socket")?;

        let shared = Arc::new(Shared {
            name: socket.display().to_string(),
            release: Release::new(version, api_version)?,
            state: watch::Sender::new(State::default()),
            scripts: Mutex::new(Vec::new()),
            sessions: Sessions::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        shared.spawn(accept(listener, Arc::clone(&shared)));

        Ok(FakeEngine { _stop: shared.stop.clone().drop_guard(), shared, socket, _directory: directory })
    }

    /// Returns where the engine listens, as `DOCKER_HOST` writes it: `unix:///…/docker.sock`.
    pub(crate) fn docker_host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Plays `script` for builds whose Dockerfile contains `marker` from now on. The newest rule
    /// that matches wins, so a later call overrides an earlier one.
    pub(crate) fn on(&self, marker: &str, script: Script) {
        self.shared.scripts().push((marker.to_owned(), script));
    }

    /// Plays `script` for every build from now on.
    pub(crate) fn script(&self, script: Script) {
        self.on("", script);
    }

    /// Returns every build that was asked for, oldest first.
    pub(crate) fn builds(&self) -> Vec<RecordedBuild> {
        self.shared.state.borrow().builds.clone()
    }

    /// Returns the number of builds that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.shared.state.borrow().running()
    }

    /// Returns every tag and the id of the image that it names.
    pub(crate) fn tags(&self) -> BTreeMap<String, String> {
        self.shared.state.borrow().images.tags().clone()
    }

    /// Returns the requests that this engine does not know, as `METHOD path` or `Control.Method`.
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
    release: Release,
    state: watch::Sender<State>,
    scripts: Mutex<Vec<(String, Script)>>,
    sessions: Sessions,
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

    /// Records a request that the engine does not know.
    fn record_unexpected(&self, request: String) {
        self.state.send_modify(|state| state.unexpected.push(request));
    }

    fn scripts(&self) -> MutexGuard<'_, Vec<(String, Script)>> {
        self.scripts.lock().expect("no code panics while it holds the scripts")
    }

    /// Returns the script for a Dockerfile: the newest rule that matches, or the default script.
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
        shared.spawn(connection::serve(stream, Arc::clone(&shared)));
    }
}
