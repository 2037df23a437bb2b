//! What the queue needs of a store, so that it can be driven over another one than the database.

use std::fmt::Debug;

use async_trait::async_trait;
use uuid::Uuid;

use super::{Committed, Store};
use crate::{
    build::{Build, BuildId, PendingReason},
    dispatch::{Decision, Event, Hello, Policy},
    error::Error,
};

/// Where the queue is kept. Every operation is one transaction: when it fails with [`Error::Busy`], it may have been
/// committed all the same.
#[async_trait]
pub(crate) trait DispatchStore: Debug + Send + Sync {
    /// The times and limits of dispatch.
    fn policy(&self) -> &Policy;

    /// Decides what `event` does to a build and writes it; `None` when there is no such build.
    async fn decide(&self, id: BuildId, event: &Event) -> Result<Option<(Decision, Committed)>, Error>;

    /// Gives the first queued build that the worker can take to it, if it has a free slot; `None` when either is missing.
    async fn claim(&self, worker: &str, session: Uuid) -> Result<Option<(Decision, Committed)>, Error>;

    /// The builds of which [`Event::Tick`] may end something.
    async fn overdue(&self) -> Result<Vec<Build>, Error>;

    /// Some of the builds that have been in the queue for too long, and why they are there.
    async fn waiting_too_long(&self) -> Result<Vec<(BuildId, PendingReason)>, Error>;

    /// Lets a session speak for a worker, unless one of another process does and was heard of lately.
    async fn open_session(&self, hello: &Hello, session: Uuid) -> Result<(), Error>;

    /// Notes that a session no longer speaks for its worker.
    async fn close_session(&self, worker: &str, session: Uuid) -> Result<(), Error>;

    /// What a worker holds.
    async fn held_by(&self, worker: &str) -> Result<Vec<Build>, Error>;

    /// Notes that a worker lives and extends the lease on what it holds, which is the answer.
    async fn heartbeat(&self, worker: &str, session: Uuid, draining: bool) -> Result<Vec<Build>, Error>;

    /// Gives every held build a full lease: the service was away, and its workers could not reach it.
    async fn renew_leases(&self) -> Result<(), Error>;
}

#[async_trait]
impl DispatchStore for Store {
    fn policy(&self) -> &Policy {
        self.policy()
    }

    async fn decide(&self, id: BuildId, event: &Event) -> Result<Option<(Decision, Committed)>, Error> {
        self.decide(id, event).await
    }

    async fn claim(&self, worker: &str, session: Uuid) -> Result<Option<(Decision, Committed)>, Error> {
        self.claim(worker, session).await
    }

    async fn overdue(&self) -> Result<Vec<Build>, Error> {
        self.overdue().await
    }

    async fn waiting_too_long(&self) -> Result<Vec<(BuildId, PendingReason)>, Error> {
        self.waiting_too_long().await
    }

    async fn open_session(&self, hello: &Hello, session: Uuid) -> Result<(), Error> {
        self.open_session(hello, session).await
    }

    async fn close_session(&self, worker: &str, session: Uuid) -> Result<(), Error> {
        self.close_session(worker, session).await
    }

    async fn held_by(&self, worker: &str) -> Result<Vec<Build>, Error> {
        self.held_by(worker).await
    }

    async fn heartbeat(&self, worker: &str, session: Uuid, draining: bool) -> Result<Vec<Build>, Error> {
        self.heartbeat(worker, session, draining).await
    }

    async fn renew_leases(&self) -> Result<(), Error> {
        self.renew_leases().await
    }
}
