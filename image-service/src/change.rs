//! Changes of images, and revisions of the change log.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{access::Grantee, image::ImageId, timestamp::Timestamp};

/// A change of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) revision: Revision,
    pub(crate) image: ImageId,
    pub(crate) kind: ChangeKind,
    pub(crate) creator: String,
    /// Grantees who may have gained or lost visibility of the image.
    pub(crate) grantees: BTreeSet<Grantee>,
    pub(crate) at: Timestamp,
}

/// The parts of an image that have changed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    /// Status, which follows the latest build.
    Status,
    /// Parts of the record that are not searchable.
    Record,
    /// Searchable parts: name, description and configuration. Everything of a new image.
    Content,
    Grants,
    Deleted,
}

/// A position in the change log.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Revision {
    pub(crate) number: i64,
    /// Random number chosen with the change. A database restored from a backup reuses numbers for other
    /// changes.
    pub(crate) nonce: i64,
}

/// The ends of the change log.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revisions {
    /// Latest revision.
    pub(crate) latest: Revision,
    /// Oldest revision that a watch can be resumed from.
    pub(crate) oldest: Revision,
}

/// The latest revision that this process has committed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum CommittedRevision {
    /// Latest revision committed by this process. On Postgres, other replicas may have committed later ones.
    Known(Revision),
    /// Unknown outcome of a COMMIT, until the next transaction reads the revision from the database.
    Unknown,
}

impl Revision {
    /// Position before the first change.
    pub(crate) const NONE: Self = Self { number: 0, nonce: 0 };

    /// Returns a random nonce, which is not negative, so that it reads back from hexadecimal digits.
    pub(crate) fn random_nonce() -> i64 {
        i64::try_from(Uuid::new_v4().as_u64_pair().1 >> 1).unwrap_or(i64::MAX)
    }
}
