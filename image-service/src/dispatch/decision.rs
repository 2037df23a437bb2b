//! The making of a decision, with one method per event.

use std::sync::Arc;

use super::{Attempt, Decision, Policy, Report, Reported, ToWorker, WorkerEvent};
use crate::{
    build::{
        Build, Event as BuildEvent, Failure, Fault, Kind, Next, PendingReason, RecordedEvent, State,
        StepState, Steps, transition,
    },
    error::Refusal,
    image::{Artifact, Configuration},
    timestamp::Timestamp,
};

/// A decision under construction.
pub(super) struct Decider<'a> {
    build: Build,
    decision: Decision,
    changed: bool,
    policy: &'a Policy,
    now: Timestamp,
}

impl<'a> Decider<'a> {
    pub(super) fn new(build: Build, policy: &'a Policy, now: Timestamp) -> Self {
        Self { build, decision: Decision::default(), changed: false, policy, now }
    }

    pub(super) fn claim(&mut self, worker: &str, configuration: Option<Arc<Configuration>>) {
        let Some(configuration) = configuration.filter(|_| !self.build.is_backing_off(self.now)) else {
            return;
        };
        if self.next(BuildEvent::Claimed).is_none() {
            return;
        }
        let build = &mut self.build;
        build.attempt += 1;
        build.worker = Some(worker.to_owned());
        build.claimed_at = Some(self.now);
        build.lease_expires_at = Some(self.now.after(self.policy.lease));
        build.report_sequence = 0;
        build.steps = Steps::default();
        let limit = self.policy.max_build_time;
        let assignment = ToWorker::Assignment {
            attempt: Attempt::from_build(build),
            image: build.image,
            reference: build.reference.clone(),
            trust_domain: build.trust_domain(),
            creator: build.creator.clone(),
            requester: Box::new(build.requester.clone()),
            timeout: configuration.build_timeout().unwrap_or(limit).min(limit),
            configuration,
            workspace: build.workspace.clone(),
            trace: build.trace.clone(),
        };
        self.enter(State::Claimed, format!("claimed by {worker}"));
        self.send(assignment);
    }

    pub(super) fn report(&mut self, worker: &str, report: &Report) {
        // The worker that sent the report is answered, even if another worker holds the build now.
        let answer = if self.take(worker, report) {
            ToWorker::ReportAck { attempt: report.attempt, sequence: self.build.report_sequence }
        } else {
            ToWorker::Drop(report.attempt)
        };
        self.decision.messages.push((worker.to_owned(), answer));
    }

    /// Applies the new events of a report. Returns false if the attempt is fenced or over.
    fn take(&mut self, worker: &str, report: &Report) -> bool {
        let sequence_before = self.build.report_sequence;
        if self.build.attempt != report.attempt.number || self.build.worker.as_deref() != Some(worker) {
            return false;
        }
        for (sequence, reported) in (report.first_sequence..).zip(&report.events) {
            if sequence <= sequence_before {
                continue;
            }
            if sequence > self.build.report_sequence + 1 {
                // An event in between was lost; the acknowledgement makes the worker send it again.
                break;
            }
            if !self.build.state.is_held() {
                return false;
            }
            self.build.report_sequence = sequence;
            self.changed = true;
            if !self.apply(reported) {
                return false;
            }
        }
        true
    }

    /// Applies one event of a report. Returns false if the attempt is not entitled to it.
    fn apply(&mut self, reported: &Reported) -> bool {
        match &reported.event {
            WorkerEvent::Started => {
                let allowed = self.next(BuildEvent::Started).is_some();
                if allowed {
                    self.build.started_at = Some(self.now);
                    self.enter(State::Running, String::new());
                }
                allowed
            }
            WorkerEvent::Happened(event) => {
                self.happened(reported.time, event);
                true
            }
            WorkerEvent::Built if self.build.cancel_requested_at.is_some() => {
                self.send(ToWorker::Cancel(Attempt::from_build(&self.build)));
                true
            }
            WorkerEvent::Built => {
                let allowed = self.next(BuildEvent::Built).is_some();
                if allowed {
                    self.enter(State::Publishing, String::new());
                    self.send(ToWorker::PublishGrant(Attempt::from_build(&self.build)));
                }
                allowed
            }
            WorkerEvent::Succeeded { image_id, size_bytes, repo_digest, config_digest } => {
                let allowed = self.next(BuildEvent::Succeeded).is_some();
                if allowed {
                    self.decision.artifact = Some(Artifact {
                        image_id: image_id.clone(),
                        size_bytes: *size_bytes,
                        worker: self.build.worker.clone().unwrap_or_default(),
                        finished_at: self.now,
                        configuration_revision: self.build.configuration_revision,
                        build: self.build.id,
                        reference: Some(self.build.reference.clone()),
                        pulled: self.build.kind == Kind::Pull,
                        repo_digest: repo_digest.clone(),
                        config_digest: config_digest.clone(),
                    });
                    self.enter(State::Succeeded, String::new());
                }
                allowed
            }
            WorkerEvent::Failed(failure) => self.lose(BuildEvent::Failed(failure.fault), failure.clone()),
            WorkerEvent::HandedBack { reason, base } => match self.next(BuildEvent::HandedBack) {
                Some(Next::Requeue) => {
                    if base.is_some() {
                        self.build.base.clone_from(base);
                    }
                    self.requeue(format!("handed back: {reason}"));
                    true
                }
                Some(Next::To(state)) => {
                    self.enter(state, String::new());
                    true
                }
                Some(Next::RequeueAfterFailure | Next::RequestStop) | None => false,
            },
            WorkerEvent::Stopped { confirmed } => {
                let allowed = self.next(BuildEvent::Stopped).is_some();
                if allowed {
                    self.build.stop_confirmed = *confirmed;
                    self.enter(State::Cancelled, String::new());
                }
                allowed
            }
        }
    }

    /// Records an event that a worker reports, unless the history has reached its maximum size.
    fn happened(&mut self, time: Timestamp, event: &RecordedEvent) {
        let is_full = |build: &Build| build.history_bytes() >= self.policy.max_history_bytes;
        if is_full(&self.build) {
            self.build.count_step(event);
            self.build.log_truncated = true;
            return;
        }
        self.build.note(event);
        let record = self.build.record(time, event.clone());
        self.decision.records.push(record);
        if is_full(&self.build) {
            let message =
                "the history of the build has reached its maximum size (--max-log-bytes)".to_owned();
            let gap = RecordedEvent::Gap { lines: 0, message };
            self.build.note(&gap);
            let record = self.build.record(time, gap);
            self.decision.records.push(record);
        }
    }

    pub(super) fn cancel(&mut self, by: &str) -> Result<(), Refusal> {
        if self.build.state.is_final() {
            return Err(Refusal::NoBuildInProgress);
        }
        match self.next(BuildEvent::CancelRequested) {
            Some(Next::To(state)) => {
                self.build.cancel_requested_at = Some(self.now);
                self.enter(state, format!("cancelled by {by}"));
            }
            Some(Next::RequestStop) => {
                if self.build.cancel_requested_at.is_none() {
                    self.build.cancel_requested_at = Some(self.now);
                    self.enter(self.build.state, format!("cancel requested by {by}"));
                }
                self.send(ToWorker::Cancel(Attempt::from_build(&self.build)));
            }
            Some(Next::Requeue | Next::RequeueAfterFailure) | None => {
                return Err(Refusal::BuildNotCancellable);
            }
        }
        Ok(())
    }

    pub(super) fn abandoned(&mut self, attempt: i32) {
        if self.build.attempt == attempt {
            self.lost("the worker came back without this attempt");
        }
    }

    pub(super) fn tick(&mut self, worker_online: bool) {
        let overdue =
            |since: Option<Timestamp>, limit| since.is_some_and(|since| since.after(limit) <= self.now);
        if self.build.lease_expires_at.is_some_and(|end| end <= self.now) {
            // A worker that is alive but has not started the build may still hold it.
            self.send(ToWorker::Drop(Attempt::from_build(&self.build)));
            self.lost("the lease of its worker ran out");
        } else if worker_online
            && overdue(self.build.cancel_requested_at, self.policy.stop_timeout)
            && self.next(BuildEvent::StopOverdue).is_some()
        {
            let attempt = Attempt::from_build(&self.build);
            self.build.stop_confirmed = false;
            self.send(ToWorker::Drop(attempt));
            self.enter(
                State::Cancelled,
                "the worker did not confirm in time that the work has stopped".to_owned(),
            );
        }
    }

    pub(super) fn waited(&mut self, reason: PendingReason) {
        let limit = self.policy.queue_timeout;
        if self.build.queued_at.after(limit) > self.now {
            return;
        }
        let failure = Failure {
            fault: Fault::Timeout,
            step: String::new(),
            message: format!("no worker has taken it within {limit:?}: {reason}"),
            last_lines: Vec::new(),
        };
        self.lose(BuildEvent::QueueTimedOut, failure);
    }

    fn lost(&mut self, why: &str) {
        // It is unknown whether the work has stopped: not even its start may have been reported.
        self.build.stop_confirmed = false;
        if self.build.state == State::Claimed {
            // The start of the work was not reported, so the loss does not count as a failure.
            match self.next(BuildEvent::HandedBack) {
                Some(Next::To(state)) => self.enter(state, String::new()),
                Some(Next::Requeue) => self.requeue(format!("not accepted: {why}")),
                Some(Next::RequeueAfterFailure | Next::RequestStop) | None => {}
            }
            return;
        }
        let failure = Failure {
            fault: Fault::Infrastructure,
            step: String::new(),
            message: why.to_owned(),
            last_lines: Vec::new(),
        };
        self.lose(BuildEvent::Lost, failure);
    }

    /// Ends the attempt with a failure. Returns false if that is refused.
    fn lose(&mut self, event: BuildEvent, failure: Failure) -> bool {
        match self.next(event) {
            Some(Next::To(State::Failed)) => {
                if failure.fault == Fault::Infrastructure {
                    self.build.failures += 1;
                }
                self.build.error = Some(failure);
                let message = self.build.message();
                self.enter(State::Failed, message);
            }
            Some(Next::To(state)) => self.enter(state, failure.message),
            Some(Next::RequeueAfterFailure) => {
                self.build.failures += 1;
                self.requeue(failure.message);
                if let BuildEvent::Failed(_) = event {
                    self.back_off();
                }
            }
            Some(Next::Requeue | Next::RequestStop) | None => return false,
        }
        true
    }

    fn requeue(&mut self, why: String) {
        self.enter(State::Queued, why);
        self.build.worker = None;
        self.build.started_at = None;
    }

    /// Delays the next attempt of a queued build.
    ///
    /// Whatever a worker reports as broken may need time to recover. A lost attempt is repeated at once,
    /// because nothing suggests that another worker would fail.
    fn back_off(&mut self) {
        let pause = self.policy.backoff(self.build.failures);
        self.build.not_before = (!pause.is_zero()).then(|| self.now.after(pause));
    }

    fn next(&mut self, event: BuildEvent) -> Option<Next> {
        let build = &self.build;
        let next = transition(
            build.kind,
            build.state,
            event,
            build.cancel_requested_at.is_some(),
            build.failures + 1 >= self.policy.max_failures,
        );
        #[cfg(feature = "simulation")]
        if next.is_some() {
            self.decision.transitions.push((build.state, event));
        }
        next
    }

    fn enter(&mut self, state: State, message: String) {
        self.changed = true;
        self.build.state = state;
        self.build.not_before = None;
        if !state.is_held() {
            self.build.lease_expires_at = None;
        }
        if state.is_final() {
            self.build.finished_at = Some(self.now);
        }
        let cancel_requested = self.build.cancel_requested_at.is_some();
        let event = RecordedEvent::State { state, message, cancel_requested };
        let record = self.build.record(self.now, event);
        self.decision.records.push(record);
    }

    fn send(&mut self, message: ToWorker) {
        if let Some(worker) = self.build.worker.clone() {
            self.decision.messages.push((worker, message));
        }
    }

    pub(super) fn finish(mut self) -> Decision {
        if self.changed {
            self.decision.build = Some(self.build);
        }
        self.decision
    }
}

impl Build {
    /// Updates the counters of the build for something that a worker reports.
    fn note(&mut self, event: &RecordedEvent) {
        self.count_step(event);
        match event {
            RecordedEvent::Line { text, .. } => {
                self.log_bytes += i64::try_from(text.len()).unwrap_or(i64::MAX);
            }
            RecordedEvent::Gap { .. } => self.log_truncated = true,
            RecordedEvent::State { .. } | RecordedEvent::Step { .. } => {}
        }
    }

    /// Updates the numbers of steps if an event is the change of one.
    fn count_step(&mut self, event: &RecordedEvent) {
        let RecordedEvent::Step { step, state, .. } = event else { return };
        self.steps.total = self.steps.total.max(step.saturating_add(1));
        match state {
            StepState::Done => self.steps.done = self.steps.done.saturating_add(1),
            StepState::Cached => {
                self.steps.done = self.steps.done.saturating_add(1);
                self.steps.cached = self.steps.cached.saturating_add(1);
            }
            StepState::Pending | StepState::Started | StepState::Failed => {}
        }
    }
}
