//! A service that does not listen for a while: builds go on into the worker's spool while it has room.

use std::{
    fs::{DirEntry, OpenOptions},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use proto::images::BuildState;
use tempfile::TempDir;

use crate::{
    answers::{assert_gapless, lines},
    client::{Client, image},
    eventually::eventually_true,
    fake_engine::{Ended, FakeEngine, Gate, Script},
    proxy::Proxy,
    stack::{LIMIT, Service, Worker},
};

/// Length of a printed line, in bytes.
const LINE: usize = 8 * 1024;

/// Flags of a lease so long that a busy machine does not take the build away from its worker.
const LONG_LEASE: [&str; 4] = ["--stop-after", "100s", "--lease", "120s"];

fn line(number: usize) -> String {
    format!("{number:0>LINE$}")
}

/// Returns a script that prints `lines` lines between two gates.
fn talk(begin: &Gate, lines: usize, end: &Gate) -> Script {
    let step = Script::new().step("[1/1] RUN talk").pause(begin);
    step.logs(lines, |i| line(i) + "\n").pause(end).succeed()
}

/// Returns the open spool files of the worker, which runs in this process.
///
/// The files have been unlinked and have no other name.
fn spool_files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let open: Vec<_> = std::fs::read_dir("/proc/self/fd")?.collect::<Result<_, _>>()?;
    // A file that was closed meanwhile does not count.
    let is_spool = |path: &PathBuf| std::fs::read_link(path).is_ok_and(|file| file.starts_with(directory));
    Ok(open.iter().map(DirEntry::path).filter(is_spool).collect())
}

fn spooled(directory: &Path) -> anyhow::Result<u64> {
    let files = spool_files(directory)?;
    Ok(files.iter().map(|file| std::fs::metadata(file).map_or(0, |file| file.len())).sum())
}

async fn wait_for_spooled(directory: &Path, condition: impl Fn(u64) -> bool) -> anyhow::Result<()> {
    eventually_true("the spool meets the condition", async || Ok(condition(spooled(directory)?)))
        .await
        .with_context(|| format!("{:?}", spooled(directory)))
}

/// Checks that the build succeeded at the first attempt, with every line exactly once.
async fn assert_complete(alice: &Client, build: &str, count: usize) -> anyhow::Result<()> {
    let finished = alice.finished(build).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    let events = alice.history(build, 0).await?;
    assert_gapless(&events, 1);
    let received = lines(&events);
    assert_eq!(received.len(), count);
    let differs = (0..count).find(|&i| received[i] != line(i));
    assert_eq!(differs, None, "the number of a line that is not what was printed");
    Ok(())
}

/// A build at its gate, whose worker reaches the service through a proxy.
struct Talk {
    engine: FakeEngine,
    begin: Gate,
    end: Gate,
    proxy: Proxy,
    alice: Client,
    worker: Worker,
    build: String,
    _service: Service,
}

impl Talk {
    /// Starts a build and waits for the gate before its lines.
    async fn start(lines: usize, spool: &Path, flags: &[&str]) -> anyhow::Result<Self> {
        let engine = FakeEngine::start().await?;
        let [begin, end] = [Gate::new(), Gate::new()];
        engine.script(talk(&begin, lines, &end));
        let service = Service::start_with(&LONG_LEASE).await?;
        let proxy = Proxy::start(service.addr).await?;
        let alice = service.builder("alice");
        let mut all =
            vec!["--log-limit", "100000000", "--spool-dir", spool.to_str().context("a path in UTF-8")?];
        all.extend(flags);
        let worker = Worker::start_at(&service, proxy.addr(), "w1", &engine.docker_host(), &all)?;
        let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
        begin.reached().await;
        Ok(Self { engine, begin, end, proxy, alice, worker, build: build.id, _service: service })
    }

    /// Lets the build print while the service does not listen.
    fn go_on_unheard(&self) {
        self.proxy.stall(true);
        self.begin.open();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_goes_on_while_the_service_does_not_listen() -> anyhow::Result<()> {
    const LINES: usize = 8 * 1024;
    let spool = tempfile::tempdir()?;
    let talk = Talk::start(LINES, spool.path(), &[]).await?;
    talk.go_on_unheard();
    // 64 MiB, of which memory holds five and the path from the engine about fourteen.
    talk.end.reached().await;
    talk.end.open();
    talk.engine.wait_for(|state| state.builds[0].ended == Ended::Succeeded, LIMIT).await?;
    wait_for_spooled(spool.path(), |bytes| bytes > 50 * 1024 * 1024).await?;
    talk.proxy.stall(false);
    assert_complete(&talk.alice, &talk.build, LINES).await?;
    wait_for_spooled(spool.path(), |bytes| bytes == 0).await?;
    talk.worker.stop().await?;
    assert_eq!(std::fs::read_dir(spool.path())?.count(), 0, "nothing is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_that_gives_back_something_else_costs_one_failure() -> anyhow::Result<()> {
    const LINES: usize = 2 * 1024;
    let spool = tempfile::tempdir()?;
    let talk = Talk::start(LINES, spool.path(), &[]).await?;
    talk.go_on_unheard();
    wait_for_spooled(spool.path(), |bytes| bytes > 1024 * 1024).await?;
    for file in spool_files(spool.path())? {
        OpenOptions::new().write(true).open(file)?.write_all_at(b"?", 100_000)?;
    }
    talk.engine.script(Script::new().step("[1/1] RUN talk").log("once more\n").succeed());
    talk.proxy.stall(false);
    let finished = talk.alice.finished(&talk.build).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 2, 1));
    assert_eq!(talk.engine.builds()[0].ended, Ended::Cancelled, "what is given up has stopped");
    let events = talk.alice.history(&talk.build, 0).await?;
    assert_gapless(&events, 1);
    let received = lines(&events);
    let (last, before) = received.split_last().context("some lines")?;
    assert_eq!(*last, "once more");
    assert!(before.len() < LINES && (0..).zip(before).all(|(i, text)| *text == line(i)), "up to the place");
    Ok(())
}

/// A disk of limited size on a directory, unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    const BYTES: u64 = 3 * 1024 * 1024;

    /// Mounts a disk; returns `None` without permission to mount.
    fn mount() -> anyhow::Result<Option<Self>> {
        let directory = tempfile::tempdir()?;
        let size = format!("size={}", Self::BYTES);
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(directory.path()).output();
        Ok(mounted.is_ok_and(|mounted| mounted.status.success()).then_some(Self(directory)))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.0.path()).output();
        if !unmounted.is_ok_and(|unmounted| unmounted.status.success()) {
            eprintln!("{} stays mounted", self.0.path().display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_disk_loses_nothing() -> anyhow::Result<()> {
    const LINES: usize = 4 * 1024;
    let disk = SmallDisk::mount()?;
    let instead = tempfile::tempdir()?;
    let spool: &Path = disk.as_ref().map_or_else(|| instead.path(), |disk| disk.0.path());
    // Without permission to mount a disk, there is only the limit.
    let limit = if disk.is_some() { 100 * SmallDisk::BYTES } else { SmallDisk::BYTES }.to_string();
    let talk = Talk::start(LINES, spool, &["--spool-limit", &limit, "--min-free-disk", "0"]).await?;
    talk.end.open();
    talk.go_on_unheard();
    // A disk is used up completely; under a limit, room for a batch may be left.
    let is_full = if disk.is_some() { SmallDisk::BYTES } else { SmallDisk::BYTES - 300 * 1024 };
    wait_for_spooled(spool, |bytes| bytes >= is_full).await?;
    talk.proxy.stall(false);
    assert_complete(&talk.alice, &talk.build, LINES).await?;
    talk.worker.stop().await
}
