//! Docker Engines of the tests, and the processes that their builds leave on the host.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bollard::{API_DEFAULT_VERSION, Docker, query_parameters::ListImagesOptionsBuilder};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    base_image, dockerd,
    eventually::eventually_true,
    process::{Program, bound_to_test},
};

/// Name of the base image, which contains a shell and which every engine has.
pub(crate) const BASE: &str = "trailer-test/base:latest";

/// A dockerd that shares no directory, network or mount with any other.
#[derive(Debug)]
pub(crate) struct Engine {
    dockerd: Program,
    directory: PathBuf,
    docker: Docker,
}

/// A process of a build step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepProcess {
    pub(crate) pid: i32,
    pub(crate) command: String,
}

impl Engine {
    /// Starts an engine with the base image, in a directory of its own below `directory`.
    pub(crate) async fn start(directory: &Path, name: &str) -> anyhow::Result<Self> {
        Self::start_with(directory, name, &[]).await
    }

    /// Starts an engine with additional flags of dockerd.
    pub(crate) async fn start_with(directory: &Path, name: &str, flags: &[&str]) -> anyhow::Result<Self> {
        let own = directory.join(name);
        fs::create_dir(&own)?;
        let path = |part: &str| own.join(part).display().to_string();
        // In namespaces of its own, its bridge and its mounts disappear with it, even when it is killed.
        let mut command = ["unshare", "--net", "--mount"].map(ToOwned::to_owned).to_vec();
        command.extend(bound_to_test());
        command.extend(dockerd::command());
        command.extend(
            ["--log-level=warn", "--iptables=false", "--ip6tables=false", "--ip-masq=false"]
                .map(ToOwned::to_owned),
        );
        for (flag, part) in [("data-root", "data"), ("exec-root", "exec"), ("pidfile", "pid")] {
            command.push(format!("--{flag}={}", path(part)));
        }
        command.extend(flags.iter().map(|&flag| flag.to_owned()));
        let socket = path("docker.sock");
        command.push(format!("--host=unix://{socket}"));
        let mut dockerd = Program::start(directory, name, command)?;
        eventually_true("dockerd listens", async || {
            dockerd.require_life().context("the tests need root and a dockerd: run them by tests/run")?;
            Ok(Path::new(&socket).exists())
        })
        .await
        .with_context(|| dockerd.output())?;
        let docker = Docker::connect_with_unix(&socket, 60, API_DEFAULT_VERSION)?;
        let mut engine = Self { dockerd, directory: own, docker };
        engine.answers().await?;
        base_image::import(&engine.docker, BASE).await?;
        Ok(engine)
    }

    /// Returns a client of the engine.
    pub(crate) fn docker(&self) -> &Docker {
        &self.docker
    }

    pub(crate) fn host(&self) -> String {
        format!("unix://{}", self.directory.join("docker.sock").display())
    }

    pub(crate) fn kill(&mut self) -> anyhow::Result<()> {
        self.dockerd.kill()
    }

    /// Kills the engine's containerd, which dockerd replaces after a while.
    pub(crate) fn kill_containerd(&self) -> anyhow::Result<()> {
        let pid = fs::read_to_string(self.directory.join("exec/containerd/containerd.pid"))?;
        let pid = Pid::from_raw(pid.trim().parse()?).context("a process")?;
        Ok(kill_process(pid, Signal::KILL)?)
    }

    /// Starts the engine after a kill, without waiting until it answers.
    pub(crate) async fn start_again(&mut self) -> anyhow::Result<()> {
        // The pid in the file may belong to another process by now.
        fs::remove_file(self.directory.join("pid")).context("the file of an engine that was killed")?;
        // Its containerd ends with it, but a dockerd that starts too early takes it for one that keeps
        // running.
        if let Ok(pid) = fs::read_to_string(self.directory.join("exec/containerd/containerd.pid")) {
            let process = Path::new("/proc").join(pid.trim());
            eventually_true("containerd ends", async || Ok(!process.exists())).await?;
        }
        self.dockerd.start_again()
    }

    /// Waits until the engine answers.
    pub(crate) async fn answers(&mut self) -> anyhow::Result<()> {
        eventually_true("dockerd answers", async || {
            self.dockerd.require_life()?;
            Ok(self.docker.ping().await.is_ok())
        })
        .await
        .with_context(|| self.dockerd.output())
    }

    /// Returns the id of the image with this name, if there is one.
    pub(crate) async fn image_id(&self, reference: &str) -> Option<String> {
        self.docker.inspect_image(reference).await.ok()?.id
    }

    /// Returns the tags of its images that contain `text`.
    pub(crate) async fn tags_with(&self, text: &str) -> anyhow::Result<Vec<String>> {
        let images = self.docker.list_images(Some(ListImagesOptionsBuilder::new().build())).await?;
        Ok(images.into_iter().flat_map(|image| image.repo_tags).filter(|tag| tag.contains(text)).collect())
    }

    /// Returns the processes of its build steps on this host.
    pub(crate) fn step_processes(&self) -> Vec<StepProcess> {
        step_processes(&self.directory)
    }

    /// Waits until a step whose command contains `text` has a process.
    pub(crate) async fn runs(&self, text: &str) -> anyhow::Result<()> {
        let is_ours = |process: &StepProcess| process.command.contains(text);
        eventually_true("the step runs", async || Ok(self.step_processes().iter().any(is_ours))).await
    }

    /// Waits until no step has a process and returns the time that it took.
    pub(crate) async fn runs_nothing(&self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        eventually_true("no process of a step is left", async || Ok(self.step_processes().is_empty()))
            .await?;
        Ok(begun.elapsed())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Steps and the shims of containers outlive a killed engine.
        let _ = self.dockerd.kill();
        let steps = step_processes(&self.directory).into_iter().map(|process| process.pid);
        for pid in steps.chain(shims(&self.directory)).filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Returns the container shims of an engine, which are started with its containerd's address.
fn shims(directory: &Path) -> Vec<i32> {
    let address = format!("{}/exec/containerd/", directory.display());
    let is_of_engine =
        |of_process: &Path| text(of_process, "cmdline").is_some_and(|it| it.contains(&address));
    processes().filter(|(_, of_process)| is_of_engine(of_process)).map(|(pid, _)| pid).collect()
}

fn step_processes(directory: &Path) -> Vec<StepProcess> {
    let directory = directory.display().to_string();
    let of_step = |(pid, of_process): (i32, PathBuf)| {
        let text = |file| text(&of_process, file);
        let is_step = text("cgroup")?.contains("/buildkit/") && text("mountinfo")?.contains(&directory);
        // A zombie has no arguments.
        let command = text("cmdline").filter(|command| !command.is_empty())?;
        is_step.then_some(StepProcess { pid, command })
    };
    processes().filter_map(of_step).collect()
}

/// Returns the processes of this host, each with its directory in `/proc`.
fn processes() -> impl Iterator<Item = (i32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// Reads a file of a process, or returns `None` if the process has ended.
fn text(of_process: &Path, file: &str) -> Option<String> {
    let read = fs::read(of_process.join(file)).ok()?;
    Some(String::from_utf8_lossy(&read).replace('\0', " "))
}
