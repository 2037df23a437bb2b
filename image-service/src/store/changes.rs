//! The change log, which the feed reads.

use std::{collections::BTreeSet, time::Duration};

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, QueryOrder,
    QuerySelect, sea_query::Expr,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Store,
    entity::{catalogue, change},
    hints,
    rows::to_json,
    writing::Writing,
};
use crate::{error::Error, image::ImageId, timestamp::Timestamp};

/// A change of an image: created, edited, shared, followed its build, or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) revision: Revision,
    pub(crate) image: ImageId,
    pub(crate) creator: String,
    /// Those who may have gained or lost sight of it.
    pub(crate) viewers: BTreeSet<String>,
    pub(crate) at: Timestamp,
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

impl Revision {
    /// Before the first change.
    pub(crate) const NONE: Self = Self { number: 0, nonce: 0 };
}

impl Store {
    /// How many changes are forgotten in one transaction.
    const FORGOTTEN_AT_ONCE: u64 = 500;

    /// The ends of the change log, as committed.
    pub(crate) async fn revisions(&self) -> Result<Revisions, Error> {
        Ok(revisions(&self.reader).await?)
    }

    /// Accepts a revision to resume from: one that this database has given, and after which every change is in the log.
    pub(crate) async fn resume_from(&self, after: Revision) -> Result<Revision, Error> {
        let txn = self.read().await?;
        let Revisions { oldest, latest } = revisions(&txn).await?;
        let is_known = if after.number == oldest.number {
            after == oldest
        } else if after.number == latest.number {
            after == latest
        } else {
            let found = change::Entity::find_by_id(after.number).one(&txn).await?;
            found.is_some_and(|found| found.nonce == after.nonce)
        };
        txn.commit().await?;
        if is_known && after.number >= oldest.number {
            Ok(after)
        } else {
            Err(Error::RevisionUnavailable { oldest: oldest.number })
        }
    }

    /// Forgets a batch of the oldest changes that are older than `retain`; whether there may be more.
    pub(crate) async fn forget_changes(&self, retain: Duration) -> Result<bool, Error> {
        let before = self.now(&self.reader).await?.before(retain);
        let oldest = || {
            change::Entity::find()
                .select_only()
                .columns([change::Column::Revision, change::Column::Nonce, change::Column::ChangedAt])
                .order_by_asc(change::Column::Revision)
                .limit(Self::FORGOTTEN_AT_ONCE)
                .into_tuple::<(i64, i64, i64)>()
        };
        let is_due = |(_, _, changed_at): &(i64, i64, i64)| *changed_at < before.micros();
        if !oldest().one(&self.reader).await?.as_ref().is_some_and(is_due) {
            return Ok(false);
        }
        let txn = self.write().await?;
        let found = oldest().all(&txn).await?;
        let count = found.len();
        let Some((revision, nonce, _)) = found.into_iter().take_while(is_due).last() else {
            return Ok(false);
        };
        change::Entity::delete_many().filter(change::Column::Revision.lte(revision)).exec(&txn).await?;
        catalogue::Entity::update_many()
            .col_expr(catalogue::Column::CompactedRevision, Expr::value(revision))
            .col_expr(catalogue::Column::CompactedNonce, Expr::value(nonce))
            .exec(&txn)
            .await?;
        txn.commit().await?;
        Ok(count as u64 == Self::FORGOTTEN_AT_ONCE)
    }
}

pub(super) async fn revisions(db: &impl ConnectionTrait) -> Result<Revisions, DbErr> {
    let row = catalogue::Entity::find_by_id(1)
        .one(db)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("catalogue".to_owned()))?;
    Ok(Revisions {
        latest: Revision { number: row.revision, nonce: row.nonce },
        oldest: Revision { number: row.compacted_revision, nonce: row.compacted_nonce },
    })
}

/// A change as it was logged.
#[derive(Copy, Clone, Debug)]
pub(super) struct Logged {
    pub(super) revision: i64,
    /// Later than every change before, even if a clock was set back: images in the order of their updates are in that of
    /// their changes.
    pub(super) at: Timestamp,
}

/// Appends a change of an image to the change log, under a new revision.
pub(super) async fn log(
    txn: &Writing,
    image: ImageId,
    creator: &str,
    viewers: &BTreeSet<String>,
    now: Timestamp,
) -> Result<Logged, DbErr> {
    let logged = log_all(txn, &[(image, creator, viewers)], now).await?;
    logged.into_iter().next().ok_or_else(|| DbErr::RecordNotFound("a change".to_owned()))
}

/// Appends changes of images to the change log, each under a new revision, within a transaction that no other writes beside: so
/// the order of revisions is that of commits.
pub(super) async fn log_all(
    txn: &Writing,
    changes: &[(ImageId, &str, &BTreeSet<String>)],
    now: Timestamp,
) -> Result<Vec<Logged>, DbErr> {
    use catalogue::{Column, Entity};
    let count = i64::try_from(changes.len()).unwrap_or(i64::MAX);
    if count == 0 {
        return Ok(Vec::new());
    }
    let nonces: Vec<i64> = changes.iter().map(|_| nonce()).collect();
    let last = || Expr::col(Column::ChangedAt);
    let later = Expr::case(last().gte(now.micros()), last().add(count)).finally(now.micros() + count - 1);
    let updated = Entity::update_many()
        .col_expr(Column::Revision, Expr::col(Column::Revision).add(count))
        .col_expr(Column::Nonce, Expr::value(nonces.last().copied()))
        .col_expr(Column::ChangedAt, later.into())
        .exec_with_returning(txn)
        .await?;
    let row = updated.first().ok_or_else(|| DbErr::RecordNotFound("catalogue".to_owned()))?;
    let (mut rows, mut logged) = (Vec::with_capacity(changes.len()), Vec::with_capacity(changes.len()));
    for (((image, creator, viewers), nonce), before) in changes.iter().zip(nonces).zip((0..count).rev()) {
        let (revision, at) = (row.revision - before, row.changed_at - before);
        let change = change::Model {
            revision,
            nonce,
            image: image.0,
            creator: (*creator).to_owned(),
            viewers_json: to_json(viewers)?,
            changed_at: at,
        };
        rows.push(change.into_active_model());
        logged.push(Logged { revision, at: Timestamp::from_micros(at) });
    }
    txn.later(change::Entity::insert_many(rows));
    hints::send(txn, hints::Hint::Changed);
    Ok(logged)
}

/// Positive, so that it reads back from hexadecimal digits.
fn nonce() -> i64 {
    i64::try_from(Uuid::new_v4().as_u64_pair().1 >> 1).unwrap_or(i64::MAX)
}
