//! Processes of build steps, as far as they are visible from here.
//!
//! BuildKit's steps are not containers, so the engine does not list them. The worker runs every step below a
//! control group of its own name, `<parent>/trailer-<worker>-<digest>/<trust domain>/buildkit/<step>`, which
//! is visible to everyone in `/proc/PID/cgroup`. The engine shares the result of a step among builds with the
//! same parent group only, so that those of two trust domains share none. Marking the steps themselves, for
//! example by their environment, would make equal steps of two builds differ to the engine, which then runs
//! them once but shows the output to one build only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ring::digest::{SHA256, digest};
use rustix::process::{Pid, Signal, kill_process};

use crate::trust_domain::TrustDomain;

/// The control group below which the steps of one worker on one engine run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepGroup {
    path: String,
    name: String,
}

/// The processes of steps on this host.
#[derive(Clone, Debug)]
pub(crate) struct StepProcesses {
    proc: PathBuf,
    group: StepGroup,
    /// Set once a process of a step was seen.
    seen: Arc<AtomicBool>,
}

/// The first process of a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StepProcess {
    /// Start time, in seconds since the host was booted.
    started: f64,
    /// Arguments, joined by spaces.
    command: String,
}

impl StepGroup {
    /// Maximum number of characters of a worker's name in the name of its group.
    const LONGEST_NAME: usize = 40;

    /// Returns the group of a worker on an engine, below `parent`.
    ///
    /// It is always the same for the same worker and engine, because it is part of the key of a step in the
    /// engine's cache.
    pub(crate) fn new(parent: &str, worker: &str, engine_id: &str) -> Self {
        let digest = digest(&SHA256, format!("{engine_id}\n{worker}").as_bytes());
        let digits = hex::encode(&digest.as_ref()[..8]);
        let safe = |character: char| if character.is_ascii_alphanumeric() { character } else { '_' };
        let worker: String = worker.chars().take(Self::LONGEST_NAME).map(safe).collect();
        let name = format!("trailer-{worker}-{digits}");
        Self { path: format!("{}/{name}", parent.trim_end_matches('/')), name }
    }

    /// Returns the path of the group of a trust domain, as it is given to the engine.
    pub(crate) fn path(&self, domain: &TrustDomain) -> String {
        format!("{}/{domain}", self.path)
    }

    /// Returns the step of a process by its control groups, the content of `/proc/PID/cgroup`.
    fn step<'a>(&self, groups: &'a str) -> Option<&'a str> {
        let below = |group: &'a str| {
            let (_, rest) = group.split_once(&self.name)?;
            let (domain, rest) = rest.strip_prefix('/')?.split_once('/')?;
            TrustDomain::parse(domain)?;
            rest.strip_prefix("buildkit/")?.split('/').next()
        };
        groups.lines().find_map(below)
    }
}

impl StepProcesses {
    /// Precision of the kernel's process ages.
    const SLACK: Duration = Duration::from_millis(50);
    /// Ticks per second in `/proc`: `USER_HZ`, which Linux fixes.
    const TICKS_A_SECOND: f64 = 100.0;
    /// Maximum number of ancestors of a step's process to look at.
    const LONGEST_DESCENT: usize = 1_000;

    /// Creates a view of the processes below a group.
    ///
    /// `seen` is set if a process was ever seen, and is updated.
    pub(crate) fn new(group: StepGroup, seen: Arc<AtomicBool>) -> Self {
        Self { proc: PathBuf::from("/proc"), group, seen }
    }

    /// Reports whether processes of steps are visible: one was seen, or the engine's own process is.
    pub(crate) fn can_be_seen(&self, engine: Option<i32>) -> bool {
        let is_engine = |pid: i32| {
            let name = fs::read_to_string(self.proc.join(pid.to_string()).join("comm"));
            name.is_ok_and(|name| name.trim_end() == "dockerd")
        };
        self.seen.load(Ordering::Relaxed) || engine.is_some_and(is_engine)
    }

    /// Returns the steps that have processes and started at most `age` ago, by their IDs.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` cannot be read.
    pub(crate) fn younger_than(&self, age: Duration) -> io::Result<BTreeMap<String, StepProcess>> {
        let uptime = first_number(&fs::read_to_string(self.proc.join("uptime"))?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/uptime has no number"))?;
        let oldest = uptime - (age + Self::SLACK).as_secs_f64();
        let mut steps: BTreeMap<String, StepProcess> = BTreeMap::new();
        for entry in fs::read_dir(&self.proc)? {
            let entry = entry?;
            let is_process =
                entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
            // A process that is gone belongs to no step.
            let Some((step, process)) = is_process.then(|| self.step_process(&entry.path())).flatten() else {
                continue;
            };
            let first = steps.entry(step).or_insert_with(|| process.clone());
            if process.started < first.started {
                *first = process;
            }
        }
        if !steps.is_empty() {
            self.seen.store(true, Ordering::Relaxed);
        }
        steps.retain(|_, first| first.started >= oldest);
        Ok(steps)
    }

    /// Kills all processes of steps that no engine runs any more; returns their number.
    ///
    /// Steps outlive an engine that is killed, and its successor does not know them.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` cannot be read or this user may not kill a process.
    pub(crate) fn kill_orphans(&self) -> io::Result<usize> {
        self.kill_where(|process| self.is_orphan(process))
    }

    /// Kills orphans until there are none left; a failure is only logged.
    pub(crate) async fn end_orphans(&self) {
        const LIMIT: Duration = Duration::from_secs(5);
        const POLL: Duration = Duration::from_millis(20);
        let ending = async {
            loop {
                let processes = self.clone();
                let killed = tokio::task::spawn_blocking(move || processes.kill_orphans());
                match killed.await.map_err(io::Error::other)?? {
                    0 => return Ok::<(), io::Error>(()),
                    count => {
                        tracing::warn!(count, "killed orphaned processes of an engine")
                    }
                }
                tokio::time::sleep(POLL).await;
            }
        };
        match tokio::time::timeout(LIMIT, ending).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot kill orphaned processes of an engine"),
            Err(_) => tracing::warn!("orphaned processes of an engine do not end"),
        }
    }

    /// Kills all processes of these steps; returns their number.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` cannot be read or this user may not kill a process.
    pub(crate) fn kill(&self, steps: &BTreeSet<String>) -> io::Result<usize> {
        self.kill_where(|process| self.step_process(process).is_some_and(|(step, _)| steps.contains(&step)))
    }

    /// Kills all processes of all steps; returns their number.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` cannot be read or this user may not kill a process.
    pub(crate) fn kill_all(&self) -> io::Result<usize> {
        self.kill_where(|process| self.step_process(process).is_some())
    }

    fn kill_where(&self, is_meant: impl Fn(&Path) -> bool) -> io::Result<usize> {
        let mut ended = 0;
        for entry in fs::read_dir(&self.proc)? {
            let process = entry?.path();
            let pid = process.file_name().and_then(|name| Pid::from_raw(name.to_str()?.parse().ok()?));
            let Some(pid) = pid.filter(|_| is_meant(&process)) else { continue };
            match kill_process(pid, Signal::KILL) {
                // `SRCH`: the process has just ended by itself.
                Ok(()) | Err(rustix::io::Errno::SRCH) => ended += 1,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(ended)
    }

    /// Reports whether a process belongs to a step and certainly has no engine above it.
    fn is_orphan(&self, process: &Path) -> bool {
        fs::read_to_string(process.join("cgroup")).is_ok_and(|groups| self.group.step(&groups).is_some())
            && self.has_engine_above(process) == Some(false)
    }

    /// Reports whether a process descends from a dockerd; `None` if a process between them has just ended.
    fn has_engine_above(&self, process: &Path) -> Option<bool> {
        let mut stat = fs::read_to_string(process.join("stat")).ok()?;
        for _ in 0..Self::LONGEST_DESCENT {
            let parent = parent(&stat)?;
            if parent <= 1 {
                return Some(false);
            }
            stat = fs::read_to_string(self.proc.join(parent.to_string()).join("stat")).ok()?;
            if stat.contains("(dockerd)") {
                return Some(true);
            }
        }
        None
    }

    /// Returns the process with the step that it belongs to, if it belongs to one.
    fn step_process(&self, process: &Path) -> Option<(String, StepProcess)> {
        let groups = fs::read_to_string(process.join("cgroup")).ok()?;
        let step = self.group.step(&groups)?.to_owned();
        let started = start_ticks(&fs::read_to_string(process.join("stat")).ok()?)? / Self::TICKS_A_SECOND;
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        Some((step, StepProcess { started, command }))
    }
}

impl StepProcess {
    /// Reports whether this may be the process of a step with this name, such as `[2/3] RUN make`.
    ///
    /// At least half of its words have to be in the name. The name shows expanded variables, and of a
    /// here-document only the first line.
    pub(crate) fn may_be_of(&self, step: &str) -> bool {
        let is_distinctive = |word: &&str| !word.contains('$') && *word != "-c" && !word.ends_with("sh");
        let words: Vec<&str> = self.command.split_whitespace().filter(is_distinctive).collect();
        let known = words.iter().filter(|word| step.contains(*word)).count();
        step.contains("<<") || known * 2 >= words.len()
    }
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Returns the parent of a process, or else the process that adopted it: the 4th field.
fn parent(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

/// Returns the start time of a process in ticks: the 22nd field, after a name that may hold anything.
fn start_ticks(stat: &str) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(pid: u32, name: &str, parent: u32, start_ticks: u32) -> String {
        format!("{pid} ({name}) S {parent} {} {start_ticks} 0\n", "0 ".repeat(17))
    }

    fn process(proc: &Path, pid: u32, cgroup: &str, start_ticks: u32) {
        let dir = proc.join(pid.to_string());
        let write = |name: &str, text: String| fs::write(dir.join(name), text).expect("a file");
        fs::create_dir(&dir).expect("a directory");
        write("cgroup", format!("8:pids:{cgroup}\n0::{cgroup}\n"));
        write("stat", stat(pid, "a ) b", 1, start_ticks));
        write("cmdline", format!("run\0{pid}\0"));
    }

    fn processes(proc: &Path, parent: &str) -> StepProcesses {
        let group = StepGroup::new(parent, "w/1", "engine");
        StepProcesses { proc: proc.to_owned(), group, seen: Arc::default() }
    }

    /// Path of the group, as the engine sets it and as another control group namespace shows it.
    const OURS: [&str; 2] = [
        "/trailer-w_1-ca13afeec4569bcc/00112233445566aa/buildkit/",
        "/../../pod/trailer-w_1-ca13afeec4569bcc/00112233445566bb/buildkit/",
    ];

    #[test]
    fn a_group_is_named_by_its_worker_and_engine() {
        let group = StepGroup::new("/builds.slice/", "w/1", "engine");
        let domain = TrustDomain::parse("00112233445566aa").expect("a domain");
        assert_eq!(group.path(&domain), "/builds.slice/trailer-w_1-ca13afeec4569bcc/00112233445566aa");
        assert_ne!(group.name, StepGroup::new("", "w/1", "another").name);
        assert_ne!(group.name, StepGroup::new("", "w:1", "engine").name);
    }

    #[test]
    fn the_steps_of_one_worker_are_found_by_age() {
        let proc = tempfile::tempdir().expect("a directory");
        let path = proc.path();
        fs::write(path.join("uptime"), "100.00 50.00\n").expect("a file");
        fs::create_dir(path.join("sys")).expect("a directory");
        let [ours, of_namespace] = OURS;
        process(path, 1, "/init.scope", 0);
        let processes = processes(path, "");
        let found = |seconds| {
            let found = processes.younger_than(Duration::from_secs(seconds)).expect("readable");
            found.into_values().map(|step| step.command.trim().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found(1_000), [""; 0]);
        assert!(!processes.can_be_seen(None) && !processes.can_be_seen(Some(1)));
        process(path, 10, &format!("{of_namespace}old"), 1_000);
        process(path, 11, &format!("{ours}old"), 9_900);
        process(path, 13, &format!("{ours}new"), 9_900);
        process(path, 12, &format!("{ours}new"), 9_500);
        process(path, 14, "/trailer-w_2-0123456789abcdef/buildkit/foreign", 9_900);
        process(path, 15, "/system.slice/system.slice:docker:x", 9_900);
        assert_eq!(found(3), [""; 0]);
        assert_eq!(found(10), ["run 12"]);
        assert_eq!(found(1_000), ["run 12", "run 10"]);
        assert!(processes.can_be_seen(None));
    }

    #[test]
    fn a_visible_engine_makes_its_steps_visible() {
        let proc = tempfile::tempdir().expect("a directory");
        for (pid, name) in [("7", "dockerd\n"), ("8", "systemd\n")] {
            fs::create_dir(proc.path().join(pid)).expect("a directory");
            fs::write(proc.path().join(pid).join("comm"), name).expect("a file");
        }
        let processes = processes(proc.path(), "");
        assert_eq!([7, 8, 9].map(|pid| processes.can_be_seen(Some(pid))), [true, false, false]);
    }

    #[test]
    fn a_step_without_an_engine_above_it_is_an_orphan() {
        let proc = tempfile::tempdir().expect("a directory");
        let path = proc.path();
        let [ours, _] = OURS;
        let add = |pid: u32, name: &str, parent: u32, cgroup: &str| {
            process(path, pid, cgroup, 0);
            fs::write(path.join(pid.to_string()).join("stat"), stat(pid, name, parent, 0)).expect("a file");
        };
        let (running, left) = (format!("{ours}running"), format!("{ours}left"));
        add(10, "dockerd", 1, "/system.slice");
        add(11, "runc", 10, "/system.slice");
        add(12, "sh", 11, &running);
        add(13, "sleep", 12, &running);
        add(20, "sh", 1, &left);
        add(21, "sleep", 20, &left);
        add(22, "sleep", 1, "/trailer-w_1-0123456789abcdef/buildkit/left");
        add(23, "sleep", 1, "/docker/buildkit/left");
        add(24, "sleep", 99, &left);
        let processes = processes(path, "");
        let is_orphan = |pid: &u32| processes.is_orphan(&path.join(pid.to_string()));
        let orphans: Vec<u32> = [10, 11, 12, 13, 20, 21, 22, 23, 24].into_iter().filter(is_orphan).collect();
        assert_eq!(orphans, [20, 21]);
    }

    #[test]
    fn a_process_is_recognized_by_its_words() {
        let process = |command: &str| StepProcess { started: 0.0, command: command.to_owned() };
        for (command, step) in [
            ("/bin/sh -c make all && sleep 300", "[2/3] RUN make all && sleep 300"),
            ("sleep 300", "[2/3] RUN sleep 300"),
            ("/bin/sh -c echo $A $B", "[2/3] RUN echo one two"),
            ("/greeter prepare", "[2/2] RUN [\"/greeter\", \"prepare\"]"),
            ("/bin/sh -c set -e\nmake", "[2/2] RUN <<EOF (set -e...)"),
            ("", "[2/2] RUN true"),
        ] {
            assert!(process(command).may_be_of(step), "{command}: {step}");
        }
        let foreign = process("/bin/sh -c echo begun; /bin/busybox sleep 3; echo done");
        assert!(!foreign.may_be_of("[2/2] RUN /bin/busybox sleep 300"));
    }
}
