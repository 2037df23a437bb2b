//! The change log, which the feed reads.

use std::collections::BTreeSet;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, ExprTrait, IntoActiveModel,
    QueryFilter, QueryOrder, QuerySelect, sea_query::Expr,
};

use super::{
    Store,
    entity::{catalogue, change},
    rows,
};
use crate::{error::Error, image::ImageId};

/// A change of an image: created, edited, shared, followed its build, or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) revision: i64,
    pub(crate) image: ImageId,
    pub(crate) creator: String,
    /// Those to whom the image was granted before or after.
    pub(crate) viewers: BTreeSet<String>,
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
        let mut changes = Vec::with_capacity(found.len());
        for row in found {
            changes.push(Change {
                revision: row.revision,
                image: ImageId(row.image),
                creator: row.creator,
                viewers: rows::from_json(&row.viewers_json)?,
            });
        }
        Ok(changes)
    }
}

/// Appends a change of an image to the change log, under a new revision.
pub(super) async fn log(
    txn: &DatabaseTransaction,
    image: ImageId,
    creator: &str,
    viewers: &BTreeSet<String>,
) -> Result<i64, DbErr> {
    let revision = next_revision(txn).await?;
    let change = change::Model {
        revision,
        image: image.0,
        creator: creator.to_owned(),
        viewers_json: rows::to_json(viewers)?,
    };
    change::Entity::insert(change.into_active_model()).exec_without_returning(txn).await?;
    Ok(revision)
}

/// Takes the next revision, within a transaction that no other writes beside: so the order of revisions is that of commits.
async fn next_revision(txn: &impl ConnectionTrait) -> Result<i64, DbErr> {
    use catalogue::{Column, Entity};
    let updated = Entity::update_many()
        .col_expr(Column::Revision, Expr::col(Column::Revision).add(1))
        .exec_with_returning(txn)
        .await?;
    updated.first().map(|row| row.revision).ok_or_else(|| DbErr::RecordNotFound("catalogue".to_owned()))
}
