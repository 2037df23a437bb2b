//! An in-memory copy of every image as of one revision, from which reads are served.
//!
//! The database is the source of truth. The index loads from it at startup and then [follows](follower) its
//! change log; the same reader feeds the watches.
//!
//! Invariants:
//! - A read sees everything committed before it began: it [waits](Index::fresh) until the index has caught
//!   up, and fails with `UNAVAILABLE` rather than return stale data.
//! - Visibility is decided in one place, [`Viewer::standing`].
//! - The lock on the images is never held for longer than one bounded chunk of work.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use memchr::memmem::Finder;
use tokio::sync::{Notify, broadcast, watch};

use self::{
    configurations::Configurations,
    consistency::RevisionProbe,
    filter::Filter,
    images::Images,
    scan::{CountScan, FoundPage, PageScan, SlotScan},
    scan_scheduler::Scans,
    text::LastText,
};
use crate::{
    access::{Principal, Visibility},
    change::Revision,
    error::{Error, Resource},
    image::{Image, ImageId, Position, Query},
    search::{Part, Term},
    store::Store,
};

pub(crate) use self::{
    batch::{Batch, ChangedImage, IndexEvent, Repair},
    change_view::{ChangeView, Encoded},
    configurations::CachedConfiguration,
    entry::{Entry, Viewer, VisibleImage},
};

mod batch;
mod candidates;
mod change_view;
mod columns;
mod configurations;
mod consistency;
mod entry;
mod filter;
mod follower;
mod images;
mod loader;
mod order;
mod scan;
mod scan_scheduler;
mod selection;
mod signatures;
mod slot_set;
mod text;
mod verifier;

/// A shared handle to the index.
#[derive(Clone, Debug)]
pub(crate) struct Index(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    images: RwLock<Images>,
    state: watch::Sender<State>,
    /// Set while the index serves reads; reported by the health service.
    serves: watch::Sender<bool>,
    /// Bounded: a watch that lags further behind reads the change log instead, latest states only.
    events: broadcast::Sender<IndexEvent>,
    /// Wakes the follower.
    wanted: Notify,
    probe: RevisionProbe,
    scans: Scans,
    configurations: Configurations,
    texts: LastText,
}

/// The progress of the index.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct State {
    /// Number of times the index was loaded.
    load: u64,
    /// Revision that the index has reached; `None` while it loads.
    at: Option<Revision>,
}

/// A position in slot order.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlotCursor {
    load: u64,
    slot: u32,
}

/// One page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) images: Vec<VisibleImage>,
    /// Position after which the next page begins; `None` on the last page.
    pub(crate) next: Option<Position>,
    /// Number of matching images on all pages, if requested.
    pub(crate) total: Option<u64>,
    /// Amount of text searched, in bytes.
    pub(crate) searched: u64,
    /// Revision that the page is at least as new as.
    pub(crate) revision: Revision,
}

impl Index {
    /// Capacity of the event channel, in batches.
    const BACKLOG: usize = 256;
    /// Maximum number of images looked up under one acquisition of the lock.
    const CHUNK: usize = 512;

    pub(crate) fn new(store: Store) -> Self {
        Self(Arc::new(Inner {
            store,
            images: RwLock::default(),
            state: watch::Sender::new(State { load: 0, at: None }),
            serves: watch::Sender::new(false),
            events: broadcast::Sender::new(Self::BACKLOG),
            wanted: Notify::new(),
            probe: RevisionProbe::new(),
            scans: Scans::default(),
            configurations: Configurations::new(),
            texts: LastText::default(),
        }))
    }

    /// Returns a receiver that holds `true` while reads are served.
    ///
    /// They are not served while the index loads, nor while it cannot follow the change log.
    pub(crate) fn serves(&self) -> watch::Receiver<bool> {
        self.0.serves.subscribe()
    }

    /// Returns one image that the caller can see.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the image is not visible, and the errors of [`fresh`](Self::fresh).
    pub(crate) async fn image(&self, visibility: &Visibility, id: ImageId) -> Result<VisibleImage, Error> {
        self.visible(visibility, id, Resource::Image(id)).await
    }

    /// Returns one image that the caller can see, or reports `missing` as not found.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`image`](Self::image).
    pub(crate) async fn visible(
        &self,
        visibility: &Visibility,
        id: ImageId,
        missing: Resource,
    ) -> Result<VisibleImage, Error> {
        self.fresh().await?;
        let found = self.entry(id).and_then(|entry| {
            let standing = Viewer::new(visibility).standing(&entry)?;
            Some(VisibleImage { entry, standing })
        });
        found.ok_or(Error::NotFound(missing))
    }

    /// Returns the images that the caller can see, among those with the given ids.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`fresh`](Self::fresh).
    pub(crate) async fn images_by_id(
        &self,
        visibility: &Visibility,
        ids: &[ImageId],
    ) -> Result<HashMap<ImageId, VisibleImage>, Error> {
        self.fresh().await?;
        let viewer = Viewer::new(visibility);
        let chunks = ids.chunks(Self::CHUNK);
        Ok(chunks
            .flat_map(|ids| self.shown(&viewer, ids))
            .map(|found| (found.entry.image.id, found))
            .collect())
    }

    /// Reports whether the caller can see any of the images.
    ///
    /// Waits for the index to catch up only if none seems to be visible.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`fresh`](Self::fresh).
    pub(crate) async fn shows_any(&self, visibility: &Visibility, ids: &[ImageId]) -> Result<bool, Error> {
        let viewer = Viewer::new(visibility);
        let shows_any = || ids.chunks(Self::CHUNK).any(|ids| !self.shown(&viewer, ids).is_empty());
        if shows_any() {
            return Ok(true);
        }
        self.fresh().await?;
        Ok(shows_any())
    }

    /// Returns the number of the revision that the index has reached; 0 while it loads.
    pub(crate) fn revision(&self) -> i64 {
        self.0.state.borrow().at.map_or(0, |at| at.number)
    }

    /// Returns the images that a viewer can see, as of the current state of the index.
    ///
    /// The lock is held throughout, so `ids` should be few.
    fn shown(&self, viewer: &Viewer, ids: &[ImageId]) -> Vec<VisibleImage> {
        let images = self.images();
        let entries = ids.iter().filter_map(|id| images.get(*id));
        let shown = entries.filter_map(|entry| {
            Some(VisibleImage { standing: viewer.standing(entry)?, entry: Arc::clone(entry) })
        });
        shown.collect()
    }

    /// Returns one image that the caller can see, with its configuration.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the configuration changes each time it is read, and the errors of
    /// [`image`](Self::image) and of the database.
    pub(crate) async fn image_in_full(
        &self,
        visibility: &Visibility,
        id: ImageId,
    ) -> Result<(VisibleImage, Arc<CachedConfiguration>), Error> {
        /// Maximum number of attempts, because the configuration may change before it is read.
        const CHANGES: usize = 5;
        for _ in 0..CHANGES {
            let found = self.image(visibility, id).await?;
            let key = configuration_key(&found.entry.image);
            if let Some(cached) = self.0.configurations.get(&self.0.store, [key]).await?.remove(&key) {
                return Ok((found, cached));
            }
        }
        Err(Error::Busy)
    }

    /// Returns the configurations of images, in order; `None` for one that is no longer stored.
    ///
    /// # Errors
    ///
    /// Returns an error if the database cannot be read.
    pub(crate) async fn configurations(
        &self,
        images: &[VisibleImage],
    ) -> Result<Vec<Option<Arc<CachedConfiguration>>>, Error> {
        let keys: Vec<_> = images.iter().map(|found| configuration_key(&found.entry.image)).collect();
        let found = self.0.configurations.get(&self.0.store, keys.iter().copied()).await?;
        Ok(keys.iter().map(|key| found.get(key).cloned()).collect())
    }

    /// Returns the next images of a query after a place.
    ///
    /// The page may be short if many images had to be scanned.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`fresh`](Self::fresh) and of [`Scans::run`].
    pub(crate) async fn list(
        &self,
        caller: &Principal,
        query: &Query,
        after: Option<&Position>,
        limit: usize,
        with_total: bool,
    ) -> Result<Page, Error> {
        let revision = self.fresh().await?;
        let filter = || Filter::new(Viewer::new(&caller.visibility()), query.clone());
        let (mut total, mut searched) = (None, 0);
        if with_total {
            let begin = |images: &Images| CountScan::new(images, filter());
            let count = self.0.scans.run(self, caller, begin, CountScan::advance).await?;
            let (counted, of_count) = count.finish();
            total = Some(counted);
            searched = of_count;
        }
        let begin = |images: &Images| PageScan::new(images, filter(), after.cloned(), limit);
        let scan = self.0.scans.run(self, caller, begin, PageScan::advance).await?;
        let FoundPage { images, next, searched: of_page } = scan.finish();
        Ok(Page { images, next, total, searched: searched + of_page, revision })
    }

    /// Returns a cursor to the first slot.
    pub(crate) fn first_slot(&self) -> SlotCursor {
        SlotCursor { load: self.images().load, slot: 0 }
    }

    /// Returns the next matching images from a slot on, each with the cursor that follows it, and the amount of
    /// text searched in bytes.
    ///
    /// An image keeps its slot as long as it exists. Later images may reuse free slots.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the index was reloaded after the cursor was created, and the errors of
    /// [`fresh`](Self::fresh) and of [`Scans::run`].
    pub(crate) async fn by_slot(
        &self,
        caller: &Principal,
        query: &Query,
        cursor: SlotCursor,
        most: usize,
    ) -> Result<(Vec<(VisibleImage, SlotCursor)>, u64), Error> {
        self.fresh().await?;
        let filter = Filter::new(Viewer::new(&caller.visibility()), query.clone());
        let begin = |images: &Images| {
            let scan = SlotScan::new(images, filter, cursor.slot, most);
            (images.load, scan)
        };
        let advance = |(_, scan): &mut (u64, SlotScan), images: &Images, budget| scan.advance(images, budget);
        let (load, scan) = self.0.scans.run(self, caller, begin, advance).await?;
        if load != cursor.load {
            return Err(Error::Busy);
        }
        let behind = |slot| SlotCursor { load, slot: slot + 1 };
        let (found, searched) = scan.finish();
        Ok((found.into_iter().map(|(slot, image)| (image, behind(slot))).collect(), searched))
    }

    /// Reports whether the text of an image contains a term.
    pub(crate) fn holds(&self, entry: &Entry, term: &Finder<'_>) -> bool {
        self.0.texts.read(&entry.text, |text| term.find(text).is_some())
    }

    /// Returns the parts of an image that contain a term.
    pub(crate) fn hits(&self, entry: &Entry, term: &Term) -> Vec<Part> {
        self.0.texts.read(&entry.text, |text| Part::containing(term, &String::from_utf8_lossy(text)))
    }

    /// Returns an image regardless of who can see it.
    pub(crate) fn entry(&self, id: ImageId) -> Option<Arc<Entry>> {
        self.images().get(id).cloned()
    }

    /// Subscribes to the events of the change log from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<IndexEvent> {
        self.0.events.subscribe()
    }

    fn images(&self) -> RwLockReadGuard<'_, Images> {
        self.0.images.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn images_mut(&self) -> RwLockWriteGuard<'_, Images> {
        self.0.images.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn configuration_key(image: &Image) -> configurations::Key {
    (image.id, image.configuration_revision)
}

#[cfg(test)]
mod tests;
