//! The queue's in-memory tables. Every operation is atomic and does what the database does, in the simplest
//! way.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    build::{Build, BuildId, PendingReason, Record, RecordedEvent, State},
    dispatch::{
        self, CLAIM_BATCH, Committed, Connected, Decision, DecisionResult, Event, Hello, Placement, Policy,
        Rows, RunningBuilds, Worker, candidates, pending_reason, place,
    },
    error::{Error, Resource},
    image::{Artifact, Configuration},
    timestamp::Timestamp,
};

/// The tables of builds and workers.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) policy: Policy,
    configurations: BTreeMap<BuildId, Arc<Configuration>>,
    builds: BTreeMap<BuildId, Build>,
    histories: BTreeMap<BuildId, Vec<Record>>,
    artifacts: BTreeMap<BuildId, Artifact>,
    /// Builds whose images are deleted, which are removed once they are final.
    tombstones: BTreeSet<BuildId>,
    workers: BTreeMap<String, WorkerEntry>,
    /// Round of the last turn of each requester.
    turns: BTreeMap<String, i64>,
    /// Round that the queue has reached.
    round: i64,
}

#[derive(Clone, Debug)]
struct WorkerEntry {
    hello: Hello,
    session: Option<Uuid>,
    heard_at: Timestamp,
    drained: bool,
    draining: bool,
}

impl Tables {
    /// Creates empty tables.
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            policy,
            configurations: BTreeMap::new(),
            builds: BTreeMap::new(),
            histories: BTreeMap::new(),
            artifacts: BTreeMap::new(),
            tombstones: BTreeSet::new(),
            workers: BTreeMap::new(),
            turns: BTreeMap::new(),
            round: 0,
        }
    }

    pub(crate) fn build(&self, id: BuildId) -> Option<&Build> {
        self.builds.get(&id)
    }

    pub(crate) fn history(&self, id: BuildId) -> &[Record] {
        self.histories.get(&id).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn artifact(&self, id: BuildId) -> Option<&Artifact> {
        self.artifacts.get(&id)
    }

    pub(crate) fn enqueue(&mut self, mut build: Build, configuration: Configuration) -> Committed {
        self.configurations.insert(build.id, Arc::new(configuration));
        let own = self.queued().filter(|other| other.requester == build.requester).map(|other| other.round);
        let last = own.chain(self.turns.get(&build.requester.subject).copied()).max();
        build.round = last.map_or(self.round, |last| self.round.max(last + 1));
        let message = format!("queued by {}", build.requester.subject);
        let queued = RecordedEvent::State { state: build.state, message, cancel_requested: false };
        let record = build.record(build.queued_at, queued);
        self.apply(&Decision { build: Some(build), records: vec![record], ..Decision::default() })
    }

    /// Decides what an event does to a build, and applies the decision.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Refused`] if the event is refused.
    pub(crate) fn decide(
        &mut self,
        id: BuildId,
        event: &Event,
        now: Timestamp,
    ) -> (DecisionResult, Committed) {
        let Some(build) = self.builds.get(&id).cloned() else {
            return (Ok(None), Committed::default());
        };
        let rows = Rows { build, configuration: None };
        match dispatch::decide(rows, event, &self.policy, now) {
            Ok(decision) => {
                let committed = self.apply(&decision);
                (Ok(Some(decision)), committed)
            }
            Err(refusal) => (Err(Error::Refused(refusal)), Committed::default()),
        }
    }

    /// Assigns queued builds to connected workers.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Refused`] if a claim is refused, which [`dispatch::decide`] never does.
    pub(crate) fn claim(
        &mut self,
        workers: &[Connected],
        now: Timestamp,
    ) -> Result<(Vec<Decision>, Committed), Error> {
        let (mut decisions, mut committed) = (Vec::new(), Committed::default());
        let queued: Vec<Build> = self.queued().cloned().collect();
        let candidates = candidates(self.workers(now), workers);
        let mut running = self.running();
        for Placement { build, worker } in place(&queued, &candidates, &mut running, now, CLAIM_BATCH) {
            self.round = self.round.max(build.round);
            let turn = self.turns.entry(build.requester.subject.clone()).or_default();
            *turn = build.round.max(*turn);
            let configuration = self.configurations.get(&build.id).cloned();
            let rows = Rows { build, configuration };
            let event = Event::Claim { worker };
            let decision = dispatch::decide(rows, &event, &self.policy, now).map_err(Error::Refused)?;
            add(&mut committed, self.apply(&decision));
            decisions.push(decision);
        }
        Ok((decisions, committed))
    }

    fn running(&self) -> RunningBuilds {
        let mut running = RunningBuilds::new(self.policy.max_running, []);
        for build in self.builds.values().filter(|build| build.state.is_held()) {
            running.add(&build.requester.subject);
        }
        running
    }

    fn workers(&self, now: Timestamp) -> Vec<Worker> {
        let worker = |entry: &WorkerEntry| Worker {
            name: entry.hello.name.clone(),
            labels: entry.hello.labels.clone(),
            slots: entry.hello.slots,
            slots_taken: i64::try_from(self.held_by(&entry.hello.name).len()).unwrap_or(i64::MAX),
            engine_version: entry.hello.engine_version.clone(),
            capabilities: entry.hello.capabilities.clone(),
            pools: entry.hello.pools.clone(),
            session: entry.session,
            online: entry.session.is_some() && self.policy.is_recent(entry.heard_at, now),
            connected_at: entry.heard_at,
            heard_at: entry.heard_at,
            drained: entry.drained,
            draining: entry.draining,
            protocol_version: entry.hello.protocol_version,
            unsupported_reason: entry.hello.unsupported_reason.clone(),
            withheld: entry.hello.withheld.clone(),
            engine_warning: entry.hello.engine_warning.clone(),
        };
        self.workers.values().map(worker).collect()
    }

    /// Deletes the image of a build: the build is cancelled, and removed once it is final.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Refused`] if the build cannot be cancelled now.
    pub(crate) fn delete(&mut self, id: BuildId, now: Timestamp) -> (DecisionResult, Committed) {
        let Some(build) = self.builds.get(&id) else {
            return (Ok(None), Committed::default());
        };
        if build.state.is_final() {
            self.purge(id);
            return (Ok(None), Committed::default());
        }
        self.tombstones.insert(id);
        self.decide(id, &Event::Cancel { by: "alice".to_owned() }, now)
    }

    pub(crate) fn overdue(&self, now: Timestamp) -> Vec<Build> {
        let cancelled_before = now.before(self.policy.stop_timeout);
        let is_overdue = |build: &&Build| {
            build.state.is_held()
                && (build.lease_expires_at.is_some_and(|end| end <= now)
                    || build.cancel_requested_at.is_some_and(|at| at <= cancelled_before))
        };
        self.builds.values().filter(is_overdue).cloned().collect()
    }

    pub(crate) fn waiting_too_long(&self, now: Timestamp) -> Vec<(BuildId, PendingReason)> {
        let before = now.before(self.policy.queue_timeout);
        let mut waiting: Vec<&Build> = self.queued().filter(|build| build.queued_at <= before).collect();
        waiting.sort_by_key(|build| build.queued_at);
        let (workers, running) = (self.workers(now), self.running());
        waiting.into_iter().map(|build| (build.id, pending_reason(build, &workers, &running, now))).collect()
    }

    /// Makes a session the one that speaks for a worker.
    ///
    /// # Errors
    ///
    /// Returns [`Error::WorkerConnected`] if a session of another process already does and was heard from
    /// lately.
    pub(crate) fn open_session(&mut self, hello: &Hello, session: Uuid, now: Timestamp) -> Result<(), Error> {
        self.record_worker(hello, Some(session), now)
    }

    /// Records a worker that is refused, which has no session afterwards.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`open_session`](Self::open_session).
    pub(crate) fn refuse_worker(&mut self, hello: &Hello, now: Timestamp) -> Result<(), Error> {
        self.record_worker(hello, None, now)
    }

    fn record_worker(&mut self, hello: &Hello, session: Option<Uuid>, now: Timestamp) -> Result<(), Error> {
        let known = self.workers.get(&hello.name);
        let lives = known.is_some_and(|known| {
            known.session.is_some()
                && known.hello.instance != hello.instance
                && self.policy.is_recent(known.heard_at, now)
        });
        if lives {
            return Err(Error::WorkerConnected(hello.name.clone()));
        }
        let drained = known.is_some_and(|known| known.drained);
        let entry = WorkerEntry { hello: hello.clone(), session, heard_at: now, drained, draining: false };
        self.workers.insert(hello.name.clone(), entry);
        Ok(())
    }

    pub(crate) fn close_session(&mut self, worker: &str, session: Uuid) {
        if let Some(entry) = self.workers.get_mut(worker).filter(|entry| entry.session == Some(session)) {
            entry.session = None;
        }
    }

    pub(crate) fn held_by(&self, worker: &str) -> Vec<Build> {
        let held = |build: &&Build| build.state.is_held() && build.worker.as_deref() == Some(worker);
        self.builds.values().filter(held).cloned().collect()
    }

    /// Records a heartbeat, extends the leases of the worker's builds, and returns these builds.
    ///
    /// # Errors
    ///
    /// Returns [`Error::SessionLost`] if the session no longer speaks for the worker.
    pub(crate) fn heartbeat(
        &mut self,
        worker: &str,
        session: Uuid,
        draining: bool,
        now: Timestamp,
    ) -> Result<Vec<Build>, Error> {
        let entry = self.workers.get_mut(worker).filter(|entry| entry.session == Some(session));
        let entry = entry.ok_or(Error::SessionLost)?;
        entry.heard_at = now;
        entry.draining = draining;
        let held = self.held_by(worker);
        let lease = self.policy.lease;
        for build in held.iter().filter(|build| build.may_go_on(now, lease)) {
            self.renew_lease(build.id, now);
        }
        Ok(held)
    }

    pub(crate) fn renew_leases(&mut self, now: Timestamp) {
        let last_heard = self.workers.values().map(|worker| worker.heard_at).filter(|at| *at <= now).max();
        if last_heard.is_some_and(|at| self.policy.is_recent(at, now)) {
            return;
        }
        let leased = self.builds.values().filter(|build| build.lease_expires_at.is_some());
        let leased: Vec<BuildId> = leased.map(|build| build.id).collect();
        for id in leased {
            self.renew_lease(id, now);
        }
    }

    /// Drains a worker, or reverts that.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is no such worker.
    pub(crate) fn drain_worker(&mut self, worker: &str, drained: bool) -> Result<(), Error> {
        let entry = self
            .workers
            .get_mut(worker)
            .ok_or_else(|| Error::NotFound(Resource::Worker(worker.to_string())))?;
        entry.drained = drained;
        Ok(())
    }

    fn renew_lease(&mut self, id: BuildId, now: Timestamp) {
        let end = now.after(self.policy.lease);
        if let Some(build) = self.builds.get_mut(&id) {
            build.lease_expires_at = Some(end);
        }
    }

    fn queued(&self) -> impl Iterator<Item = &Build> {
        self.builds.values().filter(|build| build.state == State::Queued)
    }

    fn apply(&mut self, decision: &Decision) -> Committed {
        let mut committed = Committed::default();
        let Some(build) = &decision.build else {
            return committed;
        };
        self.builds.insert(build.id, build.clone());
        if !decision.records.is_empty() {
            self.histories.entry(build.id).or_default().extend(decision.records.iter().cloned());
            committed.recorded.push(build.id);
        }
        committed.queue_changed = !build.state.is_held();
        if let Some(artifact) = &decision.artifact {
            self.artifacts.insert(build.id, artifact.clone());
        }
        committed.changed.insert(build.image);
        if build.state.is_final() && self.tombstones.contains(&build.id) {
            self.purge(build.id);
        }
        committed
    }

    fn purge(&mut self, id: BuildId) {
        self.builds.remove(&id);
        self.configurations.remove(&id);
        self.histories.remove(&id);
        self.artifacts.remove(&id);
        self.tombstones.remove(&id);
    }
}

/// Adds the changes of another event of the same transaction.
pub(super) fn add(all: &mut Committed, one: Committed) {
    all.changed.extend(one.changed);
    all.recorded.extend(one.recorded);
    all.queue_changed |= one.queue_changed;
}
