//! One caller's view of the catalogue as it changes.
//!
//! What is sent is never older than [`ImageWatch::FRESH`]: whoever reads more slowly is not sent what has been waiting, for it
//! may have lost sight of it; the watch goes back to what was delivered last and reads on from there, latest states only.
//! So a slow reader costs a batch of memory, and misses states in between, but never the last one.

use std::{
    collections::{BTreeSet, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use memchr::memmem::Finder;
use tokio::{
    sync::broadcast,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{Feed, deadline};
use crate::{
    access::{Grantee, Principal, Sight},
    change::Revision,
    error::Error,
    image::{ImageId, Query, View},
    index::{Batch, ChangedImage, Entry, Index, IndexEvent, Repair, Shown, SlotCursor, Viewer, VisibleImage},
    store::Store,
};

/// Holds no more than a batch of images, without their configurations.
#[derive(Debug)]
pub(crate) struct ImageWatch {
    store: Store,
    index: Index,
    events: broadcast::Receiver<IndexEvent>,
    shutdown: CancellationToken,
    /// Waited for after every message, and made once: there are many watches.
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Goes off when the stream expires, or may have been silent for long enough.
    alarm: Pin<Box<Sleep>>,
    expiry: Instant,
    caller: Principal,
    sight: Sight,
    viewer: Viewer,
    query: Query,
    finder: Option<Finder<'static>>,
    view: View,
    phase: Phase,
    /// Every change up to here has been delivered or is in `pending`.
    position: Revision,
    /// Every change up to here has been delivered.
    delivered: Revision,
    /// What is to be sent, and when it was read.
    pending: VecDeque<Notice>,
    read_at: Instant,
    last_sent: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Sending the images as they are, in the order of their slots, of which this is the next.
    FirstState { next: SlotCursor },
    /// Reading the change log from `position`; with `announce` the end of it is told.
    CatchUp { announce: bool },
    /// Waiting for changes after `since`: they are told here, all of them, or this watch is told that it has missed some.
    Live { since: i64 },
}

/// One message of a watch.
#[derive(Debug)]
pub(crate) struct Notice {
    /// Everything up to it has been delivered; nothing while the first state is incomplete.
    pub(crate) revision: Revision,
    pub(crate) event: WatchEvent,
}

#[derive(Debug)]
pub(crate) enum WatchEvent {
    /// An image of the first state, and the place behind it.
    Image(Shown, SlotCursor),
    Synced,
    Changed(Arc<Shown>),
    Removed(ImageId),
    Bookmark,
}

impl ImageWatch {
    const PAGE: usize = 100;
    /// The number of changes that are read together from the log.
    const CHANGES: u64 = 256;
    /// How many images of the first state are written together: a watch keeps the room that this takes, and needs less of it
    /// from then on.
    const WRITTEN_TOGETHER: usize = 8;
    /// How long a watch may be silent.
    const BOOKMARK: Duration = Duration::from_secs(10);
    /// How old what is sent may be.
    const FRESH: Duration = Duration::from_secs(1);

    pub(super) fn new(
        feed: &Feed,
        events: broadcast::Receiver<IndexEvent>,
        caller: &Principal,
        query: Query,
        begin: Revision,
        resumes: bool,
        view: View,
    ) -> Self {
        let (expiry, sight) = (deadline(caller), caller.sight());
        Self {
            store: feed.store.clone(),
            index: feed.index.clone(),
            events,
            shutdown: feed.shutdown.clone(),
            draining: Box::pin(feed.shutdown.clone().cancelled_owned()),
            alarm: Box::pin(sleep_until(expiry.min(Instant::now() + Self::BOOKMARK))),
            expiry,
            caller: caller.clone(),
            viewer: Viewer::new(&sight),
            sight,
            finder: query.search.as_ref().map(|term| Finder::new(term.as_str()).into_owned()),
            query,
            view,
            phase: if resumes {
                Phase::CatchUp { announce: true }
            } else {
                Phase::FirstState { next: feed.index.first_slot() }
            },
            position: begin,
            delivered: begin,
            pending: VecDeque::new(),
            read_at: Instant::now(),
            last_sent: Instant::now(),
        }
    }

    /// Waits for the next message. After an error the watch is over.
    pub(crate) async fn next(&mut self) -> Result<Notice, Error> {
        loop {
            let now = Instant::now();
            if self.expiry <= now {
                return Err(Error::TokenExpired);
            }
            if !self.pending.is_empty() && now - self.read_at > Self::FRESH {
                self.go_back();
            }
            if let Some(notice) = self.pending.pop_front() {
                let notice = self.deliver(notice, now);
                if matches!(notice.event, WatchEvent::Image(..))
                    && self.pending.len().is_multiple_of(Self::WRITTEN_TOGETHER)
                {
                    tokio::task::yield_now().await;
                }
                return match self.view {
                    View::Basic => Ok(notice),
                    View::Full => Box::pin(self.in_full(notice)).await,
                };
            }
            // After what is to be sent, which is little, and looked at for every message.
            if self.shutdown.is_cancelled() {
                return Err(Error::Draining);
            }
            match self.phase {
                // Apart, so that what waits for a change is small: there are many watches.
                Phase::FirstState { next } => Box::pin(self.read_page(next)).await?,
                Phase::CatchUp { announce } => Box::pin(self.catch_up(announce)).await?,
                Phase::Live { .. } if now - self.last_sent >= Self::BOOKMARK => {
                    (self.read_at, self.last_sent) = (now, now);
                    self.push(self.position, WatchEvent::Bookmark);
                }
                Phase::Live { since } => self.wait(since).await?,
            }
        }
    }

    fn deliver(&mut self, notice: Notice, now: Instant) -> Notice {
        match &notice.event {
            WatchEvent::Image(_, next) => self.phase = Phase::FirstState { next: *next },
            WatchEvent::Synced | WatchEvent::Changed(_) | WatchEvent::Removed(_) | WatchEvent::Bookmark => {
                self.delivered = notice.revision;
            }
        }
        self.last_sent = now;
        notice
    }

    /// Forgets what was read and not sent: it is read again.
    fn go_back(&mut self) {
        let announces = matches!(self.phase, Phase::CatchUp { announce: true })
            || self.pending.iter().any(|notice| matches!(notice.event, WatchEvent::Synced));
        self.pending.clear();
        if !matches!(self.phase, Phase::FirstState { .. }) {
            self.position = self.delivered;
            self.phase = Phase::CatchUp { announce: announces };
        }
    }

    async fn read_page(&mut self, next: SlotCursor) -> Result<(), Error> {
        let page = self.index.by_slot(&self.caller, &self.query, next, Self::PAGE).await?;
        self.read_at = Instant::now();
        if page.is_empty() {
            // There may be many watches, which have little to send from here on.
            self.pending = VecDeque::new();
            self.phase = Phase::Live { since: self.position.number };
            self.push(self.position, WatchEvent::Synced);
        }
        for (image, next) in page {
            self.push(Revision::NONE, WatchEvent::Image(Shown::new(image, None), next));
        }
        Ok(())
    }

    async fn catch_up(&mut self, announce: bool) -> Result<(), Error> {
        let changes = self.store.changes_after(self.position, Self::CHANGES).await?;
        let Some(last) = changes.last().map(|change| change.revision) else {
            self.read_at = Instant::now();
            self.phase = Phase::Live { since: self.position.number };
            if announce {
                self.push(self.position, WatchEvent::Synced);
            }
            return Ok(());
        };
        self.index.reached(last).await?;
        for changed in ChangedImage::merge(changes, |id| self.index.entry(id)) {
            self.take(&changed);
        }
        // A read that takes long must not be taken for one that has been waiting, or nothing would ever be sent.
        self.read_at = Instant::now();
        self.position = last;
        Ok(())
    }

    async fn wait(&mut self, since: i64) -> Result<(), Error> {
        tokio::select! {
            // While there are changes nothing else is waited for: what is due is looked at with every change.
            biased;
            event = self.events.recv() => match event {
                Ok(IndexEvent::Changed(batch)) if self.can_take(&batch, since) => {
                    self.read_at = batch.read_at;
                    for changed in &batch.changes {
                        self.take(changed);
                    }
                }
                Ok(IndexEvent::Repaired(repairs)) => {
                    self.read_at = Instant::now();
                    for repair in repairs.iter() {
                        self.take_repair(repair);
                    }
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                    // What is read from here on is at least as new as whatever has been waiting.
                    self.events = self.events.resubscribe();
                    self.phase = Phase::CatchUp { announce: false };
                }
                Err(broadcast::error::RecvError::Closed) => return Err(Error::Draining),
            },
            () = &mut self.draining => return Err(Error::Draining),
            () = &mut self.alarm => {
                self.alarm.as_mut().reset(self.expiry.min(self.last_sent + Self::BOOKMARK));
            }
        }
        Ok(())
    }

    /// Whether live changes are fresh and say what this watch needs to know.
    fn can_take(&self, batch: &Batch, since: i64) -> bool {
        // Of the changes that one stands for some may be from before.
        let is_whole = |changed: &ChangedImage| changed.first > since || changed.revision.number <= since;
        batch.changes.iter().all(is_whole) && batch.read_at.elapsed() <= Self::FRESH
    }

    /// Takes one change in, if it is new; tells of it, if it is in sight.
    fn take(&mut self, changed: &ChangedImage) {
        let revision = changed.revision;
        if revision.number <= self.position.number {
            return;
        }
        self.position = revision;
        let could_see = || self.could_see(&changed.creator, &changed.grantees);
        let show = |image| changed.shown.show(image);
        if let Some(event) = self.event(changed.id, changed.entry.as_ref(), show, could_see) {
            self.push(revision, event);
        }
    }

    /// Takes in how an image is that was not as in the database; reports it, if it is or was in sight.
    fn take_repair(&mut self, repair: &Repair) {
        let could_see = || self.visible(repair.before.as_ref()).is_some();
        let show = |image| Arc::new(Shown::new(image, None));
        if let Some(event) = self.event(repair.id, repair.entry.as_ref(), show, could_see) {
            self.push(self.position, event);
        }
    }

    /// Returns what to report of an image as it is now. That it is gone, only a caller is told that could see it before.
    fn event(
        &self,
        id: ImageId,
        entry: Option<&Arc<Entry>>,
        show: impl FnOnce(VisibleImage) -> Arc<Shown>,
        could_see: impl FnOnce() -> bool,
    ) -> Option<WatchEvent> {
        match self.visible(entry) {
            Some(image) if self.matches(&image.entry) => Some(WatchEvent::Changed(show(image))),
            Some(_) => Some(WatchEvent::Removed(id)),
            None => could_see().then_some(WatchEvent::Removed(id)),
        }
    }

    fn visible(&self, entry: Option<&Arc<Entry>>) -> Option<VisibleImage> {
        let entry = entry?;
        let standing = self.viewer.standing(entry)?;
        Some(VisibleImage { entry: Arc::clone(entry), standing })
    }

    fn matches(&self, entry: &Entry) -> bool {
        self.query.admits(&entry.image)
            && self.finder.as_ref().is_none_or(|finder| self.index.holds(entry, finder))
    }

    fn could_see(&self, creator: &str, grantees: &BTreeSet<Grantee>) -> bool {
        self.sight.grantees().is_none_or(|own| {
            own.contains(&Grantee::Subject(creator.to_owned())) || !own.is_disjoint(grantees)
        })
    }

    /// Reads the configuration, only now: what waits to be sent is small.
    async fn in_full(&self, notice: Notice) -> Result<Notice, Error> {
        let Notice { revision, event } = notice;
        let id = match &event {
            WatchEvent::Image(shown, _) => shown.id(),
            WatchEvent::Changed(shown) => shown.id(),
            WatchEvent::Synced | WatchEvent::Removed(_) | WatchEvent::Bookmark => {
                return Ok(Notice { revision, event });
            }
        };
        let event = match self.index.image_in_full(&self.sight, id).await {
            Ok((image, configuration)) => {
                let shown = Shown::new(image, Some(configuration));
                match event {
                    WatchEvent::Image(_, next) => WatchEvent::Image(shown, next),
                    WatchEvent::Changed(_)
                    | WatchEvent::Synced
                    | WatchEvent::Removed(_)
                    | WatchEvent::Bookmark => WatchEvent::Changed(Arc::new(shown)),
                }
            }
            Err(Error::NotFound(_)) => WatchEvent::Removed(id),
            Err(error) => return Err(error),
        };
        Ok(Notice { revision, event })
    }

    fn push(&mut self, revision: Revision, event: WatchEvent) {
        self.pending.push_back(Notice { revision, event });
    }
}
