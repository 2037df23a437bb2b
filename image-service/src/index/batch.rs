//! The events that the follower of the change log sends to the watches.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::Instant;

use super::{entry::Entry, shown::ByStanding};
use crate::{
    access::Grantee,
    change::{Change, Revision},
    image::ImageId,
};

/// An event of the change log.
#[derive(Clone, Debug)]
pub(crate) enum IndexEvent {
    Changed(Arc<Batch>),
    /// The images were not as the database is, which no change says.
    Repaired(Arc<[Repair]>),
    /// Changes were missed and the index was loaded anew: whoever waited for them has to read the log.
    Reloaded,
}

/// An image that was not as in the database, as the index had it and as it is.
#[derive(Debug)]
pub(crate) struct Repair {
    pub(crate) id: ImageId,
    pub(crate) before: Option<Arc<Entry>>,
    pub(crate) entry: Option<Arc<Entry>>,
}

/// Changes that were read together, in the order of their revisions: every watch wakes up for all of them once.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) changes: Vec<ChangedImage>,
    pub(crate) read_at: Instant,
}

/// The last of the changes of an image that were read together, and the image as it was when they were read.
#[derive(Debug)]
pub(crate) struct ChangedImage {
    pub(crate) revision: Revision,
    pub(crate) id: ImageId,
    pub(crate) creator: String,
    /// Those who may have gained or lost sight of it by any of the changes.
    pub(crate) grantees: BTreeSet<Grantee>,
    /// The number of the first of the changes.
    pub(crate) first: i64,
    /// None when the image is gone.
    pub(crate) entry: Option<Arc<Entry>>,
    pub(crate) shown: ByStanding,
}

impl ChangedImage {
    /// Merges changes into one of each image, in the order of the last ones.
    ///
    /// An image may be as of a later change than the one that led to it: then that later change is in the log, too, and brings the same
    /// state again.
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
