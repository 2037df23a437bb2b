//! Watches of images: each is one caller's view of the catalogue as it changes.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    access::Principal,
    error::Error,
    image::{Query, View},
    index::Index,
    store::Store,
    timestamp::Timestamp,
};

pub(crate) use self::watch::{ImageWatch, Notice, WatchEvent};
pub(crate) use crate::change::Revision;

mod watch;

/// Where watches of images begin.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    store: Store,
    index: Index,
    shutdown: CancellationToken,
}

impl Feed {
    pub(crate) fn new(store: Store, index: Index, shutdown: CancellationToken) -> Self {
        Self { store, index, shutdown }
    }

    /// Begins a watch of all that the caller sees and that matches, or of what has changed since `after`.
    ///
    /// # Errors
    ///
    /// [`Error::RevisionUnavailable`] when it cannot be resumed from there, and [`Error::Busy`].
    pub(crate) async fn watch(
        &self,
        caller: &Principal,
        query: Query,
        after: Option<Revision>,
        view: View,
    ) -> Result<ImageWatch, Error> {
        // Subscribe, then read: whatever is committed later than what is read here comes through the subscription.
        let events = self.index.subscribe();
        let latest = self.index.fresh().await?;
        if let Some(after) = after {
            self.store.changes_after(after, 1).await?;
        }
        Ok(ImageWatch::new(self, events, caller, query, after.unwrap_or(latest), after.is_some(), view))
    }

    /// Returns the oldest revision that a watch can be resumed from.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub(crate) async fn oldest(&self) -> Result<i64, Error> {
        Ok(self.store.revisions().await?.oldest.number)
    }
}

/// Returns when a caller's streams end: with its token.
pub(crate) fn deadline(caller: &Principal) -> Instant {
    let left = caller.expires_at().micros().saturating_sub(Timestamp::now().micros());
    let left = Duration::from_micros(u64::try_from(left).unwrap_or(0));
    // A token may be valid for longer than the clock can count.
    Instant::now() + left.min(Duration::from_secs(10 * 365 * 24 * 3600))
}
