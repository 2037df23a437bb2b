//! A Postgres server for one test.

use std::{
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use sea_orm::Database;
use tempfile::TempDir;

use crate::{
    eventually::eventually_true,
    process::{Program, bound_to_test},
};

/// A server that listens on a Unix socket in its own directory.
#[derive(Debug)]
pub(crate) struct Postgres {
    pub(crate) program: Program,
    directory: TempDir,
}

impl Postgres {
    /// Starts the newest Postgres of this host as the user `postgres`, because it refuses to run as root.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let bin = newest()?;
        let id = |flag: &str| -> anyhow::Result<u32> {
            let stdout = Command::new("id").args([flag, "postgres"]).output()?.stdout;
            String::from_utf8(stdout)?.trim().parse().context("the user postgres is missing")
        };
        let (user, group) = (id("-u")?, id("-g")?);
        let directory = tempfile::Builder::new().prefix("trailer-postgres.").tempdir_in("/tmp")?;
        chown(directory.path(), Some(user), Some(group))?;
        let data = directory.path().join("data").display().to_string();
        let mut command = bound_to_test().to_vec();
        command.extend([format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()]);
        let mut initdb = Command::new(&command[0]);
        initdb.args(&command[1..]).arg(bin.join("initdb")).current_dir(directory.path());
        initdb.args(["--auth=trust", "--encoding=UTF8", "--no-sync", "--locale=C.UTF-8", "-D", &data]);
        let made = initdb.output()?;
        anyhow::ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let socket = format!("unix_socket_directories={}", directory.path().display());
        let postgres = bin.join("postgres").display().to_string();
        command.extend(
            [&postgres, "-D", &data, "-c", "listen_addresses=", "-c", &socket].map(ToOwned::to_owned),
        );
        let program = Program::start(directory.path(), "postgres", command)?;
        let mut postgres = Self { program, directory };
        postgres.answers().await?;
        Ok(postgres)
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres:///postgres?host={}&port=5432&user=postgres", self.directory.path().display())
    }

    pub(crate) async fn start_again(&mut self) -> anyhow::Result<()> {
        self.program.start_again()?;
        self.answers().await
    }

    /// Stops all processes of the server until they are resumed, like a host whose disk hangs.
    pub(crate) fn stall(&self, stalled: bool) -> anyhow::Result<()> {
        let signal = if stalled { Signal::STOP } else { Signal::CONT };
        let pid = std::fs::read_to_string(self.directory.path().join("data/postmaster.pid"))?;
        let pid = pid.lines().next().context("the id of the first process")?;
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        self.program.signal(signal)?;
        for child in children.split_whitespace() {
            let child = Pid::from_raw(child.parse()?).context("the id of a process")?;
            // It may have ended meanwhile.
            let _ = kill_process(child, signal);
        }
        Ok(())
    }

    async fn answers(&mut self) -> anyhow::Result<()> {
        eventually_true("Postgres answers", async || {
            self.program.require_life()?;
            Ok(Database::connect(self.url()).await.is_ok())
        })
        .await
        .with_context(|| self.program.output())
    }
}

/// Returns the program directory of the newest server, where Debian puts it.
fn newest() -> anyhow::Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let numbers = versions.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let newest = numbers.max().context("the tests need a Postgres: run them by tests/run")?;
    Ok(Path::new("/usr/lib/postgresql").join(newest.to_string()).join("bin"))
}
