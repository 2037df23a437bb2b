//! Stopping of a build: the engine has ended it, and no process of it is left on the host.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use tokio::time::{Instant, interval, interval_at};

use super::{
    Job,
    outcome::{Ended, Leftover, Stop},
};
use crate::{
    engine::{EngineEvent, RunningWork},
    output::{Output, Timed},
    readiness::UnconfirmedStop,
    step_processes::{StepProcess, StepProcesses},
};

/// The processes that remain of a stopped build.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Remains {
    /// No processes.
    Nothing,
    /// An unknown number of processes, because they are not visible from here.
    Unseen,
    Processes,
}

impl Job {
    /// Grace period of a step that other builds need, in case it ends after all.
    const SHARED: Duration = Duration::from_millis(500);
    /// Time before the engine's connections close, as a multiple of the stop limit.
    const LAST_WAIT: u32 = 3;
    /// Time after which a cancel counts as lost.
    ///
    /// BuildKit 0.13, of Docker 26.1, never kills a step that it was just starting.
    const CANCEL_LOST: Duration = Duration::from_millis(500);
    const KILL_AGAIN: Duration = Duration::from_millis(200);
    const REAP_POLL: Duration = Duration::from_secs(1);
    const PROCESS_POLL: Duration = Duration::from_millis(20);

    /// Stops the work: cancels it, reads its progress to the end, and waits for its processes to end.
    pub(super) async fn stop(
        &self,
        mut work: Box<dyn RunningWork>,
        output: &mut Output,
        mut events: Vec<Timed>,
        begun: Instant,
    ) -> Ended {
        let deadline = Instant::now() + self.stop_timeout;
        output.interrupt();
        self.steps.stop(&self.name());
        // Processes that were seen while they ran can later be reported as gone.
        if let Err(error) = self.step_processes(begun).await {
            tracing::warn!(%error, "cannot look for the processes of a build");
        }
        work.cancel();
        let mut kill = interval_at(Instant::now() + Self::CANCEL_LOST, Self::KILL_AGAIN);
        let has_ended = loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(deadline) => break false,
                event = work.next() => match event {
                    Some(Ok(EngineEvent::Progress(progress))) => {
                        let now = Instant::now().into_std();
                        progress.into_iter().for_each(|progress| output.take(progress, now, &mut events));
                        self.steps.set(&self.name(), output.steps_under_way());
                    }
                    Some(Ok(EngineEvent::Built(_) | EngineEvent::Gap(_)) | Err(_)) => {}
                    None => break true,
                },
                _ = kill.tick(), if work.runs_processes() => self.kill_steps(begun).await,
            }
        };
        output.finish(&mut events);
        if !self.control.is_fenced() {
            for (at, event) in events {
                // An unavailable service must not keep the work from stopping.
                if tokio::time::timeout_at(deadline, self.outbox.push(at, event)).await.is_err() {
                    break;
                }
            }
        }
        let remains = self.remains(begun, deadline).await;
        match remains {
            Remains::Nothing if has_ended => return Ended::Stopped(Stop::Confirmed),
            Remains::Unseen if has_ended => {
                tracing::warn!(
                    build = self.name(),
                    "the engine reports the end of a build, whose processes are not visible to this worker"
                );
                return Ended::Stopped(Stop::Unseen);
            }
            Remains::Nothing | Remains::Unseen | Remains::Processes => {}
        }
        let _unconfirmed = UnconfirmedStop::new(&self.readiness);
        tracing::error!(build = self.name(), has_ended, ?remains, "a build did not stop in time");
        Ended::Stopped(Stop::Failed(Leftover { work: (!has_ended).then_some(work), begun, _unconfirmed }))
    }

    /// Waits until the remaining work has stopped after all; closes its connections if it does not.
    pub(crate) async fn reap(&self, left: Leftover) {
        if let Some(mut work) = left.work {
            let end = Instant::now() + self.stop_timeout * Self::LAST_WAIT;
            let mut kill = interval(Self::REAP_POLL);
            loop {
                tokio::select! {
                    event = work.next() => if event.is_none() {
                        break;
                    },
                    () = tokio::time::sleep_until(end) => {
                        tracing::warn!(build = self.name(), "the engine does not end a build: closing its connections");
                        break;
                    }
                    // Other builds may no longer need the steps that they needed before.
                    _ = kill.tick(), if work.runs_processes() => self.kill_steps(left.begun).await,
                }
            }
        }
        while self.remains(left.begun, Instant::now() + Self::SHARED).await == Remains::Processes {
            self.kill_steps(left.begun).await;
            tokio::time::sleep(Self::REAP_POLL).await;
        }
        self.steps.remove(&self.name());
        tracing::info!(build = self.name(), "a build has stopped late");
    }

    /// Waits until the build has no processes left, except in steps that other builds of this worker need.
    async fn remains(&self, begun: Instant, deadline: Instant) -> Remains {
        if self.steps.running(&self.name()).is_empty() {
            return Remains::Nothing;
        }
        let stopped = Instant::now();
        let mut ours: Option<BTreeSet<String>> = None;
        loop {
            let found = match self.step_processes(begun).await {
                Ok(Some(found)) => found,
                Ok(None) => return Remains::Unseen,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for remaining processes of a build");
                    return Remains::Unseen;
                }
            };
            // A step that starts from now on is not of this build.
            let ours = ours.get_or_insert_with(|| found.keys().cloned().collect());
            let left: Vec<&StepProcess> =
                found.iter().filter(|(step, _)| ours.contains(*step)).map(|(_, process)| process).collect();
            let is_left = |step: &str| left.iter().any(|process| process.may_be_of(step));
            let needed = self.steps.needed_by_others(&self.name(), is_left);
            let now = Instant::now();
            // Steps that other builds seem to need get some time to end, in case they are not needed.
            if left.is_empty() || (left.len() <= needed && now >= stopped + Self::SHARED) {
                return Remains::Nothing;
            }
            if now >= deadline {
                return Remains::Processes;
            }
            tokio::time::sleep(Self::PROCESS_POLL).await;
        }
    }

    /// Kills the processes of the build's steps, unless other builds of this worker may need them.
    async fn kill_steps(&self, begun: Instant) {
        let (Ok(Some(found)), Some(processes)) = (self.step_processes(begun).await, self.processes.clone())
        else {
            return;
        };
        let is_left = |step: &str| found.values().any(|process| process.may_be_of(step));
        if found.is_empty() || self.steps.needed_by_others(&self.name(), is_left) > 0 {
            return;
        }
        let steps = found.into_keys().collect();
        let killed = tokio::task::spawn_blocking(move || processes.kill(&steps)).await;
        match killed.map_err(io::Error::other) {
            Ok(Ok(count)) => {
                tracing::warn!(
                    build = self.name(),
                    count,
                    "the engine does not end a step: killed its processes"
                );
            }
            Ok(Err(error)) => {
                tracing::warn!(build = self.name(), %error, "cannot kill the processes of a step")
            }
            Err(error) => tracing::warn!(build = self.name(), %error, "cannot kill the processes of a step"),
        }
    }

    /// Returns the steps with processes that may be of this build, or `None` if those are not visible.
    async fn step_processes(&self, begun: Instant) -> io::Result<Option<BTreeMap<String, StepProcess>>> {
        let ours = self.steps.running(&self.name());
        let Some(processes) = self.processes.clone() else {
            return Ok(None);
        };
        let engine = self.readiness.engine_info().borrow().pid;
        let look = move |processes: &StepProcesses| {
            // A killed engine does not stop its steps any more. Without the permission to kill them, they are
            // seen to go on.
            if let Err(error) = processes.kill_orphans() {
                tracing::warn!(%error, "cannot kill orphaned processes of an engine");
            }
            let found = processes.younger_than(begun.elapsed())?;
            io::Result::Ok((found, processes.can_be_seen(engine)))
        };
        let looked = tokio::task::spawn_blocking(move || look(&processes)).await;
        let (mut found, can_be_seen) = looked.map_err(io::Error::other)??;
        found.retain(|_, process| ours.iter().any(|step| process.may_be_of(step)));
        Ok(can_be_seen.then_some(found))
    }
}
