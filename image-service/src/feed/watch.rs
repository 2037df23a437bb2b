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

use tokio::{
    sync::broadcast,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{Batch, Changed, Feed, Told, deadline, shown::Shown, terms::LookingFor, with_images};
use crate::{
    access::{Principal, Sight, Standing, SubjectDigest},
    error::Error,
    image::{ImageId, ImageInView, Query, View},
    search::Term,
    store::{Change, KnownGrants, Revision, SharedImage, Store, With},
};

/// Holds no more than a batch of images, without their configurations.
#[derive(Debug)]
pub(crate) struct ImageWatch {
    store: Store,
    live: broadcast::Receiver<Told>,
    shutdown: CancellationToken,
    /// Waited for after every message, and made once: there are many watches.
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Goes off when the stream expires, or may have been silent for long enough.
    alarm: Pin<Box<Sleep>>,
    expiry: Instant,
    sight: Sight,
    /// Whose grants count; nobody's when everything is in sight.
    grantee: Option<SubjectDigest>,
    query: Query,
    looking_for: Option<LookingFor>,
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
    /// Sending the images as they are, in the order of their ids: this one was delivered last.
    FirstState { after: Option<ImageId> },
    /// Reading the change log from `position`; with `announce` the end of it is told.
    CatchUp { announce: bool },
    /// Waiting for changes after `since`: they are told here, all of them, or this watch is told that it has missed some.
    Live { since: i64 },
}

/// One message of a watch.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    /// Everything up to it has been delivered; nothing while the first state is incomplete.
    pub(crate) revision: Revision,
    pub(crate) event: WatchEvent,
}

#[derive(Clone, Debug)]
pub(crate) enum WatchEvent {
    Image(Box<ImageInView>),
    Synced,
    Changed(Arc<Shown>),
    Removed(ImageId),
    Bookmark,
}

impl ImageWatch {
    const PAGE: u64 = 100;
    /// How many images of the first state are written together: a watch keeps the room that this takes, and needs less of it
    /// from then on.
    const WRITTEN_TOGETHER: usize = 8;
    /// How long a watch may be silent.
    const BOOKMARK: Duration = Duration::from_secs(10);
    /// How old what is sent may be.
    const FRESH: Duration = Duration::from_secs(1);

    #[expect(clippy::too_many_arguments, reason = "it is made in one place")]
    pub(super) fn new(
        feed: &Feed,
        live: broadcast::Receiver<Told>,
        caller: &Principal,
        query: Query,
        looking_for: Option<LookingFor>,
        begin: Revision,
        resumes: bool,
        view: View,
    ) -> Self {
        let (expiry, sight) = (deadline(caller), caller.sight());
        Self {
            store: feed.store.clone(),
            live,
            shutdown: feed.shutdown.clone(),
            draining: Box::pin(feed.shutdown.clone().cancelled_owned()),
            alarm: Box::pin(sleep_until(expiry.min(Instant::now() + Self::BOOKMARK))),
            expiry,
            grantee: sight.subject().map(SubjectDigest::of),
            sight,
            query,
            looking_for,
            view,
            phase: if resumes {
                Phase::CatchUp { announce: true }
            } else {
                Phase::FirstState { after: None }
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
                if matches!(notice.event, WatchEvent::Image(_))
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
                Phase::FirstState { after } => Box::pin(self.read_page(after)).await?,
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
            WatchEvent::Image(image) => self.phase = Phase::FirstState { after: Some(image.image.id) },
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

    async fn read_page(&mut self, after: Option<ImageId>) -> Result<(), Error> {
        let page = self.store.images_by_id(&self.sight, &self.query, after, Self::PAGE).await?;
        self.read_at = Instant::now();
        if page.is_empty() {
            // There may be many watches, which have little to send from here on.
            self.pending = VecDeque::new();
            self.phase = Phase::Live { since: self.position.number };
            self.push(self.position, WatchEvent::Synced);
        }
        for image in page {
            self.push(Revision::NONE, WatchEvent::Image(Box::new(image)));
        }
        Ok(())
    }

    async fn catch_up(&mut self, announce: bool) -> Result<(), Error> {
        let terms: Arc<[Arc<Term>]> =
            self.looking_for.iter().map(|looking| Arc::clone(looking.term())).collect();
        let (mut unknown, wanted) = (KnownGrants::default(), || Some(With::of(&terms)));
        let position = self.position.number;
        let found =
            self.store.changes_after(position, Feed::READ_AT_ONCE, &mut unknown, || (), wanted).await?;
        let Some(last) = found.changes.last().map(|change| change.revision) else {
            self.read_at = Instant::now();
            self.phase = Phase::Live { since: self.position.number };
            if announce {
                self.push(self.position, WatchEvent::Synced);
            }
            return Ok(());
        };
        for changed in with_images(found, &terms) {
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
            told = self.live.recv() => match told {
                Ok(Told::Changed(batch)) if self.can_take(&batch, since) => {
                    self.read_at = batch.read_at;
                    for changed in &batch.changes {
                        self.take(changed);
                    }
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                    // What is read from here on is at least as new as whatever has been waiting.
                    self.live = self.live.resubscribe();
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
        let is_known = self.looking_for.as_ref().is_none_or(|looking| batch.terms.contains(looking.term()));
        // Of the changes that one stands for some may be from before.
        let is_whole = |changed: &Changed| changed.first > since || changed.change.revision.number <= since;
        is_known && batch.changes.iter().all(is_whole) && batch.read_at.elapsed() <= Self::FRESH
    }

    /// Takes one change in, if it is new; tells of it, if it is in sight.
    fn take(&mut self, changed: &Changed) {
        let Change { revision, image: id, creator, viewers, at: _ } = &changed.change;
        if revision.number <= self.position.number {
            return;
        }
        self.position = *revision;
        let event = match changed.image.as_ref().and_then(|shared| Some((shared, self.standing(shared)?))) {
            Some((shared, standing)) if self.matches(shared, changed) => {
                WatchEvent::Changed(changed.shown.show(&shared.image, standing))
            }
            Some(_) => WatchEvent::Removed(*id),
            // Only who could see it before is told that it is gone.
            None if self.could_see(creator, viewers) => WatchEvent::Removed(*id),
            None => return,
        };
        self.push(*revision, event);
    }

    fn matches(&self, shared: &SharedImage, changed: &Changed) -> bool {
        let holds = |looking: &LookingFor| changed.holds.contains(looking.term());
        self.query.admits(&shared.image) && self.looking_for.as_ref().is_none_or(holds)
    }

    /// What the caller is to the image, if it sees it.
    fn standing(&self, shared: &SharedImage) -> Option<Standing> {
        let granted = self.grantee.and_then(|grantee| shared.grants.get(&grantee));
        self.sight.standing(&shared.image.creator, granted.copied().unwrap_or_default())
    }

    fn could_see(&self, creator: &str, viewers: &BTreeSet<String>) -> bool {
        self.sight.subject().is_none_or(|subject| subject == creator || viewers.contains(subject))
    }

    /// Reads the configuration, only now: what waits to be sent is small.
    async fn in_full(&self, notice: Notice) -> Result<Notice, Error> {
        let Notice { revision, event } = notice;
        let id = match &event {
            WatchEvent::Image(image) => image.image.id,
            WatchEvent::Changed(shown) => shown.id(),
            WatchEvent::Synced | WatchEvent::Removed(_) | WatchEvent::Bookmark => {
                return Ok(Notice { revision, event });
            }
        };
        let event = match self.store.image(&self.sight, id, View::Full).await {
            Ok(full) if matches!(event, WatchEvent::Image(_)) => WatchEvent::Image(Box::new(full)),
            Ok(full) => WatchEvent::Changed(Arc::new(Shown::new(full))),
            Err(Error::NotFound(_)) => WatchEvent::Removed(id),
            Err(error) => return Err(error),
        };
        Ok(Notice { revision, event })
    }

    fn push(&mut self, revision: Revision, event: WatchEvent) {
        self.pending.push_back(Notice { revision, event });
    }
}
