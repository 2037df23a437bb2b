//! A scripted Docker Engine.
//!
//! [`FakeEngine`] listens on a Unix socket and serves what a worker needs of Engine 26.1 (API
//! 1.45): over HTTP/1.1 ping, version, info and a small image table, and over gRPC the sessions,
//! solves and progress of `BuildKit`'s Control API. A client reaches gRPC by `POST /grpc` or, from
//! API 1.53 on, by HTTP/2 on the socket itself. A [`Script`], chosen by a piece of text in the
//! Dockerfile, determines what a build does. Messages and errors follow captures of a real Engine
//! 26.1.5 and the source of its `BuildKit`, 0.13.2.
//!
//! Guarantees: an unknown REST request is answered with 404 and recorded; a build is recorded
//! before its first progress is sent, and its outcome before its last; Solve returns after an open
//! Status stream has received the last progress; dropping the engine ends every task and closes
//! every connection.

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

/// Process name of an engine. The test's own process takes it, because it holds the socket.
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
    /// Starts an engine of version 26.1.5, which accepts connections once this returns.
    pub(crate) async fn start() -> anyhow::Result<FakeEngine> {
        FakeEngine::start_as("26.1.5", "1.45").await
    }

    /// Starts an engine that reports this version and this newest API version, such as `1.45`.
    #[expect(clippy::unused_async, reason = "a listener needs a runtime, and callers await a start")]
    pub(crate) async fn start_as(version: &str, api_version: &str) -> anyhow::Result<FakeEngine> {
        // A worker looks for the processes of steps only if it can see the engine's process.
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

    /// Returns the engine's address in the form of `DOCKER_HOST`: `unix:///…/docker.sock`.
    pub(crate) fn docker_host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Plays `script` from now on for builds whose Dockerfile contains `marker`.
    ///
    /// The newest matching rule wins, so a later call overrides an earlier one.
    pub(crate) fn on(&self, marker: &str, script: Script) {
        self.shared.scripts().push((marker.to_owned(), script));
    }

    /// Plays `script` from now on for every build.
    pub(crate) fn script(&self, script: Script) {
        self.on("", script);
    }

    /// Returns all requested builds, oldest first.
    pub(crate) fn builds(&self) -> Vec<RecordedBuild> {
        self.shared.state.borrow().builds.clone()
    }

    /// Returns the number of builds that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.shared.state.borrow().running()
    }

    /// Returns every tag with the id of its image.
    pub(crate) fn tags(&self) -> BTreeMap<String, String> {
        self.shared.state.borrow().images.tags().clone()
    }

    /// Returns the unknown requests, as `METHOD path` or `Control.Method`.
    pub(crate) fn unexpected(&self) -> Vec<String> {
        self.shared.state.borrow().unexpected.clone()
    }

    /// Returns an image by a name or its id.
    pub(crate) fn image(&self, name: &str) -> Option<Image> {
        self.shared.state.borrow().images.find(name).cloned()
    }

    /// Adds an image under a name.
    pub(crate) fn load(&self, image: Image, name: &str) {
        self.shared.state.send_modify(|state| {
            state.images.tag(&image.id, name);
            state.images.insert(image.clone());
        });
    }

    /// Returns the `X-Registry-Auth` of every request that concerned a registry since the last call.
    pub(crate) fn take_registry_auths(&self) -> Vec<String> {
        let mut taken = Vec::new();
        self.shared.state.send_modify(|state| taken = std::mem::take(&mut state.registry_auths));
        taken
    }

    /// Waits at most `within` until `condition` holds for the engine's state.
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

/// State shared by the engine's tasks.
#[derive(Debug)]
struct Shared {
    /// Unique name of the engine, from which image ids are made.
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

    /// Records an unknown request.
    fn record_unexpected(&self, request: String) {
        self.state.send_modify(|state| state.unexpected.push(request));
    }

    fn scripts(&self) -> MutexGuard<'_, Vec<(String, Script)>> {
        self.scripts.lock().expect("no code panics while it holds the scripts")
    }

    /// Returns the script for a Dockerfile: the newest matching rule's, or the default.
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
