//! Events that the follower of the change log sends to the watches.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::Instant;

use super::{change_view::ByStanding, entry::Entry};
use crate::{
    access::Grantee,
    change::{Change, Revision},
    image::ImageId,
};

/// An event for the watches.
#[derive(Clone, Debug)]
pub(crate) enum IndexEvent {
    Changed(Arc<Batch>),
    /// Images whose entries differed from the database without a change in the log.
    Repaired(Arc<[Repair]>),
    /// A reload of the index after changes were missed, which watches must read from the log.
    Reloaded,
}

/// An image that differed from the database: its entry before the repair, and its entry now.
#[derive(Debug)]
pub(crate) struct Repair {
    pub(crate) id: ImageId,
    pub(crate) before: Option<Arc<Entry>>,
    pub(crate) entry: Option<Arc<Entry>>,
}

/// Changes that were read together, in revision order. Each watch wakes up once for all of them.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) changes: Vec<ChangedImage>,
    pub(crate) read_at: Instant,
}

/// The last change of an image in a batch, and the image as of the read.
#[derive(Debug)]
pub(crate) struct ChangedImage {
    pub(crate) revision: Revision,
    pub(crate) id: ImageId,
    pub(crate) creator: String,
    /// Grantees that may have gained or lost visibility of the image by any of its changes.
    pub(crate) grantees: BTreeSet<Grantee>,
    /// Revision number of the first change.
    pub(crate) first: i64,
    /// `None` if the image was deleted.
    pub(crate) entry: Option<Arc<Entry>>,
    pub(crate) shown: ByStanding,
}

impl ChangedImage {
    /// Merges changes into one per image, ordered by their last revisions.
    ///
    /// An entry may already reflect a later change than the one that led to it. That change is in the log as
    /// well and delivers the same state again.
    pub(crate) fn merge(
        changes: impl IntoIterator<Item = Change>,
        entry_of: impl Fn(ImageId) -> Option<Arc<Entry>>,
    ) -> Vec<Self> {
        let mut last: HashMap<ImageId, Self> = HashMap::new();
        for change in changes {
            let Change { revision, image: id, kind: _, creator, grantees, at: _ } = change;
            let merged = last.entry(id).or_insert_with(|| Self {
                revision,
                id,
                creator,
                grantees: BTreeSet::new(),
                first: revision.number,
                entry: entry_of(id),
                shown: ByStanding::default(),
            });
            merged.revision = revision;
            merged.grantees.extend(grantees);
        }
        let mut merged: Vec<Self> = last.into_values().collect();
        merged.sort_unstable_by_key(|changed| changed.revision.number);
        merged
    }
}
