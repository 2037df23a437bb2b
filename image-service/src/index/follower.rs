//! The only reader of the change log, which keeps the index up to date and notifies the watches.

use std::{collections::BTreeSet, error::Error as _, sync::Arc, time::Duration};

use opentelemetry::metrics::{Counter, Gauge, Histogram};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    Index, State,
    batch::{Batch, ChangedImage, IndexEvent},
    entry::Entry,
    loader,
    signatures::Trigrams,
    verifier::Suspects,
};
use crate::{
    change::Revision,
    error::Error,
    image::{CatalogueEntry, ImageId},
    signals::Signals,
    store::{ChangedRecords, Store},
    timestamp::Timestamp,
};

/// Polling interval, which is the maximum delay of a change whose hint was lost.
const POLL: Duration = Duration::from_millis(500);
/// Number of changes read together.
const READ_BATCH: u64 = 256;
/// Maximum number of changed images per event.
const MAX_EVENT_CHANGES: usize = 32;

/// The new entry of an image, with the trigrams of a changed text; `None` for a deleted image.
pub(super) type Update = (ImageId, Option<(Arc<Entry>, Option<Trigrams>)>);

#[derive(Debug)]
struct Instruments {
    lag: Histogram<f64>,
    images: Gauge<u64>,
    memory: Gauge<u64>,
    differences: Counter<u64>,
}

impl Instruments {
    fn new() -> Self {
        let meter = opentelemetry::global::meter(crate::PROGRAM);
        Self {
            lag: meter
                .f64_histogram("trailer.index.lag")
                .with_unit("s")
                .with_description("Time from a change until the index of this replica contains it")
                .with_boundaries(vec![0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0])
                .build(),
            images: meter
                .u64_gauge("trailer.index.images")
                .with_unit("{image}")
                .with_description("Images in the index")
                .build(),
            memory: meter
                .u64_gauge("trailer.index.memory")
                .with_unit("By")
                .with_description("Memory that the index takes, as counted against --index-memory")
                .build(),
            differences: meter
                .u64_counter("trailer.index.differences")
                .with_unit("{image}")
                .with_description("Images that were not in the index as in the database, and were repaired")
                .build(),
        }
    }
}

impl Index {
    /// Loads the index and keeps it up to date until shutdown.
    pub(crate) async fn run(self, signals: Arc<Signals>, shutdown: CancellationToken) {
        let instruments = Instruments::new();
        let (suspects, mut suspected) = mpsc::channel(1);
        let following = async {
            loop {
                match self.load().await {
                    Ok(at) => {
                        if !self.follow(at, &signals, &mut suspected, &instruments).await {
                            sleep(POLL).await;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, source = ?error.source(), "cannot load the catalogue");
                        sleep(POLL).await;
                    }
                }
                self.0.serves.send_replace(false);
            }
        };
        let both = async { tokio::join!(following, self.verify(suspects)) };
        shutdown.run_until_cancelled(both).await;
    }

    /// Loads all images, and returns the revision from which to follow the change log.
    async fn load(&self) -> Result<Revision, Error> {
        let begun = Instant::now();
        self.0.state.send_modify(|state| state.at = None);
        let at = self.0.store.latest_revision().await?;
        let mut images = loader::load(&self.0.store).await?;
        let count = images.len();
        let before = {
            let mut current = self.images_mut();
            images.load = current.load + 1;
            std::mem::replace(&mut *current, images)
        };
        // The database may have been restored from a backup and have reused revisions.
        self.0.configurations.clear();
        // Dropping takes a while, and nothing has to wait for it.
        tokio::task::spawn_blocking(move || drop(before));
        tracing::info!(images = count, seconds = begun.elapsed().as_secs_f64(), "the catalogue is loaded");
        Ok(at)
    }

    /// Follows the change log from a revision on, until the database no longer contains that revision.
    ///
    /// Returns `true` if it has served in between.
    async fn follow(
        &self,
        mut at: Revision,
        signals: &Signals,
        suspected: &mut mpsc::Receiver<Suspects>,
        instruments: &Instruments,
    ) -> bool {
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_response = Instant::now();
        let mut is_loaded = false;
        loop {
            let mut suspects = Suspects::new();
            tokio::select! {
                () = signals.changed() => {}
                () = self.0.wanted.notified() => {}
                _ = poll.tick() => {}
                Some(some) = suspected.recv(), if is_loaded => suspects = some,
            }
            let caught_up = async {
                self.catch_up(&mut at, instruments, is_loaded).await?;
                if suspects.is_empty() {
                    Ok(())
                } else {
                    self.repair(&suspects, at, &instruments.differences).await
                }
            };
            match caught_up.await {
                Ok(()) => {
                    last_response = Instant::now();
                    if !is_loaded {
                        is_loaded = true;
                        self.0.state.send_modify(|state| {
                            *state = State { load: state.load + 1, at: Some(at) };
                        });
                        let _ = self.0.events.send(IndexEvent::Reloaded);
                    }
                    self.0.serves.send_if_modified(|serves| !std::mem::replace(serves, true));
                }
                Err(Error::RevisionUnavailable { oldest }) => {
                    tracing::error!(
                        revision = at.number,
                        oldest,
                        "the database is not the one that was read, or has compacted changes too early: the catalogue is \
                         loaded anew"
                    );
                    return is_loaded;
                }
                Err(error) => {
                    tracing::warn!(%error, source = ?error.source(), "cannot read the change log");
                    if last_response.elapsed() > Store::OUTAGE
                        && self.0.serves.send_if_modified(|serves| std::mem::replace(serves, false))
                    {
                        tracing::error!("the catalogue lags behind; health is NOT_SERVING");
                    }
                }
            }
            let images = self.images();
            instruments.images.record(images.len() as u64, &[]);
            instruments.memory.record(images.bytes() as u64, &[]);
        }
    }

    /// Reads the change log to its end.
    async fn catch_up(
        &self,
        at: &mut Revision,
        instruments: &Instruments,
        is_loaded: bool,
    ) -> Result<(), Error> {
        loop {
            let read_at = Instant::now();
            let is_known = |id| self.images().get(id).is_some();
            let found = self.0.store.changed_records(*at, READ_BATCH, is_known).await?;
            let Some(last) = found.changes.last() else {
                return Ok(());
            };
            let (reached, changed_at) = (last.revision, last.at);
            let is_all = (found.changes.len() as u64) < READ_BATCH;
            self.apply(found, reached, is_loaded, read_at);
            *at = reached;
            // Measured between the clock of the database, if it has one, and that of this machine.
            let lag = Timestamp::now().micros().saturating_sub(changed_at.micros());
            let lag = Duration::from_micros(u64::try_from(lag).unwrap_or(0));
            instruments.lag.record(lag.as_secs_f64(), &[]);
            if is_all {
                return Ok(());
            }
        }
    }

    /// Applies changes to the images, and notifies the watches.
    fn apply(&self, found: ChangedRecords, reached: Revision, is_loaded: bool, read_at: Instant) {
        let ChangedRecords { changes, mut images } = found;
        let ids: BTreeSet<ImageId> = changes.iter().map(|change| change.image).collect();
        self.put(ids.into_iter().map(|id| (id, images.remove(&id))));
        if !is_loaded {
            return;
        }
        if self.0.events.receiver_count() > 0 {
            let mut changes = ChangedImage::merge(changes, |id| self.entry(id)).into_iter();
            while changes.len() > 0 {
                let changes = changes.by_ref().take(MAX_EVENT_CHANGES).collect();
                // The last subscriber may be gone by now.
                let _ = self.0.events.send(IndexEvent::Changed(Arc::new(Batch { changes, read_at })));
            }
        }
        self.0.state.send_modify(|state| state.at = Some(reached));
    }

    /// Stores the images that were read, and removes those that were not found.
    ///
    /// Only the follower, the single writer of the images, may call this.
    pub(super) fn put(&self, read: impl IntoIterator<Item = (ImageId, Option<CatalogueEntry>)>) {
        let updates: Vec<Update> = read.into_iter().map(|(id, read)| (id, self.update(id, read))).collect();
        let due: BTreeSet<u32> = {
            let mut images = self.images_mut();
            let due = updates.into_iter().filter_map(|(id, update)| match update {
                Some((entry, trigrams)) => images.put(entry, trigrams.as_ref()),
                None => images.remove(id),
            });
            due.collect()
        };
        for block in due {
            let entries = self.images().in_block(block);
            let trigrams = Trigrams::new(entries.iter().map(|entry| entry.text()));
            self.images_mut().replace_signature(block, &trigrams);
        }
    }

    fn update(&self, id: ImageId, read: Option<CatalogueEntry>) -> Option<(Arc<Entry>, Option<Trigrams>)> {
        let read = read?;
        let before = self.entry(id);
        let has_text = read.text.is_some() || before.is_none();
        let entry = Entry::new(read, before.as_deref());
        let is_another = has_text && before.is_none_or(|before| before.text() != entry.text());
        let trigrams = is_another.then(|| Trigrams::new([entry.text()]));
        Some((Arc::new(entry), trigrams))
    }
}
