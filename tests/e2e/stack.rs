//! Both services in process, on ports of their own, configured by the command line and called over the
//! network as in a deployment.

use std::{env, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Parser as _;
use image_service::{Cli, Command, Role, TokenKeys};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    client::{Client, client},
    database::Database,
};

/// Time limit of anything that should take milliseconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Returns the amount of work of a test, which an environment variable may override.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
}

/// A running image-service with a data directory of its own.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) addr: SocketAddr,
    keys: TokenKeys,
    running: Running,
    /// Kept until the last service that uses it is gone.
    database: Arc<Database>,
}

/// A running build-worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) addr: SocketAddr,
    running: Running,
    _directory: TempDir,
}

/// A task that ends when stopped or dropped.
#[derive(Debug)]
struct Running {
    task: JoinHandle<anyhow::Result<()>>,
    shutdown: CancellationToken,
    _guard: DropGuard,
}

/// Prints what both services log, filtered by `TRAILER_TEST_LOG` in the syntax of `RUST_LOG`.
fn log() {
    let Ok(filter) = env::var("TRAILER_TEST_LOG") else { return };
    // Another test in this process may already have done this.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

impl Service {
    /// Starts a service with additional flags of `image-service serve`.
    pub(crate) async fn start_with(flags: &[&str]) -> anyhow::Result<Self> {
        log();
        Self::start_in(Arc::new(Database::create().await?), "127.0.0.1:0", flags).await
    }

    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    async fn start_in(database: Arc<Database>, listen: &str, flags: &[&str]) -> anyhow::Result<Self> {
        let url = database.url();
        Self::start_at(database, url, listen, flags).await
    }

    async fn start_at(
        database: Arc<Database>,
        url: Option<String>,
        listen: &str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let data = database.data_dir();
        let data_flag = data.to_str().context("a path in UTF-8")?;
        let mut fixed = vec!["image-service", "serve", "--listen", listen, "--data-dir", data_flag];
        fixed.extend(url.iter().flat_map(|url| ["--database-url", url]));
        // An actor that sends no heartbeats, or a busy machine, must not change what a test is about.
        const PATIENT: [&str; 6] = ["--offline-after", "10m", "--stop-after", "10m", "--lease", "30m"];
        let is_timed = PATIENT.iter().step_by(2).any(|flag| flags.contains(flag));
        fixed.extend(PATIENT.iter().filter(|_| !is_timed));
        let Command::Serve(config) = Cli::try_parse_from(fixed.iter().chain(flags))?.command else {
            anyhow::bail!("the flags are those of another command");
        };
        let bound = image_service::bind(config).await?;
        Ok(Self {
            addr: bound.local_addr()?,
            keys: TokenKeys::open(&data)?,
            running: Running::start(|shutdown| async move { Ok(bound.run(shutdown).await?) }),
            database,
        })
    }

    /// Starts another replica on the same database; returns `None` on SQLite, which has a single process.
    pub(crate) async fn start_replica(&self) -> anyhow::Result<Option<Self>> {
        if self.database.url().is_none() {
            return Ok(None);
        }
        Self::start_in(Arc::clone(&self.database), "127.0.0.1:0", &[]).await.map(Some)
    }

    /// Starts another replica that reaches the same database by another URL.
    pub(crate) async fn start_replica_at(&self, url: &str) -> anyhow::Result<Self> {
        Self::start_at(Arc::clone(&self.database), Some(url.to_owned()), "127.0.0.1:0", &[]).await
    }

    pub(crate) fn database(&self) -> &Arc<Database> {
        &self.database
    }

    /// Stops the service and starts another on the same data and port.
    pub(crate) async fn restart(self) -> anyhow::Result<Self> {
        let database = Arc::clone(&self.database);
        self.restore(database, &[]).await
    }

    /// Stops the service, makes a backup, and starts another on the same data and port.
    pub(crate) async fn back_up(self) -> anyhow::Result<(Self, Arc<Database>)> {
        let (database, listen) = (Arc::clone(&self.database), self.addr.to_string());
        self.stop().await?;
        let backup = database.back_up().await?;
        Ok((Self::start_in(database, &listen, &[]).await?, backup))
    }

    /// Stops the service and starts another on a backup and the same port.
    pub(crate) async fn restore(self, backup: Arc<Database>, flags: &[&str]) -> anyhow::Result<Self> {
        let listen = self.addr.to_string();
        self.stop().await?;
        Self::start_in(backup, &listen, flags).await
    }

    /// Stops the service and returns its database.
    pub(crate) async fn end(self) -> anyhow::Result<Arc<Database>> {
        let database = Arc::clone(&self.database);
        self.stop().await?;
        Ok(database)
    }

    /// Starts a service on an existing database.
    pub(crate) async fn start_on(database: Arc<Database>, flags: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(database, "127.0.0.1:0", flags).await
    }

    /// Shuts the service down gracefully.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.running.stop().await
    }

    /// Begins the shutdown without waiting for its end.
    pub(crate) fn begin_shutdown(&self) {
        self.running.shutdown.cancel();
    }

    /// Returns a token of this service.
    pub(crate) fn token(&self, subject: &str, roles: &[Role]) -> String {
        self.token_for(subject, roles, Duration::from_secs(3600))
    }

    /// Returns a token of this service with these pools.
    pub(crate) fn token_in(&self, subject: &str, roles: &[Role], pools: &[&str]) -> String {
        let pools: Vec<String> = pools.iter().map(|&pool| pool.to_owned()).collect();
        self.keys.mint(subject, roles, &[], &pools, Duration::from_secs(3600)).expect("valid claims")
    }

    /// Returns a token of this service with these groups.
    pub(crate) fn token_of_member(&self, subject: &str, roles: &[Role], groups: &[&str]) -> String {
        let groups: Vec<String> = groups.iter().map(|&group| group.to_owned()).collect();
        self.keys.mint(subject, roles, &groups, &[], Duration::from_secs(3600)).expect("valid claims")
    }

    pub(crate) fn token_for(&self, subject: &str, roles: &[Role], ttl: Duration) -> String {
        self.keys.mint(subject, roles, &[], &[], ttl).expect("the subject is printable")
    }

    /// Returns a client that may create images.
    pub(crate) fn builder(&self, subject: &str) -> Client {
        self.client(&self.token(subject, &[Role::Builder]))
    }

    pub(crate) fn client(&self, token: &str) -> Client {
        client(self.addr, token)
    }
}

impl Worker {
    /// Starts a worker that reaches the service at `server`, on the engine at `docker_host`.
    pub(crate) fn start_at(
        service: &Service,
        server: SocketAddr,
        name: &str,
        docker_host: &str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        Self::start_by(service, &format!("http://{server}"), name, docker_host, flags)
    }

    /// Starts a worker that reaches the service by the URL `server`.
    pub(crate) fn start_by(
        service: &Service,
        server: &str,
        name: &str,
        docker_host: &str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let token_file = directory.path().join("token");
        std::fs::write(&token_file, service.token(name, &[Role::Worker]))?;
        let token_flag = token_file.to_str().context("a path in UTF-8")?;
        let spool = directory.path().join("spool");
        let spool_flag = ["--spool-dir", spool.to_str().context("a path in UTF-8")?];
        let has_its_own = flags.contains(&"--spool-dir");
        let fixed = [
            "build-worker",
            // The tests' base images come from no registry.
            "--allow-local",
            "trailer-test/*",
            "--server",
            server,
            "--token-file",
            token_flag,
            "--name",
            name,
            "--listen",
            "127.0.0.1:0",
            "--docker-host",
            docker_host,
        ];
        let config = build_worker::Config::try_parse_from(
            fixed.iter().chain(spool_flag.iter().filter(|_| !has_its_own)).chain(flags),
        )?;
        let bound = build_worker::bind(config)?;
        Ok(Self {
            addr: bound.local_addr()?,
            running: Running::start(|shutdown| async move { Ok(bound.run(shutdown).await?) }),
            _directory: directory,
        })
    }

    pub(crate) fn start(service: &Service, name: &str, docker_host: &str) -> anyhow::Result<Self> {
        Self::start_at(service, service.addr, name, docker_host, &[])
    }

    /// Shuts the worker down gracefully.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.running.stop().await
    }
}

impl Running {
    fn start<F>(run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let shutdown = CancellationToken::new();
        Self { task: tokio::spawn(run(shutdown.clone())), _guard: shutdown.clone().drop_guard(), shutdown }
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        tokio::time::timeout(LIMIT, self.task).await.context("it did not shut down in time")??
    }
}
