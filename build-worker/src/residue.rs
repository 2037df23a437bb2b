//! What runs on this host of an engine's builds.
//!
//! BuildKit's steps are no Docker containers, so no list of the engine shows them. Each runs in a control group named
//! `…/buildkit/<id>`, on a root file system in the engine's directory: by these its processes are found. Marking the steps
//! themselves, by their environment say, would make equal steps of two builds differ for the engine, which then runs them
//! once but shows the output to one build only.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// Looks at the processes of this host.
#[derive(Clone, Debug)]
pub(crate) struct StepProcesses {
    proc: PathBuf,
    /// Where the engine keeps its file systems: tells its processes from those of another engine.
    engine_root: String,
}

/// The first process of a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StepProcess {
    /// In seconds since the host was booted.
    started: f64,
    /// Its arguments, joined by spaces.
    command: String,
}

impl StepProcesses {
    /// How coarse the kernel counts the ages of processes.
    const SLACK: Duration = Duration::from_millis(50);
    /// `USER_HZ`, which Linux fixes for what it shows in /proc.
    const TICKS_A_SECOND: f64 = 100.0;
    /// How many processes may be between a step's and the first of the host.
    const LONGEST_DESCENT: usize = 1_000;

    pub(crate) fn of(engine_root: String) -> Self {
        Self { proc: PathBuf::from("/proc"), engine_root }
    }

    /// The steps of this engine, by their ids, that have processes and were begun no longer than `age` ago.
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
        steps.retain(|_, first| first.started >= oldest);
        Ok(steps)
    }

    /// Kills every process of the steps that no engine runs any more: they outlive one that is killed, and its successor does
    /// not know them. Answers how many there were.
    pub(crate) fn kill_orphans(&self) -> io::Result<usize> {
        let mut ended = 0;
        for entry in fs::read_dir(&self.proc)? {
            let process = entry?.path();
            if !self.is_orphan(&process) {
                continue;
            }
            let pid = process.file_name().and_then(|name| Pid::from_raw(name.to_str()?.parse().ok()?));
            if let Some(pid) = pid {
                match kill_process(pid, Signal::KILL) {
                    // It has just ended by itself.
                    Ok(()) | Err(rustix::io::Errno::SRCH) => ended += 1,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(ended)
    }

    /// Whether a process certainly belongs to a step of this engine, and has no engine above it.
    fn is_orphan(&self, process: &Path) -> bool {
        let contains = |file: &str, part: &str| {
            fs::read_to_string(process.join(file)).is_ok_and(|text| text.contains(part))
        };
        !self.engine_root.is_empty()
            && contains("cgroup", "/buildkit/")
            && contains("mountinfo", &format!("{}/", self.engine_root))
            && self.has_engine_above(process) == Some(false)
    }

    /// Whether a process descends from a dockerd; `None` when one between them has just ended.
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

    /// The step that a process belongs to, if it belongs to one of this engine.
    fn step_process(&self, process: &Path) -> Option<(String, StepProcess)> {
        let groups = fs::read_to_string(process.join("cgroup")).ok()?;
        let (_, step) = groups.lines().find_map(|group| group.split_once("/buildkit/"))?;
        let started = start_ticks(&fs::read_to_string(process.join("stat")).ok()?)? / Self::TICKS_A_SECOND;
        // Who may not look into the process cannot tell the engines apart: then it counts.
        let is_of_engine = fs::read_to_string(process.join("mountinfo"))
            .map_or(true, |mounts| mounts.is_empty() || mounts.contains(&self.engine_root));
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        is_of_engine
            .then(|| (step.split('/').next().unwrap_or(step).to_owned(), StepProcess { started, command }))
    }
}

impl StepProcess {
    /// Whether this may be the process of a step of that name, such as `[2/3] RUN make`: when at least half of its words
    /// are in the name. The name shows variables expanded, and of a here-document the first line only.
    pub(crate) fn may_be_of(&self, step: &str) -> bool {
        let is_telling = |word: &&str| !word.contains('$') && *word != "-c" && !word.ends_with("sh");
        let words: Vec<&str> = self.command.split_whitespace().filter(is_telling).collect();
        let known = words.iter().filter(|word| step.contains(*word)).count();
        step.contains("<<") || known * 2 >= words.len()
    }
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// The process that has started one, or else adopted it: the 4th field.
fn parent(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

/// When a process was started: the 22nd field, after a name that may hold anything.
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

    fn process(proc: &Path, pid: u32, cgroup: &str, start_ticks: u32, mounts: &str) {
        let dir = proc.join(pid.to_string());
        let write = |name: &str, text: String| fs::write(dir.join(name), text).expect("a file");
        fs::create_dir(&dir).expect("a directory");
        write("cgroup", format!("8:pids:{cgroup}\n0::{cgroup}\n"));
        write("stat", stat(pid, "a ) b", 1, start_ticks));
        write("mountinfo", format!("75 50 0:39 / / rw - overlay overlay rw,{mounts}\n"));
        write("cmdline", format!("run\0{pid}\0"));
    }

    #[test]
    fn the_steps_of_one_engine_are_found_by_age() {
        let proc = tempfile::tempdir().expect("a directory");
        let path = proc.path();
        fs::write(path.join("uptime"), "100.00 50.00\n").expect("a file");
        fs::create_dir(path.join("sys")).expect("a directory");
        let ours = "upperdir=/var/lib/docker/overlay2/x/diff";
        process(path, 1, "/init.scope", 0, ours);
        process(path, 10, "/docker/buildkit/old", 1_000, ours);
        process(path, 11, "/docker/buildkit/old", 9_900, ours);
        process(path, 13, "/docker/buildkit/new", 9_900, ours);
        process(path, 12, "/docker/buildkit/new", 9_500, ours);
        process(path, 14, "/docker/buildkit/foreign", 9_900, "upperdir=/elsewhere/overlay2/x/diff");
        let processes = StepProcesses { proc: path.to_owned(), engine_root: "/var/lib/docker".to_owned() };
        let found = |seconds| {
            let found = processes.younger_than(Duration::from_secs(seconds)).expect("readable");
            found.into_values().map(|step| step.command.trim().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found(3), [""; 0]);
        assert_eq!(found(10), ["run 12"]);
        assert_eq!(found(1_000), ["run 12", "run 10"]);
    }

    #[test]
    fn a_step_without_an_engine_above_it_is_an_orphan() {
        let proc = tempfile::tempdir().expect("a directory");
        let path = proc.path();
        let ours = "upperdir=/var/lib/docker/overlay2/x/diff";
        let add = |pid: u32, name: &str, parent: u32, cgroup: &str, mounts: &str| {
            process(path, pid, cgroup, 0, mounts);
            fs::write(path.join(pid.to_string()).join("stat"), stat(pid, name, parent, 0)).expect("a file");
        };
        add(10, "dockerd", 1, "/system.slice", "");
        add(11, "runc", 10, "/system.slice", "");
        add(12, "sh", 11, "/docker/buildkit/running", ours);
        add(13, "sleep", 12, "/docker/buildkit/running", ours);
        add(20, "sh", 1, "/docker/buildkit/left", ours);
        add(21, "sleep", 20, "/docker/buildkit/left", ours);
        add(22, "sleep", 1, "/docker/buildkit/left", "upperdir=/var/lib/docker2/overlay2/x/diff");
        add(23, "sleep", 1, "/docker/another", ours);
        add(24, "sleep", 99, "/docker/buildkit/left", ours);
        let orphans = |root: &str| -> Vec<u32> {
            let processes = StepProcesses { proc: path.to_owned(), engine_root: root.to_owned() };
            let is_orphan = |pid: &u32| processes.is_orphan(&path.join(pid.to_string()));
            [10, 11, 12, 13, 20, 21, 22, 23, 24].into_iter().filter(is_orphan).collect()
        };
        assert_eq!(orphans("/var/lib/docker"), [20, 21]);
        assert_eq!(orphans(""), [0; 0], "of an engine whose directory is not known none is certain");
    }

    #[test]
    fn a_process_is_told_by_its_words() {
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
