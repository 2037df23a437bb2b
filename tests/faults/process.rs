//! A program run as a child process, which the test kills, stops and restarts.

use std::{
    env, fmt, fs,
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};

use crate::eventually::eventually_true;

/// A program that ends with the test, however the test ends.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    command: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Program {
    /// Starts `command` and appends its output to the file `NAME.log` in `directory`.
    ///
    /// Must be called on the test's own thread, not in a task: the kernel kills the program with the thread
    /// that started it, so that a killed test leaves nothing behind.
    pub(crate) fn start(
        directory: &Path,
        name: &str,
        command: impl IntoIterator<Item = impl fmt::Display>,
    ) -> anyhow::Result<Self> {
        let mut program = Self {
            name: name.to_owned(),
            command: command.into_iter().map(|part| part.to_string()).collect(),
            log: directory.join(format!("{name}.log")),
            child: None,
        };
        program.start_again()?;
        Ok(program)
    }

    /// Starts the program again with the same command. It must not be running.
    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.child.is_none(), "{} is running", self.name);
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let (program, arguments) = self.command.split_first().context("a command")?;
        let child = Command::new(program)
            .args(arguments)
            .env("RUST_LOG", "info,build_worker=debug")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {program}: the tests need root, run them by tests/run"))?;
        self.child = Some(child);
        Ok(())
    }

    /// Kills the program with SIGKILL and waits until it is gone.
    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().with_context(|| format!("{} is not running", self.name))?;
        child.kill()?;
        let ended = child.wait()?;
        anyhow::ensure!(
            ended.code().is_none(),
            "{} had ended by itself: {ended}\n{}",
            self.name,
            self.output()
        );
        Ok(())
    }

    /// Sends a signal that ends the program and waits until it has exited.
    pub(crate) async fn end(&mut self, signal: Signal) -> anyhow::Result<()> {
        self.signal(signal)?;
        let mut child = self.child.take().context("it is running")?;
        eventually_true(&format!("{} ends", self.name), async || Ok(child.try_wait()?.is_some())).await
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let child = self.child.as_ref().with_context(|| format!("{} is not running", self.name))?;
        Ok(kill_process(Pid::from_child(child), signal)?)
    }

    /// Returns the peak memory, in bytes.
    pub(crate) fn peak_memory(&self) -> anyhow::Result<u64> {
        self.memory("VmHWM:")
    }

    /// Returns a memory figure by its name in `/proc/PID/status`, in bytes.
    pub(crate) fn memory(&self, name: &str) -> anyhow::Result<u64> {
        let child = self.child.as_ref().with_context(|| format!("{} is not running", self.name))?;
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let amount = status.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
        let kibibytes: u64 = amount.trim().trim_end_matches(" kB").parse()?;
        Ok(kibibytes * 1024)
    }

    /// Fails if the program has exited by itself.
    pub(crate) fn require_life(&mut self) -> anyhow::Result<()> {
        let child = self.child.as_mut().with_context(|| format!("{} is not running", self.name))?;
        if let Some(ended) = child.try_wait()? {
            anyhow::bail!("{} has ended by itself: {ended}\n{}", self.name, self.output());
        }
        Ok(())
    }

    /// Returns the last lines of the program's output.
    pub(crate) fn output(&self) -> String {
        const LINES: usize = 40;
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let from = log.lines().count().saturating_sub(LINES);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of what {} has printed:\n{}", self.name, self.output());
        }
        if let Some(mut child) = self.child.take() {
            // The program may have exited by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns the start of a command that ends with the thread that runs it.
pub(crate) fn bound_to_test() -> [String; 3] {
    ["setpriv", "--pdeathsig", "KILL"].map(ToOwned::to_owned)
}

/// Returns the path of a program of this workspace, beside the test's own executable.
///
/// Under cargo the programs are built first, because cargo does not build those of other packages for a test.
pub(crate) fn program(name: &str) -> anyhow::Result<String> {
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    let test = env::current_exe()?;
    let directory = test.parent().and_then(Path::parent).context("a test lies in target/<profile>/deps")?;
    let built = BUILT.get_or_init(|| {
        // The variable says that the programs are up to date; otherwise cargo would build some of them again.
        let Some(cargo) = env::var_os("CARGO").filter(|_| env::var_os("TRAILER_TEST_BUILT").is_none()) else {
            return Ok(());
        };
        let mut command = Command::new(cargo);
        command.args(["build", "--workspace", "--bins", "--locked", "--quiet"]);
        command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        if directory.ends_with("release") {
            command.arg("--release");
        }
        let built = command.status();
        let is_built = built.as_ref().is_ok_and(std::process::ExitStatus::success);
        if is_built { Ok(()) } else { Err(format!("cannot build the programs: {built:?}")) }
    });
    built.clone().map_err(anyhow::Error::msg)?;
    let path = directory.join(name);
    let is_there = path.try_exists()?;
    anyhow::ensure!(is_there, "{} is missing: cargo build --workspace --bins", path.display());
    path.into_os_string().into_string().map_err(|_| io::Error::other("a path in UTF-8").into())
}
