//! The wait of a read until the index contains everything committed before the read began.
//!
//! If other processes write to the database as well, it is queried for its latest revision. A result is valid for a reader only if
//! the query was sent after the reader began. One query is in flight at a time, and all readers that arrive meanwhile share the
//! next one.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use tokio::time::timeout;

use super::{Index, State};
use crate::{
    change::{CommittedRevision, Revision},
    error::Error,
    store::Store,
};

/// Maximum time that a read waits for the index to catch up.
const PATIENCE: Duration = Duration::from_secs(3);

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

    /// Waits until the index has caught up; returns `None` if the database does not respond.
    async fn caught_up(&self, begun: State) -> Option<Revision> {
        let latest = match self.0.store.committed() {
            CommittedRevision::Known(committed) => committed,
            CommittedRevision::Unknown => self.0.asks.latest(&self.0.store).await?,
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

/// A shared query for the latest revision; `None` if the database did not respond.
type Ask = Shared<BoxFuture<'static, Option<Revision>>>;

/// The query in flight, and the next one.
#[derive(Clone, Debug, Default)]
pub(super) struct Asks(Arc<Mutex<UnderWay>>);

#[derive(Debug, Default)]
struct UnderWay {
    /// May be complete.
    current: Option<Ask>,
    /// Sent once the current query is complete.
    next: Option<Ask>,
}

impl Asks {
    /// Maximum time for the database to respond.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// Returns a revision that was the latest at some time after this call began.
    ///
    /// Returns `None` if the database does not respond.
    pub(super) async fn latest(&self, store: &Store) -> Option<Revision> {
        let ask = self.join(store);
        ask.await
    }

    fn join(&self, store: &Store) -> Ask {
        let mut under_way = self.under_way();
        if let Some(next) = &under_way.next {
            return next.clone();
        }
        match under_way.current.clone().filter(|current| current.peek().is_none()) {
            None => {
                let ask = Self::send(store.clone()).boxed().shared();
                under_way.current = Some(ask.clone());
                ask
            }
            Some(current) => {
                let (asks, store) = (self.clone(), store.clone());
                let next = async move {
                    current.await;
                    asks.begin_next();
                    Self::send(store).await
                };
                let next = next.boxed().shared();
                under_way.next = Some(next.clone());
                next
            }
        }
    }

    /// Makes the next query the current one, so that no further reader joins it.
    fn begin_next(&self) {
        let mut under_way = self.under_way();
        under_way.current = under_way.next.take();
    }

    async fn send(store: Store) -> Option<Revision> {
        timeout(Self::PATIENCE, store.latest_revision()).await.ok()?.ok()
    }

    fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
