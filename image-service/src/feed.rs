//! The live end of the change log: one reader for the whole process, and a watch for each caller.

use std::{collections::HashMap, sync::Arc, time::Duration};

use opentelemetry::metrics::Histogram;
use tokio::{
    sync::broadcast,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Principal,
    error::Error,
    image::{ImageId, Query, View},
    search::Term,
    signals::Signals,
    store::{Change, Changes, KnownGrants, SharedImage, Store, With},
    timestamp::Timestamp,
};

pub(crate) use crate::store::Revision;

use self::{shown::ByStanding, terms::Terms};
pub(crate) use self::{
    shown::Encoded,
    watch::{ImageWatch, Notice, WatchEvent},
};

mod shown;
mod terms;
mod watch;

/// Where watches of images begin.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    store: Store,
    /// Bounded: a watch that falls behind by more reads what it has missed from the store, latest states only.
    live: broadcast::Sender<Told>,
    terms: Arc<Terms>,
    lag: Histogram<f64>,
    shutdown: CancellationToken,
}

/// What the reader of the change log tells the watches.
#[derive(Clone, Debug)]
enum Told {
    Changed(Arc<Batch>),
    /// Changes were forgotten before they could be told: whoever was waiting for them finds out by itself.
    Forgotten,
}

/// Changes that were read together, in the order of their revisions: every watch wakes up for all of them once.
#[derive(Debug)]
struct Batch {
    changes: Vec<Changed>,
    /// The terms that were looked for.
    terms: Arc<[Arc<Term>]>,
    read_at: Instant,
}

/// A change, and the image without its configuration as it was when the change was read.
#[derive(Debug)]
struct Changed {
    change: Change,
    /// None when the image is gone.
    image: Option<SharedImage>,
    shown: ByStanding,
    /// The first of the changes that this one stands for.
    first: i64,
    /// The terms that were looked for and that the image holds.
    holds: Vec<Arc<Term>>,
}

impl Feed {
    /// Batches.
    const BACKLOG: usize = 256;
    const TOLD_AT_ONCE: usize = 32;
    const READ_AT_ONCE: u64 = 256;
    /// How long a lost hint can delay a change.
    const POLL: Duration = Duration::from_millis(500);

    pub(crate) fn new(store: Store, shutdown: CancellationToken) -> Self {
        let lag = opentelemetry::global::meter(crate::PROGRAM)
            .f64_histogram("trailer.feed.lag")
            .with_unit("s")
            .with_description("How long after a change was made the watches here were told of it")
            .with_boundaries(vec![0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0])
            .build();
        Self { store, live: broadcast::Sender::new(Self::BACKLOG), terms: Arc::default(), lag, shutdown }
    }

    /// Reads the change log as it grows and hands every change to the watches, until shutdown.
    pub(crate) async fn run(&self, signals: &Signals, mut position: i64) {
        let mut poll = interval(Self::POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known = KnownGrants::default();
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = signals.changed() => {}
                _ = poll.tick() => {}
            }
            match self.publish_after(position, &mut known).await {
                Ok(reached) => position = reached,
                Err(Error::RevisionUnavailable { oldest }) => {
                    tracing::warn!(position, oldest, "changes were forgotten before they were told");
                    position = oldest;
                    known = KnownGrants::default();
                    let _ = self.live.send(Told::Forgotten);
                }
                Err(error) => {
                    tracing::warn!(%error, source = ?std::error::Error::source(&error), "cannot read the change log");
                }
            }
        }
    }

    async fn publish_after(&self, mut position: i64, known: &mut KnownGrants) -> Result<i64, Error> {
        loop {
            let (mut read_at, mut terms) = (Instant::now(), None);
            let begins = || read_at = Instant::now();
            // After the changes were read: whoever subscribes from here on reads the store afterwards.
            let wanted =
                || (self.live.receiver_count() > 0).then(|| With::of(terms.insert(self.terms.all())));
            let found = self.store.changes_after(position, Self::READ_AT_ONCE, known, begins, wanted).await?;
            let Some(last) = found.changes.last() else {
                return Ok(position);
            };
            let (reached, changed_at) = (last.revision.number, last.at);
            if let Some(terms) = terms {
                let mut left = with_images(found, &terms).into_iter();
                while left.len() > 0 {
                    let changes = left.by_ref().take(Self::TOLD_AT_ONCE).collect();
                    let batch = Batch { changes, terms: Arc::clone(&terms), read_at };
                    // The last listener may have gone meanwhile.
                    let _ = self.live.send(Told::Changed(Arc::new(batch)));
                }
            }
            // By the clock of the database, where it has one, and this machine's.
            let lag = Timestamp::now().micros().saturating_sub(changed_at.micros());
            self.lag.record(Duration::from_micros(u64::try_from(lag).unwrap_or(0)).as_secs_f64(), &[]);
            position = reached;
        }
    }

    /// Begins a watch of all that the caller sees and that matches, or of what has changed since `after`.
    pub(crate) async fn watch(
        &self,
        caller: &Principal,
        query: Query,
        after: Option<Revision>,
        view: View,
    ) -> Result<ImageWatch, Error> {
        // Subscribe, then read: whatever is committed later than what is read here comes through the subscription.
        let term = query.search.clone().map(|term| self.terms.look_for(term));
        let live = self.live.subscribe();
        let begin = match after {
            Some(after) => self.store.resume_from(after).await?,
            None => self.store.revisions().await?.latest,
        };
        Ok(ImageWatch::new(self, live, caller, query, term, begin, after.is_some(), view))
    }

    /// The oldest revision that a watch can be resumed from.
    pub(crate) async fn oldest(&self) -> Result<i64, Error> {
        Ok(self.store.revisions().await?.oldest.number)
    }
}

impl With {
    fn of(terms: &Arc<[Arc<Term>]>) -> Self {
        if terms.is_empty() { Self::Images } else { Self::Texts }
    }
}

/// Adds the images to changes, and leaves only the last change of each: of all whom any of them concerns.
///
/// An image may be read in a later state than the change that led to it: then that later change is in the log, too,
/// and brings the same state again.
fn with_images(found: Changes, terms: &[Arc<Term>]) -> Vec<Changed> {
    let Changes { changes, mut images } = found;
    let mut last: HashMap<ImageId, (i64, Change)> = HashMap::new();
    for mut change in changes {
        let mut first = change.revision.number;
        if let Some((earliest, earlier)) = last.remove(&change.image) {
            first = earliest;
            change.viewers.extend(earlier.viewers);
        }
        last.insert(change.image, (first, change));
    }
    let mut changed: Vec<Changed> = last
        .into_values()
        .map(|(first, change)| {
            let image = images.remove(&change.image);
            let text = image.as_ref().and_then(|image| image.text.as_deref()).unwrap_or_default();
            let holds = terms.iter().filter(|term| text.contains(term.as_str())).cloned().collect();
            Changed { image, shown: ByStanding::default(), change, first, holds }
        })
        .collect();
    changed.sort_unstable_by_key(|changed| changed.change.revision.number);
    changed
}

/// When a caller's streams end: with its token.
pub(crate) fn deadline(caller: &Principal) -> Instant {
    let left = caller.expires_at().micros().saturating_sub(Timestamp::now().micros());
    let left = Duration::from_micros(u64::try_from(left).unwrap_or(0));
    // A token may be valid for longer than the clock can count.
    Instant::now() + left.min(Duration::from_secs(10 * 365 * 24 * 3600))
}
