//! One caller's live view of the catalogue.
//!
//! Messages are never older than [`ImageWatch::FRESH`], because the caller may have lost visibility of an
//! image while a message about it waited. If the caller reads more slowly, the watch discards what is
//! pending, returns to the last delivered revision and reads on from there, latest states only. A slow reader
//! therefore costs one batch of memory, and may miss intermediate states but never the last one.

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
    access::{Grantee, Principal, Visibility},
    change::Revision,
    error::Error,
    image::{ImageId, Query, View},
    index::{
        Batch, ChangeView, ChangedImage, Entry, Index, IndexEvent, Repair, SlotCursor, Viewer, VisibleImage,
    },
    store::Store,
};

/// An open watch. It holds at most one batch of images, without their configurations.
#[derive(Debug)]
pub(crate) struct ImageWatch {
    store: Store,
    index: Index,
    events: broadcast::Receiver<IndexEvent>,
    shutdown: CancellationToken,
    /// The shutdown future, created once: it is polled after every message, and there are many watches.
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Fires when the stream expires, or may have been silent for long enough.
    alarm: Pin<Box<Sleep>>,
    expiry: Instant,
    caller: Principal,
    visibility: Visibility,
    viewer: Viewer,
    query: Query,
    finder: Option<Finder<'static>>,
    view: View,
    phase: Phase,
    /// Revision up to which every change has been delivered or is in `pending`.
    position: Revision,
    /// Revision up to which every change has been delivered.
    delivered: Revision,
    /// Messages to be sent, as read at `read_at`.
    pending: VecDeque<Notice>,
    read_at: Instant,
    last_sent: Instant,
    /// Amount of text that was searched for the initial state and not reported yet, in bytes.
    searched: u64,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Transfer of the current images in slot order, from `next` on.
    FirstState { next: SlotCursor },
    /// Reading of the change log from `position`; with `announce`, reaching its end is reported.
    CatchUp { announce: bool },
    /// Waiting for events, which carry every change after `since` or report that some were missed.
    Live { since: i64 },
}

/// One message of a watch.
#[derive(Debug)]
pub(crate) struct Notice {
    /// Revision up to which everything was delivered; [`Revision::NONE`] in the initial state.
    pub(crate) revision: Revision,
    pub(crate) event: WatchEvent,
}

#[derive(Debug)]
pub(crate) enum WatchEvent {
    /// An image of the initial state, and the cursor that follows it.
    Image(ChangeView, SlotCursor),
    Synced,
    Changed(Arc<ChangeView>),
    Removed(ImageId),
    Bookmark,
}

impl ImageWatch {
    const PAGE: usize = 100;
    /// Number of changes read together from the change log.
    const CHANGES: u64 = 256;
    /// Number of images of the initial state that are written together.
    ///
    /// The watch keeps the memory that these take, although it needs less from then on.
    const WRITTEN_TOGETHER: usize = 8;
    /// Maximum time without a message, after which a bookmark is sent.
    const BOOKMARK: Duration = Duration::from_secs(10);
    /// Maximum age of a message when it is sent.
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
        let (expiry, visibility) = (deadline(caller), caller.visibility());
        Self {
            store: feed.store.clone(),
            index: feed.index.clone(),
            events,
            shutdown: feed.shutdown.clone(),
            draining: Box::pin(feed.shutdown.clone().cancelled_owned()),
            alarm: Box::pin(sleep_until(expiry.min(Instant::now() + Self::BOOKMARK))),
            expiry,
            caller: caller.clone(),
            viewer: Viewer::new(&visibility),
            visibility,
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
            searched: 0,
        }
    }

    pub(crate) fn caller(&self) -> &Principal {
        &self.caller
    }

    /// Returns the amount of text in bytes that was searched for the initial state since this was last called.
    pub(crate) fn take_searched(&mut self) -> u64 {
        std::mem::take(&mut self.searched)
    }

    /// Waits for the next message. The watch is over after an error.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TokenExpired`] when the caller's token expires, [`Error::Draining`] at shutdown,
    /// [`Error::RevisionUnavailable`] if the changes to be read were compacted, and the errors of the index
    /// and the database.
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
            // Checked after the pending messages, which are few, and here because a busy watch never polls
            // `draining`.
            if self.shutdown.is_cancelled() {
                return Err(Error::Draining);
            }
            match self.phase {
                // Boxed, so that the future of a waiting watch is small: there are many watches.
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

    /// Discards what was read and not sent, so that it is read again.
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
        let (page, searched) = self.index.by_slot(&self.caller, &self.query, next, Self::PAGE).await?;
        self.searched += searched;
        self.read_at = Instant::now();
        if page.is_empty() {
            // Frees the buffer: there may be many watches, and they have little to send from here on.
            self.pending = VecDeque::new();
            self.phase = Phase::Live { since: self.position.number };
            self.push(self.position, WatchEvent::Synced);
        }
        for (image, next) in page {
            self.push(Revision::NONE, WatchEvent::Image(ChangeView::new(image, None), next));
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
        // Set after the read: otherwise a slow read would look stale, and nothing would ever be sent.
        self.read_at = Instant::now();
        self.position = last;
        Ok(())
    }

    async fn wait(&mut self, since: i64) -> Result<(), Error> {
        tokio::select! {
            // Events come first: `next` checks whatever else is due after every event.
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
                    // Reads from here on are at least as new as any event in the channel.
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

    /// Reports whether a batch is fresh and contains all changes that this watch needs.
    fn can_take(&self, batch: &Batch, since: i64) -> bool {
        // Some of the changes that were merged into one may be from before `since`.
        let is_whole = |changed: &ChangedImage| changed.first > since || changed.revision.number <= since;
        batch.changes.iter().all(is_whole) && batch.read_at.elapsed() <= Self::FRESH
    }

    /// Applies a change if it is new, and reports it if the image is or was visible.
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

    /// Applies a repair, and reports it if the image is or was visible.
    fn take_repair(&mut self, repair: &Repair) {
        let could_see = || self.visible(repair.before.as_ref()).is_some();
        let show = |image| Arc::new(ChangeView::new(image, None));
        if let Some(event) = self.event(repair.id, repair.entry.as_ref(), show, could_see) {
            self.push(self.position, event);
        }
    }

    /// Returns the event to report for the current state of an image.
    ///
    /// A removal is reported only to a caller that could see the image before.
    fn event(
        &self,
        id: ImageId,
        entry: Option<&Arc<Entry>>,
        show: impl FnOnce(VisibleImage) -> Arc<ChangeView>,
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
        self.visibility.grantees().is_none_or(|own| {
            own.contains(&Grantee::Subject(creator.to_owned())) || !own.is_disjoint(grantees)
        })
    }

    /// Adds the configuration to a message just before it is sent, so that pending messages stay small.
    async fn in_full(&self, notice: Notice) -> Result<Notice, Error> {
        let Notice { revision, event } = notice;
        let id = match &event {
            WatchEvent::Image(shown, _) => shown.id(),
            WatchEvent::Changed(shown) => shown.id(),
            WatchEvent::Synced | WatchEvent::Removed(_) | WatchEvent::Bookmark => {
                return Ok(Notice { revision, event });
            }
        };
        let event = match self.index.image_in_full(&self.visibility, id).await {
            Ok((image, configuration)) => {
                let shown = ChangeView::new(image, Some(configuration));
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
