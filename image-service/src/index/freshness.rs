//! Asks of the database what its latest revision is.
//!
//! An answer is good for a reader only if its ask was sent after the reader had begun. One ask is under way at a time, and all who
//! come meanwhile share the next one.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use tokio::time::timeout;

use crate::store::{Revision, Store};

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
    /// How long the database may take to answer.
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
