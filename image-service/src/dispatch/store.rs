//! The store as the queue sees it, so that the queue can be driven over another one than the database.

use std::{collections::BTreeSet, fmt::Debug, sync::Arc};

use async_trait::async_trait;
use uuid::Uuid;

use super::{Connected, Decision, Event, Hello, Policy, ToWorker};
use crate::{
    build::{Build, BuildId, PendingReason},
    error::Error,
    image::ImageId,
};

/// The most builds that one transaction claims.
pub(crate) const CLAIMED_AT_ONCE: usize = 32;

/// The news of a committed transaction: the feed and the watches of builds read on.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    /// The images that changed, so that the change log has new rows.
    pub(crate) changed: BTreeSet<ImageId>,
    /// The builds whose histories have grown.
    pub(crate) recorded: Vec<BuildId>,
    /// A build is in the queue, or has left a slot.
    pub(crate) queue_moved: bool,
}

/// The work that follows a committed write.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    pub(crate) committed: Committed,
    /// Messages, each with the name of its worker.
    pub(crate) messages: Vec<(String, ToWorker)>,
}

/// The outcome of an event; `None` when there is no such build.
pub(crate) type Decided = Result<Option<Decision>, Error>;

/// A store that keeps the queue. Every operation is one transaction: when it fails with [`Error::Busy`], it may have been
/// committed all the same.
#[async_trait]
pub(crate) trait DispatchStore: Debug + Send + Sync {
    /// Returns the times and limits of dispatch.
    fn policy(&self) -> &Policy;

    /// Decides what each event does to its build, one after the other, and writes it.
    async fn decide(&self, events: &[(BuildId, Arc<Event>)]) -> Result<(Vec<Decided>, Committed), Error>;

    /// Gives queued builds to the connected workers as [`place`](super::place) has it; [`CLAIMED_AT_ONCE`] at most. A worker that its
    /// session speaks for no more gets none.
    async fn claim(&self, workers: &[Connected]) -> Result<(Vec<Decision>, Committed), Error>;

    /// Returns the builds of which [`Event::Tick`] may end something.
    async fn overdue(&self) -> Result<Vec<Build>, Error>;

    /// Returns some of the builds that have been in the queue for too long, and why they are there.
    async fn waiting_too_long(&self) -> Result<Vec<(BuildId, PendingReason)>, Error>;

    /// Lets a session speak for a worker, unless one of another process does and was heard of lately.
    async fn open_session(&self, hello: &Hello, session: Uuid) -> Result<(), Error>;

    /// Records a worker that is refused for its `unsupported_reason`: no session speaks for it afterwards.
    ///
    /// # Errors
    ///
    /// Those of [`open_session`](Self::open_session).
    async fn refuse_worker(&self, hello: &Hello) -> Result<(), Error>;

    /// Notes that a session no longer speaks for its worker.
    async fn close_session(&self, worker: &str, session: Uuid) -> Result<(), Error>;

    /// Returns the builds that a worker holds.
    async fn held_by(&self, worker: &str) -> Result<Vec<Build>, Error>;

    /// Notes that a worker lives and extends the lease on what it holds, which is the answer; not on what it has had for a
    /// lease and not begun.
    async fn heartbeat(&self, worker: &str, session: Uuid, draining: bool) -> Result<Vec<Build>, Error>;

    /// Gives every held build a full lease, if the service was away as a whole, so that its workers could not reach it: none has
    /// been heard of lately.
    async fn renew_leases(&self) -> Result<(), Error>;
}
