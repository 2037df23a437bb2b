//! The wait of a read until the index contains everything committed before the read began.
//!
//! If other processes write to the database as well, it is queried for its latest revision. A result is valid
//! for a reader only if the query was sent after the reader began. A reader that is alone queries for itself;
//! all that arrive meanwhile share the next query.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, watch},
    task::yield_now,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Index, State};
use crate::{
    change::{CommittedRevision, Revision},
    error::Error,
    store::Store,
};

/// Maximum time that a read waits for the index to catch up.
const PATIENCE: Duration = Duration::from_secs(5);

impl Index {
    /// Waits until the index has caught up with the database, and returns the revision it reached.
    ///
    /// # Errors
    ///
    /// - Returns [`Error::CatalogueLoading`] if the index is being loaded.
    /// - Returns [`Error::Busy`] if the database does not respond, or the index does not catch up in time.
    pub(crate) async fn fresh(&self) -> Result<Revision, Error> {
        let begun = *self.0.state.borrow();
        // If no other process writes, the committed revision is known.
        if let CommittedRevision::Known(committed) = self.0.store.committed()
            && let Some(at) = begun.at.filter(|at| covers(*at, committed))
        {
            return Ok(at);
        }
        match timeout(PATIENCE, self.caught_up(begun)).await {
            Ok(Some(at)) => Ok(at),
            Ok(None) | Err(_) if self.0.state.borrow().at.is_none() => Err(Error::CatalogueLoading),
            Ok(None) | Err(_) => Err(Error::Busy),
        }
    }

    /// Waits until the index has reached a revision of the change log.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if this takes too long.
    pub(crate) async fn reached(&self, revision: Revision) -> Result<(), Error> {
        self.0.wanted.notify_one();
        let mut state = self.0.state.subscribe();
        let reached = state.wait_for(|state| state.at.is_some_and(|at| covers(at, revision)));
        match timeout(PATIENCE, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::Busy),
        }
    }

    /// Queries for the latest revision whenever a read needs it, until shutdown.
    pub(crate) async fn probe_revisions(self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(self.0.probe.run(&self.0.store)).await;
    }

    /// Waits until the index has caught up; returns `None` if the database does not respond.
    async fn caught_up(&self, begun: State) -> Option<Revision> {
        let latest = match self.0.store.committed() {
            CommittedRevision::Known(committed) => committed,
            CommittedRevision::Unknown => self.0.probe.latest(&self.0.store).await?,
        };
        // A database that is behind its earlier state has lost its last changes, or is a different one.
        let is_other = begun.at.is_some_and(|at| {
            latest.number < at.number || latest.number == at.number && latest.nonce != at.nonce
        });
        let has_caught_up = |state: &State| {
            (!is_other || state.load > begun.load) && state.at.is_some_and(|at| covers(at, latest))
        };
        let mut state = self.0.state.subscribe();
        if !has_caught_up(&state.borrow_and_update()) {
            self.0.wanted.notify_one();
        }
        let state = state.wait_for(has_caught_up).await.ok()?;
        state.at
    }
}

/// Reports whether `at` includes everything up to `wanted`, within one history.
fn covers(at: Revision, wanted: Revision) -> bool {
    at.number > wanted.number || at == wanted
}

/// Queries for the latest revision of the database: that of a reader which is alone, and those that readers
/// share.
#[derive(Debug)]
pub(super) struct RevisionProbe {
    /// Held by a reader that queries for itself.
    alone: Semaphore,
    /// Number of the query that is sent next.
    next: AtomicU64,
    /// Wakes the task that sends queries.
    wanted: Notify,
    answer: watch::Receiver<Answer>,
    /// Taken by the task.
    sender: Mutex<Option<watch::Sender<Answer>>>,
}

/// The answer to the query with this number; `None` if the database did not respond.
#[derive(Copy, Clone, Debug)]
struct Answer {
    query: u64,
    latest: Option<Revision>,
}

impl RevisionProbe {
    /// Maximum time for the database to respond.
    const PATIENCE: Duration = Duration::from_secs(5);

    pub(super) fn new() -> Self {
        let (sender, answer) = watch::channel(Answer { query: 0, latest: None });
        Self {
            alone: Semaphore::new(1),
            next: AtomicU64::new(1),
            wanted: Notify::new(),
            answer,
            sender: Mutex::new(Some(sender)),
        }
    }

    /// Returns a revision that was the latest at some time after this call began.
    ///
    /// Returns `None` if the database does not respond.
    async fn latest(&self, store: &Store) -> Option<Revision> {
        // Nobody has to be woken for a reader that is alone.
        if let Ok(_alone) = self.alone.try_acquire() {
            return Self::query(store).await;
        }
        let query = self.next.load(Ordering::SeqCst);
        let mut answer = self.answer.clone();
        self.wanted.notify_one();
        let answered = answer.wait_for(|answer| answer.query >= query).await.map(|answer| answer.latest);
        match answered {
            Ok(latest) => latest,
            // The task ends when the service drains, while calls go on.
            Err(_) => Self::query(store).await,
        }
    }

    /// Sends a query whenever a reader waits for one.
    async fn run(&self, store: &Store) {
        let Some(sender) = self.sender.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        loop {
            self.wanted.notified().await;
            // Readers that are ready to run join this query instead of waiting for the one after it.
            yield_now().await;
            let query = self.next.fetch_add(1, Ordering::SeqCst);
            sender.send_replace(Answer { query, latest: Self::query(store).await });
        }
    }

    async fn query(store: &Store) -> Option<Revision> {
        timeout(Self::PATIENCE, store.latest_revision()).await.ok()?.ok()
    }
}
