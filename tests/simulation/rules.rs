//! What must hold after every step, whatever happens.

use std::collections::{BTreeMap, BTreeSet};

use image_service::simulation::{Change, Row};
use uuid::Uuid;

/// What has been seen, and what of it must not have been.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    rows: BTreeMap<Uuid, Row>,
    /// The builds that engines run now, each by its name, with the worker.
    running: BTreeMap<String, String>,
    /// What runs on where nobody can stop it in time: a process that was suspended or killed, an engine that is stuck.
    excused: BTreeSet<String>,
    lines: BTreeMap<Uuid, u32>,
    /// How many reports came too late.
    pub(crate) stale_reports: u64,
    pub(crate) broken: Vec<String>,
}

impl Rules {
    /// The engines print so many lines in every attempt at a build.
    pub(crate) fn expect(&mut self, build: Uuid, lines: u32) {
        self.lines.insert(build, lines);
    }

    pub(crate) fn rows(&self) -> &BTreeMap<Uuid, Row> {
        &self.rows
    }

    pub(crate) fn are_all_final(&self) -> bool {
        self.rows.values().all(|row| row.is_final)
    }

    /// The names of what the engine of a worker runs.
    pub(crate) fn running_on(&self, worker: &str) -> Vec<String> {
        self.running.iter().filter(|(_, on)| *on == worker).map(|(name, _)| name.clone()).collect()
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    /// Nobody can stop this in time.
    pub(crate) fn excuse(&mut self, name: String) {
        self.excused.insert(name);
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
            self.blame(name, message);
        }
        self.require_one(build);
    }

    pub(crate) fn ended(&mut self, name: &str) {
        self.running.remove(name);
    }

    pub(crate) fn committed(&mut self, change: &Change) {
        let id = change.build;
        let before = self.rows.get(&id).cloned();
        let Some(after) = &change.after else {
            if let Some(row) = self.rows.get_mut(&id) {
                // What is gone ends nowhere else.
                row.is_final = true;
            }
            return;
        };
        let mut rule = |holds: bool, what: &str| {
            if !holds {
                self.broken.push(format!("{id}: {what}: {before:?} became {after:?}"));
            }
        };
        if let (Some(before), Some((attempt, worker, is_dropped))) = (&before, &change.report) {
            let is_stale = *attempt != before.attempt || before.worker.as_ref() != Some(worker);
            rule(!is_stale || (*is_dropped && before == after), "a stale report is refused");
            self.stale_reports += u64::from(is_stale);
        }
        if let Some(before) = &before {
            rule(!before.is_final || before == after, "a final state was left");
            let is_claim = change.transitions.iter().any(|transition| transition.starts_with("Claimed"));
            rule(after.attempt == before.attempt + i32::from(is_claim), "attempts are counted by claims");
            rule(after.sequences.starts_with(&before.sequences), "the history was rewritten");
            rule(
                after.failures >= before.failures && after.failures <= 3,
                "failures are counted up to three",
            );
        }
        rule(after.sequences.iter().copied().eq(1..=after.sequences.len() as i64), "the history has no gap");
        rule(after.is_held == (after.worker.is_some() && !after.is_final), "who is held has a worker");
        rule((after.state == "Failed") == after.error.is_some(), "who fails says why");
        let name = format!("{id}-{}", after.attempt);
        if after.state == "Succeeded" {
            let expected = self.lines.get(&id).copied().unwrap_or_default();
            let winning = after.lines.iter().filter(|(attempt, _)| *attempt == after.attempt);
            let is_whole =
                winning.map(|(_, line)| line.clone()).eq((0..expected).map(|line| format!("line {line}")));
            rule(is_whole, "the winning attempt has every line once");
            rule(after.artifact == Some(format!("sha256:{name}")), "the artifact is the winning attempt's");
        } else {
            rule(after.artifact.is_none(), "only a success has an artifact");
        }
        rule(!after.cancel_requested || after.state != "Queued", "what is cancelled is not queued");
        let confirmed = after.state == "Cancelled" && after.stop_confirmed && after.worker.is_some();
        rule(!confirmed || !self.running.contains_key(&name), "what is said to have stopped has stopped");
        let is_given_away = after.state == "Claimed" && before.is_none_or(|before| before.state != "Claimed");
        self.rows.insert(id, after.clone());
        if is_given_away {
            let left: Vec<String> = self.running.keys().filter(|name| split(name).0 == id).cloned().collect();
            for name in left {
                let message = format!("{name} ran while attempt {} was given out", after.attempt);
                self.blame(&name, message);
            }
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

    fn blame(&mut self, name: &str, message: String) {
        if !self.excused.contains(name) {
            self.broken.push(message);
        }
    }
}

/// The build and the attempt that an engine's build is named by.
pub(crate) fn split(name: &str) -> (Uuid, i32) {
    let (build, attempt) = name.rsplit_once('-').unwrap_or((name, "0"));
    (build.parse().unwrap_or_default(), attempt.parse().unwrap_or_default())
}
