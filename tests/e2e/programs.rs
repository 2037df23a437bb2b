//! Both services as processes, which a test starts, stops and restarts at fixed addresses.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use image_service::{Role, TokenKeys};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::{
    client::{Client, client},
    database::Database,
    eventually::eventually_true,
    process::{Program, bound_to_test, program},
    stack::LIMIT,
};

/// A catalogue that replicas of image-service share, with the files that its programs need.
#[derive(Debug)]
pub(crate) struct Catalogue {
    keys: TokenKeys,
    database: Arc<Database>,
    pub(crate) directory: TempDir,
}

/// A program that listens on an address.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) addr: SocketAddr,
    pub(crate) program: Program,
}

impl Catalogue {
    pub(crate) async fn create() -> anyhow::Result<Self> {
        let database = Arc::new(Database::create().await?);
        let keys = TokenKeys::open(&database.data_dir())?;
        Ok(Self { keys, database, directory: tempfile::tempdir()? })
    }

    /// Reports whether several replicas can share the catalogue.
    pub(crate) fn is_shared(&self) -> bool {
        self.database.url().is_some()
    }

    pub(crate) fn database(&self) -> &Database {
        &self.database
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.database.data_dir()
    }

    pub(crate) fn token(&self, subject: &str, role: Role) -> String {
        self.keys.mint(subject, &[role], &[], &[], LIMIT * 100).expect("the subject is printable")
    }

    /// Returns a client that may create images, connected to `addr`.
    pub(crate) fn builder(&self, subject: &str, addr: SocketAddr) -> Client {
        client(addr, &self.token(subject, Role::Builder))
    }

    /// Starts an image-service with environment variables of the form `NAME=value`.
    pub(crate) async fn replica(
        &self,
        name: &str,
        environment: &[&str],
        flags: &[&str],
    ) -> anyhow::Result<Listening> {
        let url = self.database.url().map(|url| ["--database-url".to_owned(), url]);
        let flags = flags.iter().map(|&flag| flag.to_owned()).chain(url.into_iter().flatten());
        self.serve(name, environment, flags.collect()).await
    }

    /// Starts an image-service that reaches the database by another URL.
    pub(crate) async fn replica_by(&self, name: &str, url: &str) -> anyhow::Result<Listening> {
        self.serve(name, &[], vec!["--database-url".to_owned(), url.to_owned()]).await
    }

    async fn serve(&self, name: &str, environment: &[&str], flags: Vec<String>) -> anyhow::Result<Listening> {
        let data = self.database.data_dir().display().to_string();
        let all = ["serve".to_owned(), "--data-dir".to_owned(), data].into_iter().chain(flags);
        self.start("image-service", name, environment, all.collect()).await
    }

    /// Starts a build-worker that connects to the service at `server`.
    pub(crate) async fn worker(
        &self,
        name: &str,
        server: SocketAddr,
        docker_host: &str,
        environment: &[&str],
        flags: &[&str],
    ) -> anyhow::Result<Listening> {
        let file = |kind: &str| self.directory.path().join(format!("{name}.{kind}")).display().to_string();
        std::fs::write(Path::new(&file("token")), self.token(name, Role::Worker))?;
        let server = format!("http://{server}");
        let mut all: Vec<String> = [
            ["--server", &server],
            ["--token-file", &file("token")],
            ["--name", name],
            ["--docker-host", docker_host],
            ["--spool-dir", &file("spool")],
            // The tests' base images come from no registry.
            ["--allow-local", "trailer-test/*"],
        ]
        .concat()
        .into_iter()
        .map(ToOwned::to_owned)
        .collect();
        all.extend(flags.iter().map(|&flag| flag.to_owned()));
        self.start("build-worker", name, environment, all).await
    }

    async fn start(
        &self,
        which: &str,
        name: &str,
        environment: &[&str],
        flags: Vec<String>,
    ) -> anyhow::Result<Listening> {
        // All of 127.0.0.0/8 is this host, and no other program takes the port of a random address during a
        // restart.
        let [_, a, b, c] = fastrand::u32(..).to_be_bytes();
        let addr = SocketAddr::from((Ipv4Addr::new(127, a | 1, b, c | 1), 50051));
        let command = bound_to_test()
            .into_iter()
            .chain(["env".to_owned()])
            .chain(environment.iter().map(|&variable| variable.to_owned()))
            .chain([program(which)?])
            .chain(flags)
            .chain(["--listen".to_owned(), addr.to_string()]);
        let program = Program::start(self.directory.path(), name, command)?;
        let mut listening = Listening { addr, program };
        listening.answers().await?;
        Ok(listening)
    }

    /// Returns what a program has printed.
    pub(crate) fn log(&self, name: &str) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.directory.path().join(format!("{name}.log")))?)
    }
}

impl Listening {
    /// Stops the program gracefully and starts it again.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<()> {
        self.program.end(Signal::TERM).await?;
        self.program.start_again()?;
        self.answers().await
    }

    /// Waits until the program listens.
    pub(crate) async fn answers(&mut self) -> anyhow::Result<()> {
        eventually_true("it listens", async || {
            self.program.require_life()?;
            Ok(TcpStream::connect(self.addr).await.is_ok())
        })
        .await
    }
}
