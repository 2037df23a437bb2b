//! The live end of the change log: one reader for the whole process, and a watch for each caller.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::broadcast,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Principal, Sight},
    error::Error,
    image::{ImageId, ImageInView, View},
    signals::Signals,
    store::{Change, SharedImage, Store},
    timestamp::Timestamp,
};

/// Where watches of images begin.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    store: Store,
    /// Bounded: a watch that falls behind by more reads what it has missed from the store, latest states only.
    live: broadcast::Sender<Arc<Changed>>,
    shutdown: CancellationToken,
}

/// A change, and the image without its configuration as it was when the change was read.
#[derive(Clone, Debug)]
struct Changed {
    change: Change,
    /// None when the image is gone.
    image: Option<SharedImage>,
}

/// A caller's view of the catalogue as it changes. Holds no more than a batch of images, without their configurations.
#[derive(Debug)]
pub(crate) struct ImageWatch {
    store: Store,
    live: broadcast::Receiver<Arc<Changed>>,
    shutdown: CancellationToken,
    expiry: Instant,
    sight: Sight,
    view: View,
    phase: Phase,
    /// Every change up to this revision has been delivered or is in `pending`.
    position: i64,
    pending: VecDeque<Notice>,
    last_sent: Instant,
}

#[derive(Debug)]
enum Phase {
    /// Sending the images as they are, in the order of their ids.
    FirstState { after: Option<ImageId> },
    /// Reading the change log from `position`; with `announce` the end of it is told.
    CatchUp { announce: bool },
    /// Waiting for changes.
    Live,
}

/// One message of a watch.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    /// Everything up to it has been delivered; 0 while the first state is incomplete.
    pub(crate) revision: i64,
    pub(crate) event: WatchEvent,
}

#[derive(Clone, Debug)]
pub(crate) enum WatchEvent {
    Image(ImageInView),
    Synced,
    Changed(ImageInView),
    Removed(ImageId),
    Bookmark,
}

impl Feed {
    const BACKLOG: usize = 1_024;
    const BATCH: u64 = 256;
    /// How long a lost hint can delay a change.
    const POLL: Duration = Duration::from_secs(1);

    pub(crate) fn new(store: Store, shutdown: CancellationToken) -> Self {
        Self { store, live: broadcast::Sender::new(Self::BACKLOG), shutdown }
    }

    /// Reads the change log as it grows and hands every change to the watches, until shutdown.
    pub(crate) async fn run(&self, signals: &Signals, mut position: i64) {
        let mut poll = interval(Self::POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = signals.changed() => {}
                _ = poll.tick() => {}
            }
            match self.publish_after(position).await {
                Ok(reached) => position = reached,
                Err(error) => {
                    tracing::warn!(%error, source = ?std::error::Error::source(&error), "cannot read the change log");
                }
            }
        }
    }

    async fn publish_after(&self, mut position: i64) -> Result<i64, Error> {
        loop {
            let changes = self.store.changes_after(position, Self::BATCH).await?;
            let Some(last) = changes.last() else {
                return Ok(position);
            };
            position = last.revision;
            if self.live.receiver_count() == 0 {
                // Whoever subscribes from here on reads the store afterwards.
                continue;
            }
            for changed in with_images(&self.store, changes).await? {
                // The last listener may have gone meanwhile.
                let _ = self.live.send(Arc::new(changed));
            }
        }
    }

    /// Begins a watch of all that the caller sees, or of what has changed since `after`.
    pub(crate) async fn watch(
        &self,
        caller: &Principal,
        after: Option<i64>,
        view: View,
    ) -> Result<ImageWatch, Error> {
        // Subscribe, then read: whatever is committed later than what is read here comes through the subscription.
        let live = self.live.subscribe();
        let revisions = self.store.revisions().await?;
        if after.is_some_and(|after| after < revisions.oldest || after > revisions.latest) {
            return Err(Error::RevisionUnavailable { oldest: revisions.oldest });
        }
        Ok(ImageWatch {
            store: self.store.clone(),
            live,
            shutdown: self.shutdown.clone(),
            expiry: deadline(caller),
            sight: caller.sight(),
            view,
            phase: match after {
                None => Phase::FirstState { after: None },
                Some(_) => Phase::CatchUp { announce: true },
            },
            position: after.unwrap_or(revisions.latest),
            pending: VecDeque::new(),
            last_sent: Instant::now(),
        })
    }

    /// The oldest revision that a watch can be resumed from.
    pub(crate) async fn oldest(&self) -> Result<i64, Error> {
        Ok(self.store.revisions().await?.oldest)
    }
}

impl ImageWatch {
    const PAGE: u64 = 100;
    /// How long a watch may be silent.
    const BOOKMARK: Duration = Duration::from_secs(10);

    /// Waits for the next message. After an error the watch is over.
    pub(crate) async fn next(&mut self) -> Result<Notice, Error> {
        loop {
            if self.shutdown.is_cancelled() {
                return Err(Error::Draining);
            }
            if self.expiry <= Instant::now() {
                return Err(Error::TokenExpired);
            }
            if let Some(notice) = self.pending.pop_front() {
                let event = self.in_view(notice.event).await?;
                self.last_sent = Instant::now();
                return Ok(Notice { revision: notice.revision, event });
            }
            match self.phase {
                Phase::FirstState { after } => self.read_page(after).await?,
                Phase::CatchUp { announce } => self.catch_up(announce).await?,
                Phase::Live => self.wait().await?,
            }
        }
    }

    async fn read_page(&mut self, after: Option<ImageId>) -> Result<(), Error> {
        let page = self.store.images_by_id(&self.sight, after, Self::PAGE).await?;
        self.phase = match page.last() {
            Some(last) => Phase::FirstState { after: Some(last.image.id) },
            None => {
                self.push(self.position, WatchEvent::Synced);
                Phase::Live
            }
        };
        for image in page {
            self.push(0, WatchEvent::Image(image));
        }
        Ok(())
    }

    async fn catch_up(&mut self, announce: bool) -> Result<(), Error> {
        let changes = self.store.changes_after(self.position, Feed::BATCH).await?;
        if changes.is_empty() {
            self.phase = Phase::Live;
            if announce {
                self.push(self.position, WatchEvent::Synced);
            }
        }
        for changed in with_images(&self.store, changes).await? {
            self.take(&changed);
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<(), Error> {
        tokio::select! {
            () = self.shutdown.cancelled() => {}
            () = tokio::time::sleep_until(self.expiry) => {}
            () = tokio::time::sleep_until(self.last_sent + Self::BOOKMARK) => {
                self.push(self.position, WatchEvent::Bookmark);
            }
            changed = self.live.recv() => match changed {
                Ok(changed) => self.take(&changed),
                Err(broadcast::error::RecvError::Lagged(_)) => self.phase = Phase::CatchUp { announce: false },
                Err(broadcast::error::RecvError::Closed) => return Err(Error::Draining),
            },
        }
        Ok(())
    }

    /// Takes one change in, if it is new; tells of it, if it is in sight.
    fn take(&mut self, changed: &Changed) {
        let Change { revision, image: id, creator, viewers } = &changed.change;
        if *revision <= self.position {
            return;
        }
        self.position = *revision;
        let seen = changed.image.as_ref().and_then(|shared| self.see(shared));
        let event = match seen {
            Some(image) => WatchEvent::Changed(image),
            // Only who could see it before is told that it is gone.
            None if self.could_see(creator, viewers) => WatchEvent::Removed(*id),
            None => return,
        };
        self.push(*revision, event);
    }

    /// The image as the caller sees it, if it does.
    fn see(&self, shared: &SharedImage) -> Option<ImageInView> {
        let granted = self.sight.subject().and_then(|subject| shared.grants.get(subject));
        let standing = self.sight.standing(&shared.image.creator, granted.copied().unwrap_or_default())?;
        let image = shared.image.clone();
        Some(ImageInView { actions: image.allowed_actions(standing), image, configuration: None })
    }

    fn could_see(&self, creator: &str, viewers: &BTreeSet<String>) -> bool {
        self.sight.subject().is_none_or(|subject| subject == creator || viewers.contains(subject))
    }

    /// Reads the configuration that the view asks for, only now: what waits to be sent is small.
    async fn in_view(&self, event: WatchEvent) -> Result<WatchEvent, Error> {
        let (WatchEvent::Image(image) | WatchEvent::Changed(image)) = &event else {
            return Ok(event);
        };
        if self.view == View::Basic {
            return Ok(event);
        }
        let id = image.image.id;
        match self.store.image(&self.sight, id, View::Full).await {
            Ok(full) if matches!(event, WatchEvent::Image(_)) => Ok(WatchEvent::Image(full)),
            Ok(full) => Ok(WatchEvent::Changed(full)),
            Err(Error::NotFound(_)) => Ok(WatchEvent::Removed(id)),
            Err(error) => Err(error),
        }
    }

    fn push(&mut self, revision: i64, event: WatchEvent) {
        self.pending.push_back(Notice { revision, event });
    }
}

/// Adds the images to changes, each read once, and leaves only the last change of each: of all whom any of them concerns.
///
/// An image may be read in a later state than the change that led to it: then that later change is in the log, too,
/// and brings the same state again.
async fn with_images(store: &Store, changes: Vec<Change>) -> Result<Vec<Changed>, Error> {
    let mut last: HashMap<ImageId, Change> = HashMap::new();
    for mut change in changes {
        if let Some(earlier) = last.remove(&change.image) {
            change.viewers.extend(earlier.viewers);
        }
        last.insert(change.image, change);
    }
    let ids: Vec<ImageId> = last.keys().copied().collect();
    let mut images = store.images_among(&ids).await?;
    let mut changed: Vec<Changed> =
        last.into_values().map(|change| Changed { image: images.remove(&change.image), change }).collect();
    changed.sort_unstable_by_key(|changed| changed.change.revision);
    Ok(changed)
}

/// When a caller's streams end: with its token.
pub(crate) fn deadline(caller: &Principal) -> Instant {
    let left = caller.expires_at().micros().saturating_sub(Timestamp::now().micros());
    let left = Duration::from_micros(u64::try_from(left).unwrap_or(0));
    // A token may be valid for longer than the clock can count.
    Instant::now() + left.min(Duration::from_secs(10 * 365 * 24 * 3600))
}
