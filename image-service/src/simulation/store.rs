//! The tables as a store that is slow, fails, and fails after it has committed, as its surroundings decide.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use uuid::Uuid;

use super::{CommitOutcome, Surroundings, Tables};
use crate::{
    build::{Build, BuildId, PendingReason},
    dispatch::{Committed, Connected, Decision, DecisionResult, DispatchStore, Event, Hello, Policy},
    error::Error,
    timestamp::Timestamp,
};

/// The store as one replica sees it.
#[derive(Clone, Debug)]
pub(super) struct MemoryStore {
    pub(super) tables: Arc<Mutex<Tables>>,
    pub(super) surroundings: Arc<dyn Surroundings>,
    pub(super) policy: Policy,
}

impl MemoryStore {
    pub(super) fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies an operation to the tables at one moment between the call and the answer.
    pub(super) async fn run<T>(
        &self,
        operation: impl FnOnce(&mut Tables, Timestamp) -> Result<T, Error> + Send,
    ) -> Result<T, Error> {
        let (before, after) = self.surroundings.delays();
        if !before.is_zero() {
            tokio::time::sleep(before).await;
        }
        let outcome = self.surroundings.commit_outcome();
        if outcome == CommitOutcome::Lost {
            return Err(Error::Busy);
        }
        let now = Timestamp::from_micros(self.surroundings.now_micros());
        let done = operation(&mut self.tables(), now);
        if !after.is_zero() {
            tokio::time::sleep(after).await;
        }
        if outcome == CommitOutcome::Ambiguous { Err(Error::Busy) } else { done }
    }

    /// Reports the effects of an event on a build to the surroundings, at the moment of its commit.
    fn report_commit(&self, tables: &Tables, id: BuildId, event: Option<&Event>, decided: Option<&Decision>) {
        let transitions = decided.map_or(&[][..], |decision| &decision.transitions);
        self.surroundings.committed(&super::change(tables, id, transitions, event.zip(decided)));
    }

    /// Changes a build, and reports the change to the surroundings.
    pub(super) fn change(
        &self,
        tables: &mut Tables,
        id: BuildId,
        event: Option<&Event>,
        operation: impl FnOnce(&mut Tables) -> (DecisionResult, Committed),
    ) -> (DecisionResult, Committed) {
        let (decided, committed) = operation(tables);
        self.report_commit(tables, id, event, decided.as_ref().ok().and_then(Option::as_ref));
        (decided, committed)
    }
}

#[async_trait]
impl DispatchStore for MemoryStore {
    fn policy(&self) -> &Policy {
        &self.policy
    }

    async fn decide(
        &self,
        events: &[(BuildId, Arc<Event>)],
    ) -> Result<(Vec<DecisionResult>, Committed), Error> {
        self.run(|tables, now| {
            let (mut all, mut committed) = (Vec::with_capacity(events.len()), Committed::default());
            for (id, event) in events {
                let decide = |tables: &mut Tables| tables.decide(*id, event, now);
                let (decided, of_one) = self.change(tables, *id, Some(event), decide);
                super::tables::add(&mut committed, of_one);
                all.push(decided);
            }
            Ok((all, committed))
        })
        .await
    }

    async fn claim(&self, workers: &[Connected]) -> Result<(Vec<Decision>, Committed), Error> {
        self.run(|tables, now| {
            let (decisions, committed) = tables.claim(workers, now)?;
            for decision in &decisions {
                if let Some(build) = &decision.build {
                    self.report_commit(tables, build.id, None, Some(decision));
                }
            }
            Ok((decisions, committed))
        })
        .await
    }

    async fn overdue(&self) -> Result<Vec<Build>, Error> {
        self.run(|tables, now| Ok(tables.overdue(now))).await
    }

    async fn waiting_too_long(&self) -> Result<Vec<(BuildId, PendingReason)>, Error> {
        self.run(|tables, now| Ok(tables.waiting_too_long(now))).await
    }

    async fn open_session(&self, hello: &Hello, session: Uuid) -> Result<(), Error> {
        self.run(|tables, now| tables.open_session(hello, session, now)).await
    }

    async fn refuse_worker(&self, hello: &Hello) -> Result<(), Error> {
        self.run(|tables, now| tables.refuse_worker(hello, now)).await
    }

    async fn close_session(&self, worker: &str, session: Uuid) -> Result<(), Error> {
        self.run(|tables, _| {
            tables.close_session(worker, session);
            Ok(())
        })
        .await
    }

    async fn held_by(&self, worker: &str) -> Result<Vec<Build>, Error> {
        self.run(|tables, _| Ok(tables.held_by(worker))).await
    }

    async fn heartbeat(&self, worker: &str, session: Uuid, draining: bool) -> Result<Vec<Build>, Error> {
        self.run(|tables, now| tables.heartbeat(worker, session, draining, now)).await
    }

    async fn renew_leases(&self) -> Result<(), Error> {
        self.run(|tables, now| {
            tables.renew_leases(now);
            Ok(())
        })
        .await
    }
}
