//! Watches of images: each is one caller's live view of the catalogue.

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

/// The entry point for watches of images.
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

    /// Starts a watch of all matching images that the caller can see, or of changes since `after`.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RevisionUnavailable`] if the watch cannot be resumed from `after`, and the errors of
    /// [`Index::fresh`] and of the database.
    pub(crate) async fn watch(
        &self,
        caller: &Principal,
        query: Query,
        after: Option<Revision>,
        view: View,
    ) -> Result<ImageWatch, Error> {
        // Subscribe before reading: whatever is committed after the read arrives through the subscription.
        let events = self.index.subscribe();
        let latest = self.index.fresh().await?;
        if let Some(after) = after {
            self.store.changes_after(after, 1).await?;
        }
        Ok(ImageWatch::new(self, events, caller, query, after.unwrap_or(latest), after.is_some(), view))
    }
}

/// Returns the time at which a caller's streams end, which is the expiry of its token.
pub(crate) fn deadline(caller: &Principal) -> Instant {
    let left = caller.expires_at().micros().saturating_sub(Timestamp::now().micros());
    let left = Duration::from_micros(u64::try_from(left).unwrap_or(0));
    // A token may be valid for longer than the clock can represent.
    Instant::now() + left.min(Duration::from_secs(10 * 365 * 24 * 3600))
}
