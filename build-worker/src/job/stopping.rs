//! Stopped means stopped: the engine has ended the build, and no process of it is left on the host.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use tokio::time::Instant;

use super::{Ended, Job, Left};
use crate::{
    engine::{RunningWork, Told},
    output::{Output, Timed},
    readiness::Doubt,
    residue::StepProcess,
};

impl Job {
    /// For how long a build without processes may still be at work: exporting a large image, say.
    const IDLE: Duration = Duration::from_secs(60);
    const IDLE_POLL: Duration = Duration::from_secs(1);
    /// How often the engine is asked to cancel.
    const CANCEL_AGAIN: Duration = Duration::from_millis(200);
    /// How long a step that other builds need is awaited, in case that it ends after all.
    const SHARED: Duration = Duration::from_millis(500);
    /// For how many times of what a stop may take an engine is asked to cancel.
    const LAST_CANCELS: u32 = 3;
    const LINGER_POLL: Duration = Duration::from_secs(1);
    const PROCESS_POLL: Duration = Duration::from_millis(20);

    /// Ends the build: the engine is told, its answer read to the end, and then no process of it may be left.
    pub(super) async fn stop(
        &self,
        mut build: Box<dyn RunningWork>,
        output: &mut Output,
        mut events: Vec<Timed>,
        begun: Instant,
        is_silent: bool,
    ) -> Ended {
        let deadline = Instant::now() + self.stop_limit;
        let canceller = build.canceller();
        // The engine ignores the cancel of a build that it has not begun: it is asked again.
        let cancel = async {
            loop {
                if let Err(error) = canceller.cancel().await {
                    tracing::warn!(build = self.name(), %error, "cannot cancel a build");
                }
                tokio::time::sleep(Self::CANCEL_AGAIN).await;
            }
        };
        let to_the_end = async {
            while let Some(told) = build.next().await {
                match told {
                    Ok(Told::Progress(progress)) => {
                        progress.into_iter().for_each(|progress| output.take(progress, &mut events));
                    }
                    Ok(Told::Silent) => return,
                    Ok(Told::ImageId(_)) | Err(_) => {}
                }
            }
        };
        // An engine that tells nothing more does not tell the end either: that it agrees has to do.
        let agreed = async {
            while canceller.cancel().await.is_err() {
                tokio::time::sleep(Self::CANCEL_AGAIN).await;
            }
        };
        let has_ended = tokio::select! {
            biased;
            () = agreed, if is_silent => true,
            () = to_the_end, if !is_silent => true,
            () = cancel, if !is_silent => false,
            () = tokio::time::sleep_until(deadline) => false,
        };
        drop(canceller);
        output.finish(&mut events);
        if !self.control.is_fenced() {
            for (at, event) in events {
                // A service that is away must not keep the work from stopping.
                if tokio::time::timeout_at(deadline, self.outbox.push(at, event)).await.is_err() {
                    break;
                }
            }
        }
        let confirmed = self.no_process_is_left(begun, deadline).await && has_ended;
        if confirmed {
            return Ended::Stopped { left: None };
        }
        let doubt = Doubt::of(&self.readiness);
        tracing::error!(build = self.name(), "a build did not stop in time");
        Ended::Stopped { left: Some(Left { build: (!has_ended).then_some(build), begun, _doubt: doubt }) }
    }

    /// Waits until what is left has stopped after all: the engine is asked again and again, and when that does not help, its
    /// connections close.
    pub(crate) async fn linger(&self, left: Left) {
        if let Some(mut build) = left.build {
            let canceller = build.canceller();
            let cancel = async {
                loop {
                    tokio::time::sleep(Self::LINGER_POLL).await;
                    if let Err(error) = canceller.cancel().await {
                        tracing::warn!(build = self.name(), %error, "cannot cancel a build");
                    }
                }
            };
            let to_the_end = async { while !matches!(build.next().await, None | Some(Ok(Told::Silent))) {} };
            tokio::select! {
                biased;
                () = to_the_end => {}
                () = cancel => {}
                () = tokio::time::sleep(self.stop_limit * Self::LAST_CANCELS) => {}
            }
        }
        while !self.no_process_is_left(left.begun, Instant::now() + Self::SHARED).await {
            tokio::time::sleep(Self::LINGER_POLL).await;
        }
        self.steps.forget(&self.name());
        tracing::info!(build = self.name(), "a build has stopped after all");
    }

    /// Waits until no step of any build since this one was begun has had a process for a while.
    pub(super) async fn idle(&self, begun: Instant) {
        let mut since = Instant::now();
        while since.elapsed() < Self::IDLE {
            tokio::time::sleep(Self::IDLE_POLL).await;
            if let Some(processes) = self.processes.clone() {
                let look = tokio::task::spawn_blocking(move || processes.younger_than(begun.elapsed()));
                if look.await.is_ok_and(|found| found.is_ok_and(|found| !found.is_empty())) {
                    since = Instant::now();
                }
            }
        }
    }

    /// Waits until no step of the build has a process left that no other build of this worker needs.
    async fn no_process_is_left(&self, begun: Instant, deadline: Instant) -> bool {
        let stopped = Instant::now();
        let mut ours: Option<BTreeSet<String>> = None;
        loop {
            let found = match self.step_processes(begun).await {
                Ok(found) => found,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for what is left of a build");
                    return false;
                }
            };
            // What begins from now on is not of this build.
            let ours = ours.get_or_insert_with(|| found.keys().cloned().collect());
            let left: Vec<&StepProcess> =
                found.iter().filter(|(step, _)| ours.contains(*step)).map(|(_, process)| process).collect();
            let is_left = |step: &str| left.iter().any(|process| process.may_be_of(step));
            let needed = self.steps.needed_by_others(&self.name(), is_left);
            let now = Instant::now();
            // What others seem to need is given some time to end, in case that they do not.
            if left.is_empty() || (left.len() <= needed && now >= stopped + Self::SHARED) {
                return true;
            }
            if now >= deadline {
                return false;
            }
            tokio::time::sleep(Self::PROCESS_POLL).await;
        }
    }

    /// The steps that have processes and may be of this build. Of an engine elsewhere none is seen: the end of the build is
    /// all there is to go by.
    async fn step_processes(&self, begun: Instant) -> io::Result<BTreeMap<String, StepProcess>> {
        let ours = self.steps.started_by(&self.name());
        let Some(processes) = self.processes.clone().filter(|_| !ours.is_empty()) else {
            return Ok(BTreeMap::new());
        };
        let look = move || {
            // An engine that was killed stops nothing more.
            processes.kill_orphans()?;
            processes.younger_than(begun.elapsed())
        };
        let mut found = tokio::task::spawn_blocking(look).await.map_err(io::Error::other)??;
        found.retain(|_, process| ours.iter().any(|step| process.may_be_of(step)));
        Ok(found)
    }
}
