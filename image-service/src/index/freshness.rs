//! The wait of a read until the index has everything that was committed before the read began.
//!
//! A database that others write to, too, is asked for its latest revision. An answer is good for a reader only if its ask was
//! sent after the reader had begun. One ask is under way at a time, and all who come meanwhile share the next one.

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

/// The time that a read waits for the index to get as far as the database was when it began.
const PATIENCE: Duration = Duration::from_secs(3);

impl Index {
    /// Waits until the index has got as far as the database is now, and returns the revision that it is at.
    ///
    /// # Errors
    ///
    /// - [`Error::CatalogueLoading`] when the index is loaded meanwhile.
    /// - [`Error::Busy`] when the database does not answer, or the index does not catch up with it in time.
    pub(crate) async fn fresh(&self) -> Result<Revision, Error> {
        let begun = *self.0.state.borrow();
        // Where nobody else writes, it is known what was committed.
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

    /// Waits until the index is at least at a revision of the change log.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] when that takes too long.
    pub(crate) async fn reached(&self, revision: Revision) -> Result<(), Error> {
        self.0.wanted.notify_one();
        let mut state = self.0.state.subscribe();
        let reached = state.wait_for(|state| state.at.is_some_and(|at| covers(at, revision)));
        match timeout(PATIENCE, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::Busy),
        }
    }

    /// Waits until the index is as far as the database is now; `None` when the database does not answer.
    async fn caught_up(&self, begun: State) -> Option<Revision> {
        let latest = match self.0.store.committed() {
            CommittedRevision::Known(committed) => committed,
            CommittedRevision::Unknown => self.0.asks.latest(&self.0.store).await?,
        };
        // A database that is behind what it was has lost its last changes, or is another one.
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

/// Tells whether everything up to `wanted` is known at `at`, of the same history.
fn covers(at: Revision, wanted: Revision) -> bool {
    at.number > wanted.number || at == wanted
}

/// An ask that several may wait for; `None` when the database did not answer.
type Ask = Shared<BoxFuture<'static, Option<Revision>>>;

/// The asks that are under way, and to come.
#[derive(Clone, Debug, Default)]
pub(super) struct Asks(Arc<Mutex<UnderWay>>);

#[derive(Debug, Default)]
struct UnderWay {
    /// It may be over.
    current: Option<Ask>,
    /// It is sent when the current one is over.
    next: Option<Ask>,
}

impl Asks {
    /// The time that the database may take to answer.
    const PATIENCE: Duration = Duration::from_secs(3);

    /// Asks for the latest revision: one that is not older than this call. `None` when the database does not answer.
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

    /// From here on nobody joins the next ask any more.
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
