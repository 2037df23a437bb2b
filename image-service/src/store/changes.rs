//! The change log, which the feed reads.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect};

use super::{
    Store,
    entity::{catalogue, change},
};
use crate::{error::Error, image::ImageId};

/// A change of an image: created, edited, followed its build, or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) revision: i64,
    pub(crate) image: ImageId,
    pub(crate) creator: String,
}

/// The ends of the change log.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Revisions {
    /// The latest revision.
    pub(crate) latest: i64,
    /// The oldest revision that can be resumed from.
    pub(crate) oldest: i64,
}

impl Store {
    /// The ends of the change log, as committed.
    pub(crate) async fn revisions(&self) -> Result<Revisions, Error> {
        let row = catalogue::Entity::find_by_id(1)
            .one(&self.reader)
            .await?
            .ok_or_else(|| Error::Internal("the catalogue has no row".into()))?;
        Ok(Revisions { latest: row.revision, oldest: row.compacted_revision })
    }

    /// The next changes after a revision, in the order of their commits.
    pub(crate) async fn changes_after(&self, revision: i64, limit: u64) -> Result<Vec<Change>, Error> {
        let found = change::Entity::find()
            .filter(change::Column::Revision.gt(revision))
            .order_by_asc(change::Column::Revision)
            .limit(limit)
            .all(&self.reader)
            .await?;
        Ok(found
            .into_iter()
            .map(|row| Change { revision: row.revision, image: ImageId(row.image), creator: row.creator })
            .collect())
    }
}
