//! The tables as a store that is slow, fails, and fails after it has committed, as its surroundings say.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use uuid::Uuid;

use super::{Fate, Surroundings, Tables};
use crate::{
    build::{Build, BuildId, PendingReason},
    dispatch::{Decision, Event, Hello, Policy},
    error::Error,
    store::{Committed, DispatchStore},
    timestamp::Timestamp,
};

/// The store as one replica reaches it.
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

    /// Does something to the tables at one moment somewhere between the call and the answer.
    pub(super) async fn run<T>(
        &self,
        operation: impl FnOnce(&mut Tables, Timestamp) -> Result<T, Error> + Send,
    ) -> Result<T, Error> {
        let (before, after) = self.surroundings.delays();
        if !before.is_zero() {
            tokio::time::sleep(before).await;
        }
        let fate = self.surroundings.fate();
        if fate == Fate::Lost {
            return Err(Error::Busy);
        }
        let now = Timestamp::from_micros(self.surroundings.now_micros());
        let done = operation(&mut self.tables(), now);
        if !after.is_zero() {
            tokio::time::sleep(after).await;
        }
        if fate == Fate::Ambiguous { Err(Error::Busy) } else { done }
    }

    /// Tells the surroundings what an event has done to a build, as soon as it is committed.
    fn tell(&self, tables: &Tables, id: BuildId, event: Option<&Event>, decided: Option<&Decision>) {
        let transitions = decided.map_or(&[][..], |decision| &decision.transitions);
        self.surroundings.committed(&super::change(tables, id, transitions, event.zip(decided)));
    }

    /// Changes a build, and tells of it.
    pub(super) fn change(
        &self,
        tables: &mut Tables,
        id: BuildId,
        event: Option<&Event>,
        operation: impl FnOnce(&mut Tables) -> Decided,
    ) -> Decided {
        let decided = operation(tables);
        let decision =
            decided.as_ref().ok().and_then(|decided| decided.as_ref()).map(|(decision, _)| decision);
        self.tell(tables, id, event, decision);
        decided
    }
}

pub(super) type Decided = Result<Option<(Decision, Committed)>, Error>;

#[async_trait]
impl DispatchStore for MemoryStore {
    fn policy(&self) -> &Policy {
        &self.policy
    }

    async fn decide(&self, id: BuildId, event: &Event) -> Decided {
        self.run(|tables, now| self.change(tables, id, Some(event), |tables| tables.decide(id, event, now)))
            .await
    }

    async fn claim(&self, worker: &str, session: Uuid) -> Decided {
        self.run(|tables, now| {
            let decided = tables.claim(worker, session, now)?;
            if let Some((decision, _)) = &decided
                && let Some(build) = &decision.build
            {
                self.tell(tables, build.id, None, Some(decision));
            }
            Ok(decided)
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
