//! Invariants that must hold after every step, under every fault.

use std::collections::{BTreeMap, BTreeSet};

use build_worker::simulation::{Outcome, Plan, build_name, image_id};
use image_service::simulation::{BuildRequest, Change, Database, Row};
use proto::dispatch::ReportAck;
use uuid::Uuid;

use crate::world::{SLOTS, zone_of};

/// The state observed so far, and the rules that it broke.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    rows: BTreeMap<Uuid, Row>,
    /// Builds that engines run now, by name, with their workers.
    running: BTreeMap<String, String>,
    /// Builds that nothing can stop in time, as a process was suspended or killed or an engine is stuck.
    excused: BTreeSet<String>,
    /// Excused builds whose engine is stuck.
    stuck: BTreeSet<String>,
    /// Builds whose images are deleted, and everything known of them with these.
    gone: BTreeSet<Uuid>,
    wanted: BTreeMap<Uuid, Wanted>,
    /// True once the faults are over and the system has recovered.
    pub(crate) is_calm: bool,
    /// True if a build may stay in the queue for too long.
    pub(crate) may_wait_too_long: bool,
    /// Number of reports that came too late.
    pub(crate) stale_reports: u64,
    pub(crate) broken: Vec<String>,
}

/// A build as its client and its engine know it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) plan: Plan,
    pub(crate) request: BuildRequest,
    /// True once someone wants the build stopped or its image deleted.
    pub(crate) is_unwanted: bool,
}

impl Rules {
    pub(crate) fn new(may_wait_too_long: bool) -> Self {
        Self { may_wait_too_long, ..Self::default() }
    }

    pub(crate) fn want(&mut self, build: Uuid, plan: Plan, request: BuildRequest) {
        self.wanted.insert(build, Wanted { plan, request, is_unwanted: false });
    }

    /// Marks a build that someone is about to cancel or delete.
    pub(crate) fn unwant(&mut self, build: Uuid) {
        if let Some(wanted) = self.wanted.get_mut(&build) {
            wanted.is_unwanted = true;
        }
    }

    pub(crate) fn plan(&self, build: Uuid) -> Plan {
        self.wanted.get(&build).expect("it was planned when it was queued").plan
    }

    pub(crate) fn rows(&self) -> &BTreeMap<Uuid, Row> {
        &self.rows
    }

    pub(crate) fn are_all_final(&self) -> bool {
        self.rows.values().all(|row| row.is_final)
    }

    /// Returns the names of the builds that the engine of a worker runs.
    pub(crate) fn running_on(&self, worker: &str) -> Vec<String> {
        self.running.iter().filter(|(_, on)| *on == worker).map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// Excuses a build that nothing can stop in time.
    pub(crate) fn excuse(&mut self, name: String) {
        self.excused.insert(name);
    }

    /// Marks a build that its engine keeps running for long, even after a stop was requested.
    pub(crate) fn get_stuck(&mut self, name: &str) {
        self.stuck.insert(name.to_owned());
        self.excuse(name.to_owned());
    }

    /// Checks that a worker has stopped what it no longer owns in the time since it was resumed.
    pub(crate) fn require_caught_up(&mut self, worker: &str) {
        for name in self.running_on(worker) {
            let (build, attempt) = split(&name);
            let is_its_own = |row: &Row| row.is_held && row.attempt == attempt;
            if self.rows.get(&build).is_some_and(is_its_own) {
                self.excused.retain(|excused| *excused != name || self.stuck.contains(excused));
            } else if !self.stuck.contains(&name) {
                let row = self.rows.get(&build);
                self.broken.push(format!("{name} still runs on {worker}, which has slept: {row:?}"));
            }
        }
    }

    /// Checks that a report is durable when a worker receives its acknowledgement.
    pub(crate) fn acknowledged(&mut self, ack: &ReportAck) {
        let Some(attempt) = &ack.attempt else { return };
        let build: Uuid = attempt.build_id.parse().unwrap_or_default();
        if let Some(row) = self.rows.get(&build).filter(|row| row.attempt == attempt.number)
            && !self.gone.contains(&build)
            && row.report_sequence < ack.sequence
        {
            self.broken.push(format!("{ack:?} is not durable: {row:?}"));
        }
    }

    pub(crate) fn began(&mut self, name: &str, worker: &str, is_excused: bool) {
        if is_excused {
            self.excuse(name.to_owned());
        }
        if self.running.insert(name.to_owned(), worker.to_owned()).is_some() {
            self.broken.push(format!("{name} was begun while it ran"));
        }
        let (build, attempt) = split(name);
        if let Some(row) = self.rows.get(&build).filter(|row| row.attempt > attempt) {
            let message = format!("{name} was begun while attempt {} was out", row.attempt);
            self.record_failure(name, message);
        }
        self.require_one(build);
    }

    pub(crate) fn ended(&mut self, name: &str) {
        self.running.remove(name);
    }

    /// Checks that a worker may set the name of the image that an attempt has built.
    pub(crate) fn tagged(&mut self, image: &str, name: &str, is_excused: bool) {
        let attempt_name = build_name(image);
        let (build, attempt) = split(&attempt_name);
        let granted = |row: &Row| row.attempt == attempt && row.state == "Publishing";
        // The build of a deleted image is gone, and a cancelled one may be about to publish.
        let mut is_granted = self.rows.get(&build).is_none_or(|row| granted(row) || row.state == "Cancelled");
        // A failed push gives the name back to the image that had it.
        let is_pushed = self.wanted.get(&build).is_some_and(|wanted| wanted.request.push);
        let gives_back = |row: &Row| row.attempt > attempt && row.state == "Publishing";
        is_granted |= is_pushed && self.rows.get(&build).is_some_and(gives_back);
        if !is_granted && !is_excused {
            let message = format!("{name} was set to {image}, which may not be: {:?}", self.rows.get(&build));
            self.record_failure(&attempt_name, message);
        }
    }

    /// Checks a committed change.
    ///
    /// `takes_nothing` says that the build's worker has long been silent or draining. `now` is the time of
    /// the database's clock, in microseconds.
    pub(crate) fn committed(&mut self, change: &Change, takes_nothing: bool, now: i64) {
        let id = change.build;
        let before = self.rows.get(&id).cloned();
        let Some(after) = &change.after else {
            if let Some(row) = self.rows.get_mut(&id) {
                // A deleted build ends nowhere else.
                row.is_final = true;
                row.is_held = false;
            }
            self.gone.insert(id);
            self.require_gone(change);
            return;
        };
        let broken = self.broken.len();
        self.require_order(change, before.as_ref(), after);
        self.require_reasons(change, before.as_ref(), after);
        let name = format!("{id}-{}", after.attempt);
        self.require_stopped(change, before.as_ref(), after, &name);
        let is_given_away =
            after.state == "Claimed" && before.as_ref().is_none_or(|row| row.state != "Claimed");
        if is_given_away {
            self.require_suitable(id, after, takes_nothing);
            self.require_due(before.as_ref(), now);
        }
        for broken in &mut self.broken[broken..] {
            *broken = format!("{id}: {broken}: {before:?} became {after:?} by {change:?}");
        }
        self.rows.insert(id, after.clone());
        if is_given_away {
            let left: Vec<String> = self.running.keys().filter(|name| split(name).0 == id).cloned().collect();
            for name in left {
                let message = format!("{name} ran while attempt {} was given out", after.attempt);
                self.record_failure(&name, message);
            }
        }
    }

    /// Checks the order of states, reports and events.
    fn require_order(&mut self, change: &Change, before: Option<&Row>, after: &Row) {
        if let (Some(before), Some((attempt, worker, is_dropped))) = (before, &change.report) {
            let is_stale = *attempt != before.attempt || before.worker.as_ref() != Some(worker);
            self.rule(!is_stale || (*is_dropped && before == after), "a stale report is refused");
            self.stale_reports += u64::from(is_stale);
        }
        if let (Some(before), Some(attempt)) = (before, change.abandoned) {
            self.rule(attempt == before.attempt || before == after, "only the present attempt is abandoned");
        }
        if let Some(before) = before {
            self.rule(!before.is_final || before == after, "a final state is never left");
            let is_claim = change.transitions.iter().any(|transition| transition.starts_with("Claimed"));
            self.rule(
                after.attempt == before.attempt + i32::from(is_claim),
                "attempts are counted by claims",
            );
            self.rule(after.sequences.starts_with(&before.sequences), "the history is never rewritten");
            let requested = before.cancel_requested_at;
            self.rule(
                requested.is_none() || requested == after.cancel_requested_at,
                "the first cancel sets the deadline",
            );
        }
        let whole = after.sequences.iter().copied().eq(1..=after.sequences.len() as i64);
        self.rule(whole, "the history has no gap");
        self.rule(after.is_held == (after.worker.is_some() && !after.is_final), "who is held has a worker");
        self.rule(
            after.cancel_requested_at.is_none() || after.state != "Queued",
            "what is to stop is not queued again",
        );
        self.rule(after.not_before.is_none() || after.state == "Queued", "only what is queued backs off");
    }

    /// Checks that every failure and every end has a reason that is known here.
    fn require_reasons(&mut self, change: &Change, before: Option<&Row>, after: &Row) {
        let went = |what: &str| change.transitions.iter().any(|transition| transition.starts_with(what));
        let failures_before = before.map_or(0, |row| row.failures);
        let is_failure = (went("Lost in") || went("Failed(Infrastructure) in")) && after.state != "Cancelled";
        self.rule(
            after.failures == failures_before + i32::from(is_failure) && after.failures <= 3,
            "each failure of the infrastructure is counted, and nothing else",
        );
        let is_reported = went("Failed(Infrastructure) in") && after.state == "Queued";
        let backs_off = after.not_before.is_some() && before.is_none_or(|row| row.not_before.is_none());
        self.rule(is_reported == backs_off, "what a worker reports as broken backs off, and nothing else");
        let Some(wanted) = self.wanted.get(&change.build).cloned() else {
            self.rule(false, "nobody wants it");
            return;
        };
        let plan = wanted.plan;
        self.rule(
            !is_failure || !self.is_calm || plan.outcome == Outcome::Breaks,
            "nothing is lost when nothing goes wrong",
        );
        self.rule((after.state == "Failed") == after.fault.is_some(), "who fails says why");
        let is_explained = match (after.state.as_str(), after.fault.as_deref()) {
            ("Succeeded", _) => plan.outcome == Outcome::Succeeds,
            ("Cancelled", _) => wanted.is_unwanted,
            ("Failed", Some("User")) => matches!(plan.outcome, Outcome::Fails | Outcome::RefusesPush),
            ("Failed", Some("Timeout")) if after.worker.is_none() => self.may_wait_too_long,
            ("Failed", Some("Timeout")) => wanted.request.time_limit.is_some(),
            ("Failed", Some("Infrastructure")) => after.failures == 3,
            _ => !after.is_final,
        };
        self.rule(is_explained, "it ends for a reason");
        if after.state == "Succeeded" {
            let winning = after.lines.iter().filter(|(attempt, _)| *attempt == after.attempt);
            let is_whole =
                winning.map(|(_, line)| line.clone()).eq((0..plan.lines).map(|line| format!("line {line}")));
            self.rule(is_whole, "the winning attempt has every line once");
            let image = image_id(&format!("{}-{}", change.build, after.attempt));
            self.rule(after.artifact == Some(image), "the artifact is the winning attempt's");
        } else {
            self.rule(after.artifact.is_none(), "only a success has an artifact");
        }
    }

    /// Checks that a build reported as over is over, even if its engine is stuck.
    fn require_stopped(&mut self, change: &Change, before: Option<&Row>, after: &Row, name: &str) {
        let is_reported_over =
            change.report.is_some() && before.is_some_and(|row| row.is_held) && !after.is_held;
        // A build has failed after its time limit, whether or not it has stopped.
        let is_confirmed = match after.state.as_str() {
            "Cancelled" => after.stop_confirmed,
            "Failed" => after.fault.as_deref() != Some("Timeout"),
            _ => true,
        };
        self.rule(
            !is_reported_over || !is_confirmed || !self.running.contains_key(name),
            "what is said to be over is over",
        );
    }

    /// Checks that a build is given to a worker that may take it.
    fn require_suitable(&mut self, build: Uuid, after: &Row, takes_nothing: bool) {
        let Some(Wanted { request, .. }) = self.wanted.get(&build).cloned() else { return };
        let worker = after.worker.clone().unwrap_or_default();
        self.rule(request.worker.is_empty() || request.worker == worker, "a pin is honoured");
        let (label, zone) = zone_of(&worker);
        self.rule(request.labels.get(&label).is_none_or(|wanted| *wanted == zone), "labels are honoured");
        let holds = |(id, row): &(&Uuid, &Row)| {
            **id != build && row.is_held && row.worker.as_deref() == Some(worker.as_str())
        };
        let held = self.rows.iter().filter(holds).count();
        self.rule(held < usize::from(SLOTS), "nobody gets more than it has slots for");
        self.rule(!takes_nothing, "whoever is silent or drains gets nothing");
    }

    /// Checks that a build is not given out during its backoff, unless the clock was put back since.
    fn require_due(&mut self, before: Option<&Row>, now: i64) {
        let max_backoff = i64::try_from(Database::MAX_BACKOFF.as_micros()).unwrap_or(i64::MAX);
        let is_due = |at: i64| at <= now || at > now + max_backoff;
        self.rule(before.and_then(|row| row.not_before).is_none_or(is_due), "a pause is kept");
    }

    /// Checks that a deleted build runs nowhere, unless nothing could wait for its end.
    fn require_gone(&mut self, change: &Change) {
        let unawaited =
            ["StopOverdue", "Lost", "HandedBack in Claimed", "Failed(Timeout)", "CancelRequested in Queued"];
        let is_unawaited = |went: &String| unawaited.iter().any(|transition| went.starts_with(transition));
        if change.transitions.is_empty() || change.transitions.iter().any(is_unawaited) {
            return;
        }
        let running: Vec<String> =
            self.running.keys().filter(|name| split(name).0 == change.build).cloned().collect();
        for name in running {
            let message = format!("{name} runs, and its record is gone: {:?}", change.transitions);
            self.record_failure(&name, message);
        }
    }

    fn rule(&mut self, holds: bool, what: &str) {
        if !holds {
            self.broken.push(what.to_owned());
        }
    }

    fn require_one(&mut self, build: Uuid) {
        let unexcused: Vec<String> = self
            .running
            .keys()
            .filter(|name| split(name).0 == build && !self.excused.contains(*name))
            .cloned()
            .collect();
        if unexcused.len() > 1 {
            self.broken.push(format!("these run at once: {unexcused:?}"));
        }
    }

    fn record_failure(&mut self, name: &str, message: String) {
        if !self.excused.contains(name) {
            self.broken.push(message);
        }
    }
}

/// Splits the name of an engine's build into the build and the attempt.
pub(crate) fn split(name: &str) -> (Uuid, i32) {
    let (build, attempt) = name.rsplit_once('-').unwrap_or((name, "0"));
    (build.parse().unwrap_or_default(), attempt.parse().unwrap_or_default())
}
