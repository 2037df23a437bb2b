//! Every image as of one revision, in memory: what reads are answered from.
//!
//! The database is the truth. The index is loaded from it at the start and [follows](follower) its change log; watches are fed by
//! the same reader.
//!
//! Invariants:
//! - A read sees everything that was committed before it began: it [waits](Index::fresh) until the index has got there, and ends
//!   UNAVAILABLE rather than stale.
//! - Who sees what is asked in one place, [`Viewer::standing`].
//! - Nobody holds the lock of the images for longer than a stretch of bounded work takes.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use memchr::memmem::Finder;
use tokio::sync::{Notify, broadcast, watch};

use self::{
    configurations::Configurations,
    filter::Filter,
    freshness::Asks,
    images::Images,
    scan::{CountScan, FoundPage, PageScan, SlotScan},
    scheduler::Scans,
    text::LastText,
};
use crate::{
    access::{Principal, Sight},
    change::Revision,
    error::{Error, Resource},
    image::{Image, ImageId, Place, Query},
    store::Store,
};

pub(crate) use self::{
    batch::{Batch, ChangedImage, IndexEvent, Repair},
    configurations::CachedConfiguration,
    entry::{Entry, Viewer, VisibleImage},
    shown::{Encoded, Shown},
};

mod batch;
mod candidates;
mod columns;
mod configurations;
mod entry;
mod filter;
mod follower;
mod freshness;
mod images;
mod loader;
mod order;
mod scan;
mod scheduler;
mod selection;
mod shown;
mod signatures;
mod slot_set;
mod text;
mod verifier;

/// A handle to the index.
#[derive(Clone, Debug)]
pub(crate) struct Index(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    images: RwLock<Images>,
    state: watch::Sender<State>,
    /// Set while the index answers, as health tells.
    serves: watch::Sender<bool>,
    /// Bounded: a watch that falls behind by more reads what it has missed from the log, latest states only.
    events: broadcast::Sender<IndexEvent>,
    /// Wakes the follower.
    wanted: Notify,
    asks: Asks,
    scans: Scans,
    configurations: Configurations,
    texts: LastText,
}

/// The progress of the index.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct State {
    /// The number of times it was loaded.
    load: u64,
    /// The revision that it is at; none while it is loaded.
    at: Option<Revision>,
}

/// A place in the order of slots.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct SlotCursor {
    load: u64,
    slot: u32,
}

/// A page of images.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) images: Vec<VisibleImage>,
    /// The place after which the next page begins; none on the last one.
    pub(crate) next: Option<Place>,
    /// The number of images that match on all pages together, if that was asked for.
    pub(crate) total: Option<u64>,
    /// The text that was searched. Bytes.
    pub(crate) searched: u64,
}

impl Index {
    /// Batches.
    const BACKLOG: usize = 256;
    /// The number of images that are looked up under the lock at once.
    const STRETCH: usize = 512;

    pub(crate) fn new(store: Store) -> Self {
        Self(Arc::new(Inner {
            store,
            images: RwLock::default(),
            state: watch::Sender::new(State { load: 0, at: None }),
            serves: watch::Sender::new(false),
            events: broadcast::Sender::new(Self::BACKLOG),
            wanted: Notify::new(),
            asks: Asks::default(),
            scans: Scans::default(),
            configurations: Configurations::new(),
            texts: LastText::default(),
        }))
    }

    /// Tells whether reads are answered: not while the index is loaded, nor while it cannot follow.
    pub(crate) fn serves(&self) -> watch::Receiver<bool> {
        self.0.serves.subscribe()
    }

    /// Returns one image that is in sight.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] unless it is, and those of [`fresh`](Self::fresh).
    pub(crate) async fn image(&self, sight: &Sight, id: ImageId) -> Result<VisibleImage, Error> {
        self.visible(sight, id, Resource::Image).await
    }

    /// Returns one image that is in sight. Of one that is not, `missing` does not exist for the caller.
    ///
    /// # Errors
    ///
    /// As [`image`](Self::image).
    pub(crate) async fn visible(
        &self,
        sight: &Sight,
        id: ImageId,
        missing: Resource,
    ) -> Result<VisibleImage, Error> {
        self.fresh().await?;
        let entry = self.entry(id).ok_or(Error::NotFound(missing))?;
        let standing = Viewer::new(sight).standing(&entry).ok_or(Error::NotFound(missing))?;
        Ok(VisibleImage { entry, standing })
    }

    /// Returns those of the images that are in sight.
    ///
    /// # Errors
    ///
    /// Those of [`fresh`](Self::fresh).
    pub(crate) async fn images_by_id(
        &self,
        sight: &Sight,
        ids: &[ImageId],
    ) -> Result<HashMap<ImageId, VisibleImage>, Error> {
        self.fresh().await?;
        let viewer = Viewer::new(sight);
        let stretches = ids.chunks(Self::STRETCH);
        Ok(stretches
            .flat_map(|ids| self.shown(&viewer, ids))
            .map(|found| (found.entry.image.id, found))
            .collect())
    }

    /// Tells whether any of the images is in sight. It waits for the index to catch up only where none seems to be.
    ///
    /// # Errors
    ///
    /// Those of [`fresh`](Self::fresh).
    pub(crate) async fn shows_any(&self, sight: &Sight, ids: &[ImageId]) -> Result<bool, Error> {
        let viewer = Viewer::new(sight);
        let shows_any = || ids.chunks(Self::STRETCH).any(|ids| !self.shown(&viewer, ids).is_empty());
        if shows_any() {
            return Ok(true);
        }
        self.fresh().await?;
        Ok(shows_any())
    }

    /// Returns the number of the revision that the index is at; 0 while it is loaded.
    pub(crate) fn revision(&self) -> i64 {
        self.0.state.borrow().at.map_or(0, |at| at.number)
    }

    /// Returns those of a few images that a viewer sees, as far as the index has got.
    fn shown(&self, viewer: &Viewer, ids: &[ImageId]) -> Vec<VisibleImage> {
        let images = self.images();
        let entries = ids.iter().filter_map(|id| images.get(*id));
        let shown = entries.filter_map(|entry| {
            Some(VisibleImage { standing: viewer.standing(entry)?, entry: Arc::clone(entry) })
        });
        shown.collect()
    }

    /// Returns one image that is in sight, and its configuration.
    ///
    /// # Errors
    ///
    /// As [`image`](Self::image), and those of the database.
    pub(crate) async fn image_in_full(
        &self,
        sight: &Sight,
        id: ImageId,
    ) -> Result<(VisibleImage, Arc<CachedConfiguration>), Error> {
        /// The number of times the configuration may change while it is read.
        const CHANGES: usize = 5;
        for _ in 0..CHANGES {
            let found = self.image(sight, id).await?;
            let key = configuration_key(&found.entry.image);
            if let Some(cached) = self.0.configurations.get(&self.0.store, [key]).await?.remove(&key) {
                return Ok((found, cached));
            }
        }
        Err(Error::Busy)
    }

    /// Returns the configurations of images, where they are kept.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub(crate) async fn configurations(
        &self,
        images: &[VisibleImage],
    ) -> Result<Vec<Option<Arc<CachedConfiguration>>>, Error> {
        let keys: Vec<_> = images.iter().map(|found| configuration_key(&found.entry.image)).collect();
        let found = self.0.configurations.get(&self.0.store, keys.iter().copied()).await?;
        Ok(keys.iter().map(|key| found.get(key).cloned()).collect())
    }

    /// Returns the next images of a query after a place. The page may be short, when there was much to look through.
    ///
    /// # Errors
    ///
    /// Those of [`fresh`](Self::fresh).
    pub(crate) async fn list(
        &self,
        caller: &Principal,
        query: &Query,
        after: Option<&Place>,
        limit: usize,
        with_total: bool,
    ) -> Result<Page, Error> {
        self.fresh().await?;
        let filter = || Filter::new(Viewer::new(&caller.sight()), query.clone());
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
        Ok(Page { images, next, total, searched: searched + of_page })
    }

    /// Returns where to begin with the images in the order of their slots.
    pub(crate) fn first_slot(&self) -> SlotCursor {
        SlotCursor { load: self.images().load, slot: 0 }
    }

    /// Returns the next images that match from a slot on, each with where it goes on behind it. An image keeps its slot as long as
    /// it exists, and later ones may come into slots that are free.
    ///
    /// # Errors
    ///
    /// Those of [`fresh`](Self::fresh), and [`Error::Busy`] when the images were loaded anew since the cursor was made.
    pub(crate) async fn by_slot(
        &self,
        caller: &Principal,
        query: &Query,
        cursor: SlotCursor,
        most: usize,
    ) -> Result<Vec<(VisibleImage, SlotCursor)>, Error> {
        self.fresh().await?;
        let filter = Filter::new(Viewer::new(&caller.sight()), query.clone());
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
        Ok(scan.finish().into_iter().map(|(slot, image)| (image, behind(slot))).collect())
    }

    /// Tells whether an image can be found by a term.
    pub(crate) fn holds(&self, entry: &Entry, term: &Finder<'_>) -> bool {
        self.0.texts.read(&entry.text, |text| term.find(text).is_some())
    }

    /// Returns an image, whoever may see it.
    pub(crate) fn entry(&self, id: ImageId) -> Option<Arc<Entry>> {
        self.images().get(id).cloned()
    }

    /// Returns the events of the change log from here on.
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
