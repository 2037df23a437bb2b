//! The store as the queue sees it, which allows the queue to run over another store than the database.

use std::{collections::BTreeSet, fmt::Debug, sync::Arc};

use async_trait::async_trait;
use uuid::Uuid;

use super::{Connected, Decision, Event, Hello, Policy, ToWorker};
use crate::{
    build::{Build, BuildId, PendingReason},
    error::Error,
    image::ImageId,
};

/// Maximum number of builds that one transaction claims.
pub(crate) const CLAIM_BATCH: usize = 32;

/// The changes of a committed transaction that readers have to be notified of.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    /// Images that changed, so that the change log has new rows.
    pub(crate) changed: BTreeSet<ImageId>,
    /// Builds whose histories have new records.
    pub(crate) recorded: Vec<BuildId>,
    /// Set if a build was queued or has released a slot.
    pub(crate) queue_changed: bool,
}

/// The side effects of a write, which follow its commit.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    pub(crate) committed: Committed,
    /// Messages, each with the name of its worker.
    pub(crate) messages: Vec<(String, ToWorker)>,
}

/// Outcome of an event; `None` if the build does not exist.
pub(crate) type DecisionResult = Result<Option<Decision>, Error>;

/// A store that keeps the queue.
///
/// Every operation is one transaction. An operation that fails with [`Error::Busy`] may still have been
/// committed.
#[async_trait]
pub(crate) trait DispatchStore: Debug + Send + Sync {
    /// Returns the times and limits of dispatch.
    fn policy(&self) -> &Policy;

    /// Decides what each event does to its build, one after the other, and writes the decisions.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes wait, [`Error::Busy`] if the store does not
    /// respond, and [`Error::Internal`] if it fails otherwise. The refusal of a single event is its
    /// [`DecisionResult`].
    async fn decide(
        &self,
        events: &[(BuildId, Arc<Event>)],
    ) -> Result<(Vec<DecisionResult>, Committed), Error>;

    /// Assigns at most [`CLAIM_BATCH`] queued builds to the connected workers.
    ///
    /// The builds and workers are chosen by [`place`](super::place).
    ///
    /// A worker whose session was replaced gets no builds.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes wait, [`Error::Busy`] if the store does not
    /// respond, and [`Error::Internal`] if it fails otherwise.
    async fn claim(&self, workers: &[Connected]) -> Result<(Vec<Decision>, Committed), Error>;

    /// Returns the builds in which an [`Event::Tick`] may end something.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the store does not respond, and [`Error::Internal`] if it fails otherwise.
    async fn overdue(&self) -> Result<Vec<Build>, Error>;

    /// Returns some of the builds that have been queued for too long, with the reasons why they wait.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the store does not respond, and [`Error::Internal`] if it fails otherwise.
    async fn waiting_too_long(&self) -> Result<Vec<(BuildId, PendingReason)>, Error>;

    /// Makes a session the one that speaks for a worker.
    ///
    /// # Errors
    ///
    /// Returns [`Error::WorkerConnected`] if a session of another process already does and was heard from
    /// lately.
    async fn open_session(&self, hello: &Hello, session: Uuid) -> Result<(), Error>;

    /// Records a worker that is refused for its `unsupported_reason`. It has no session afterwards.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`open_session`](Self::open_session).
    async fn refuse_worker(&self, hello: &Hello) -> Result<(), Error>;

    /// Records that a session no longer speaks for its worker.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes wait, [`Error::Busy`] if the store does not
    /// respond, and [`Error::Internal`] if it fails otherwise.
    async fn close_session(&self, worker: &str, session: Uuid) -> Result<(), Error>;

    /// Returns the builds that a worker holds.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the store does not respond, and [`Error::Internal`] if it fails otherwise.
    async fn held_by(&self, worker: &str) -> Result<Vec<Build>, Error>;

    /// Records a heartbeat, extends the leases of the worker's builds, and returns these builds.
    ///
    /// The lease of a build is not extended if the worker has had it for the length of a lease and has not
    /// started it.
    ///
    /// # Errors
    ///
    /// Returns [`Error::SessionLost`] if the session no longer speaks for the worker,
    /// [`Error::TooManyWrites`] if too many writes wait, [`Error::Busy`] if the store does not respond, and
    /// [`Error::Internal`] if it fails otherwise.
    async fn heartbeat(&self, worker: &str, session: Uuid, draining: bool) -> Result<Vec<Build>, Error>;

    /// Gives every held build a full lease if no worker has been heard from lately.
    ///
    /// That means that the service as a whole was away, so that its workers could not reach it.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes wait, [`Error::Busy`] if the store does not
    /// respond, and [`Error::Internal`] if it fails otherwise.
    async fn renew_leases(&self) -> Result<(), Error>;
}
