//! Changes of images, and their places in the change log.

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
    /// Those who may have gained or lost sight of it.
    pub(crate) grantees: BTreeSet<Grantee>,
    pub(crate) at: Timestamp,
}

/// The parts of an image that have changed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    /// It follows its latest build.
    Status,
    /// The parts of the record that it is not found by.
    Record,
    /// The parts that it is found by: the name, the description, the configuration. All of a new one.
    Content,
    Grants,
    Deleted,
}

/// A place in the change log.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Revision {
    pub(crate) number: i64,
    /// Chosen at random with the change: a database that was restored from a backup goes on with other changes of the same
    /// numbers.
    pub(crate) nonce: i64,
}

/// The ends of the change log.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revisions {
    /// The latest revision.
    pub(crate) latest: Revision,
    /// The oldest revision that can be resumed from.
    pub(crate) oldest: Revision,
}

/// The latest revision of the change log, as far as this process has committed it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum CommittedRevision {
    /// This process has committed no later one. On Postgres, other replicas may have.
    Known(Revision),
    /// The outcome of a COMMIT is unknown, so only the database can tell. The next transaction finds it out.
    Unknown,
}

impl Revision {
    /// Before the first change.
    pub(crate) const NONE: Self = Self { number: 0, nonce: 0 };

    /// Returns a nonce, which is positive, so that it reads back from hexadecimal digits.
    pub(crate) fn random_nonce() -> i64 {
        i64::try_from(Uuid::new_v4().as_u64_pair().1 >> 1).unwrap_or(i64::MAX)
    }
}
