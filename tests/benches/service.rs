//! The programs in their release build, run as in a deployment, each in its own process.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use image_service::{Role, TokenKeys};
use rustix::process::Signal;
use tempfile::TempDir;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    client::{self, Client},
    eventually::eventually_true,
    process::{Program, bound_to_test, program},
};

/// Name of the database file in a data directory.
pub(crate) const DATABASE: &str = "catalogue.sqlite";
/// The gRPC service that becomes ready last, because it has the whole catalogue to load.
const CATALOGUE: &str = "trailer.images.v1.ImageService";
/// The gRPC service that workers connect to.
const DISPATCH: &str = "trailer.dispatch.v1.DispatchService";
const PATIENCE: Duration = Duration::from_secs(1_800);
/// Flags that lift the limits on callers.
const UNLIMITED: [&str; 14] = [
    "--max-call-rate",
    "0",
    "--max-calls",
    "0",
    "--max-streams",
    "0",
    "--max-pending-builds",
    "0",
    "--max-images",
    "0",
    "--max-image-bytes",
    "0",
    // Bytes.
    "--index-memory",
    "8589934592",
];

/// An image-service, with the keys and files for its callers and workers.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) addr: SocketAddr,
    keys: TokenKeys,
    program: Program,
    directory: TempDir,
    /// Time from the last start until the catalogue was served.
    pub(crate) ready_after: Duration,
}

/// A server that the service is compared with.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    _program: Program,
    _directory: TempDir,
}

impl Service {
    /// Starts a service without limits on callers.
    ///
    /// `data` is its data directory, which may be new, and `url` that of its Postgres database, if it has
    /// one.
    pub(crate) async fn start(data: &Path, url: Option<&str>, flags: &[&str]) -> anyhow::Result<Self> {
        Self::start_limited(data, url, &[&UNLIMITED, flags].concat()).await
    }

    /// Starts a service with the limits of a deployment.
    pub(crate) async fn start_limited(
        data: &Path,
        url: Option<&str>,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let addr = own_address();
        let (listen, data_dir) = (addr.to_string(), data.display().to_string());
        let mut command = vec!["serve", "--listen", &listen, "--data-dir", &data_dir];
        command.extend(url.iter().flat_map(|url| ["--database-url", url]));
        command.extend(flags);
        let keys = TokenKeys::open(data)?;
        let begun = Instant::now();
        let program = start(&directory, "image-service", &program("image-service")?, &command)?;
        let mut service = Self { addr, keys, program, directory, ready_after: Duration::ZERO };
        service.answers().await?;
        service.ready_after = begun.elapsed();
        Ok(service)
    }

    /// Waits until the catalogue is reported as serving and a list is answered.
    async fn answers(&mut self) -> anyhow::Result<()> {
        self.serves(CATALOGUE).await?;
        let begun = Instant::now();
        let admin = self.admin();
        while admin.list().await.is_err() {
            self.program.require_life()?;
            anyhow::ensure!(begun.elapsed() < PATIENCE, "it does not answer a list");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// Waits until the health check reports the gRPC service `name` as serving.
    async fn serves(&mut self, name: &str) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut health = HealthClient::new(client::channel(self.addr));
        let request = HealthCheckRequest { service: name.to_owned() };
        loop {
            let answer = health.check(request.clone()).await;
            if answer.is_ok_and(|answer| answer.get_ref().status() == ServingStatus::Serving) {
                return Ok(());
            }
            self.program.require_life()?;
            anyhow::ensure!(begun.elapsed() < PATIENCE, "it does not serve {name}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Shuts the service down and starts it again; returns the time from there until workers were served.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<Duration> {
        self.program.end(Signal::TERM).await?;
        let begun = Instant::now();
        self.program.start_again()?;
        self.serves(DISPATCH).await?;
        let dispatch_after = begun.elapsed();
        self.answers().await?;
        self.ready_after = begun.elapsed();
        Ok(dispatch_after)
    }

    pub(crate) fn token(&self, subject: &str, roles: &[Role]) -> String {
        self.keys.mint(subject, roles, &[], &[], PATIENCE * 4).expect("the subject is printable")
    }

    /// Returns a caller on a connection of its own.
    pub(crate) fn client(&self, subject: &str, roles: &[Role]) -> Client {
        client::client(self.addr, &self.token(subject, roles))
    }

    pub(crate) fn admin(&self) -> Client {
        self.client("admin", &[Role::Admin])
    }

    /// Returns the current memory, in MiB.
    pub(crate) fn memory(&self) -> anyhow::Result<f64> {
        Ok(self.program.memory("VmRSS:")? as f64 / f64::from(1 << 20))
    }

    /// Returns the peak memory, in MiB.
    pub(crate) fn peak_memory(&self) -> anyhow::Result<f64> {
        Ok(self.program.peak_memory()? as f64 / f64::from(1 << 20))
    }

    /// Starts a build-worker of the service and waits until it is online.
    pub(crate) async fn worker(
        &self,
        name: &str,
        docker_host: &str,
        flags: &[&str],
    ) -> anyhow::Result<Program> {
        let file = |kind: &str| self.directory.path().join(format!("{name}.{kind}")).display().to_string();
        fs::write(file("token"), self.token(name, &[Role::Worker]))?;
        let (server, token, spool) = (format!("http://{}", self.addr), file("token"), file("spool"));
        let listen = own_address().to_string();
        let mut command = vec![
            "--server",
            &server,
            "--token-file",
            &token,
            "--spool-dir",
            &spool,
            "--name",
            name,
            "--docker-host",
            docker_host,
            "--listen",
            &listen,
        ];
        command.extend(flags);
        let worker = start(&self.directory, name, &program("build-worker")?, &command)?;
        self.connected(name).await?;
        Ok(worker)
    }

    /// Waits until a worker is online.
    pub(crate) async fn connected(&self, name: &str) -> anyhow::Result<()> {
        let mut workers = self.admin().workers;
        let request = proto::images::ListWorkersRequest { page_size: 1_000, ..Default::default() };
        let begun = Instant::now();
        loop {
            let listed = workers.list_workers(request.clone()).await?;
            if listed.into_inner().workers.iter().any(|worker| worker.name == name && worker.online) {
                return Ok(());
            }
            anyhow::ensure!(begun.elapsed() < Duration::from_secs(60), "{name} does not connect");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn end(mut self) -> anyhow::Result<()> {
        self.program.end(Signal::TERM).await
    }
}

impl Running {
    /// Starts this program again, as a bare server.
    pub(crate) async fn bare(arguments: &[&str]) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let addr = own_address();
        let myself = std::env::current_exe()?.display().to_string();
        let listen = addr.to_string();
        let command: Vec<&str> = [crate::bare::ARGUMENT, &listen].iter().chain(arguments).copied().collect();
        let mut program = start(&directory, "bare", &myself, &command)?;
        eventually_true("the bare server listens", async || {
            program.require_life()?;
            Ok(tokio::net::TcpStream::connect(addr).await.is_ok())
        })
        .await?;
        Ok(Self { addr, _program: program, _directory: directory })
    }
}

fn start(directory: &TempDir, name: &str, program: &str, arguments: &[&str]) -> anyhow::Result<Program> {
    let command = bound_to_test()
        .into_iter()
        .chain(["env", "RUST_LOG=info", program].map(ToOwned::to_owned))
        .chain(arguments.iter().map(|&argument| argument.to_owned()));
    Program::start(directory.path(), name, command)
}

/// Returns an address that no other program uses: all of 127.0.0.0/8 is this host.
fn own_address() -> SocketAddr {
    let [_, a, b, c] = fastrand::u32(..).to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, a | 1, b, c | 1), 50051))
}

/// Returns the directory that keeps `name` between runs, for data that takes long to create.
pub(crate) fn kept(name: &str) -> anyhow::Result<PathBuf> {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench")).join(name);
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(directory)
}
