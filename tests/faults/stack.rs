//! Both services as programs, each at an address that it keeps across restarts.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use image_service::{Role, TokenKeys};
use proto::{
    images::{BuildEvent, BuildState},
    watch::BuildWatch,
};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{net::TcpStream, task::JoinHandle};
use tonic::Status;

use crate::{
    answers::{assert_gapless, states},
    client::{Client, client},
    docker_engine::{BASE, Engine},
    eventually::eventually_true,
    process::{Program, bound_to_test, program},
};

/// Maximum time for anything that should take a moment.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Flags of image-service with a short lease, so that a silent worker soon loses its builds.
pub(crate) const SHORT_LEASE: [&str; 10] = [
    "--heartbeat",
    "300ms",
    "--offline-after",
    "1500ms",
    "--stop-after",
    "3s",
    "--stop-timeout",
    "3s",
    "--lease",
    "7s",
];

/// An image-service.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) addr: SocketAddr,
    data: PathBuf,
    keys: TokenKeys,
    pub(crate) program: Program,
}

/// A build-worker.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Address of its health checks.
    pub(crate) addr: SocketAddr,
    pub(crate) program: Program,
}

/// Creates the directory for all files of the services and engines of one test.
pub(crate) fn directory() -> anyhow::Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("trailer-faults.").tempdir_in("/tmp")?)
}

/// Returns an address for a program to keep across restarts.
///
/// All of 127.0.0.0/8 is this host. Nothing else takes the port while the program is away, and no client
/// connects to itself meanwhile, as can happen at an ephemeral port.
fn new_address() -> SocketAddr {
    let [_, a, b, c] = fastrand::u32(..).to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, a | 1, b, c | 1), 50051))
}

impl Service {
    /// Starts a service with additional flags of `image-service serve`.
    pub(crate) async fn start(directory: &Path, flags: &[&str]) -> anyhow::Result<Self> {
        let addr = new_address();
        let data = directory.join("data");
        let keys = TokenKeys::open(&data)?;
        let fixed = ["serve", "--listen", &addr.to_string(), "--data-dir", &data.display().to_string()]
            .map(ToOwned::to_owned);
        let command = bound_to_test()
            .into_iter()
            .chain([program("image-service")?])
            .chain(fixed)
            .chain(flags.iter().map(|&flag| flag.to_owned()));
        let program = Program::start(directory, "image-service", command)?;
        let mut service = Self { addr, data, keys, program };
        service.answers().await?;
        Ok(service)
    }

    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.program.kill()
    }

    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        self.program.start_again()
    }

    /// Waits until the service accepts connections.
    pub(crate) async fn answers(&mut self) -> anyhow::Result<()> {
        eventually_true("it listens", async || {
            self.program.require_life()?;
            Ok(TcpStream::connect(self.addr).await.is_ok())
        })
        .await
        .with_context(|| self.program.output())
    }

    /// Returns a caller that may create images.
    pub(crate) fn builder(&self, subject: &str) -> Client {
        client(self.addr, &self.token(subject, Role::Builder))
    }

    pub(crate) fn database_file(&self) -> PathBuf {
        self.data.join("catalogue.sqlite")
    }

    /// Returns the caller of the platform, which snapshots workspaces.
    pub(crate) fn platform(&self) -> Client {
        client(self.addr, &self.token("platform", Role::Service))
    }

    /// Returns the token of a caller that may create images.
    pub(crate) fn token_of(&self, subject: &str) -> String {
        self.token(subject, Role::Builder)
    }

    fn token(&self, subject: &str, role: Role) -> String {
        self.keys
            .mint(subject, &[role], &[], &[], Duration::from_secs(3600))
            .expect("the subject is printable")
    }
}

impl Worker {
    /// Starts a worker that reaches the service at `server`.
    pub(crate) fn start(
        directory: &Path,
        service: &Service,
        server: SocketAddr,
        name: &str,
        engine: &Engine,
        slots: u16,
    ) -> anyhow::Result<Self> {
        Self::start_with(directory, service, server, name, engine, slots, &[])
    }

    /// Starts a worker with additional flags.
    pub(crate) fn start_with(
        directory: &Path,
        service: &Service,
        server: SocketAddr,
        name: &str,
        engine: &Engine,
        slots: u16,
        further: &[&str],
    ) -> anyhow::Result<Self> {
        let addr = new_address();
        let token_file = directory.join(format!("{name}.token"));
        std::fs::write(&token_file, service.token(name, Role::Worker))?;
        let flags = [
            ("server", format!("http://{server}")),
            ("token-file", token_file.display().to_string()),
            ("name", name.to_owned()),
            ("listen", addr.to_string()),
            ("docker-host", engine.host()),
            ("slots", slots.to_string()),
            // The tests' base images come from no registry.
            ("allow-local", "trailer-test/*".to_owned()),
        ];
        let command = bound_to_test()
            .into_iter()
            .chain([program("build-worker")?])
            .chain(flags.into_iter().map(|(flag, value)| format!("--{flag}={value}")))
            .chain(further.iter().map(|&flag| flag.to_owned()));
        Ok(Self { addr, program: Program::start(directory, name, command)? })
    }

    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.program.kill()
    }

    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        self.program.start_again()
    }

    /// Stops the process until it is resumed, like a host that is suspended.
    pub(crate) fn pause(&self) -> anyhow::Result<()> {
        self.program.signal(Signal::STOP)
    }

    pub(crate) fn resume(&self) -> anyhow::Result<()> {
        self.program.signal(Signal::CONT)
    }
}

/// Returns a Dockerfile with a unique step that prints 1 to `count`, pausing after each number.
pub(crate) fn counting(count: u32, pause: &str) -> String {
    let unique = uuid::Uuid::new_v4().simple().to_string();
    format!(
        "FROM {BASE}\nENV UNIQUE={unique}\nRUN i=0; while [ $i -lt {count} ]; do i=$((i+1)); echo $i; /bin/busybox sleep {pause}; done"
    )
}

/// Returns the lines that the step of [`counting`] prints.
pub(crate) fn counted(count: u32) -> Vec<String> {
    (1..=count).map(|i| i.to_string()).collect()
}

/// Watches a build to its end, resuming whenever the service comes back.
pub(crate) fn watch(client: &Client, build: &str) -> JoinHandle<Result<Vec<BuildEvent>, Status>> {
    let mut watch = BuildWatch::new(client.builds.clone(), build.to_owned());
    tokio::spawn(async move {
        let mut events = Vec::new();
        while let Some(event) = watch.next().await? {
            events.push(event);
        }
        Ok(events)
    })
}

/// Returns the events of a [`watch`], and fails if the build does not end within `limit`.
pub(crate) async fn ended(
    watch: JoinHandle<Result<Vec<BuildEvent>, Status>>,
    limit: Duration,
) -> anyhow::Result<Vec<BuildEvent>> {
    let events = tokio::time::timeout(limit, watch).await.context("the build does not end")???;
    assert_gapless(&events, 1);
    Ok(events)
}

/// Returns the events of the last attempt.
pub(crate) fn last_attempt(events: &[BuildEvent]) -> &[BuildEvent] {
    let claimed = |event: &BuildEvent| states(std::slice::from_ref(event)) == [BuildState::Claimed];
    &events[events.iter().rposition(claimed).unwrap_or(0)..]
}
