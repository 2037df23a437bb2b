//! The change log, which the feed reads.

use std::{collections::BTreeSet, time::Duration};

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, ExprTrait, IntoActiveModel,
    QueryFilter, QueryOrder, QuerySelect, Statement, sea_query::Expr,
};

use super::{
    Store,
    entity::{catalogue, change},
    hints, required,
    transaction::WriteTransaction,
    values::AsJson,
};
use crate::{
    access::Grantee,
    change::{Change, ChangeKind, Revision, Revisions},
    error::Error,
    hint::Hint,
    image::ImageId,
    timestamp::Timestamp,
    turns::Turn,
};

impl Store {
    /// Maximum number of changes that one transaction compacts.
    const COMPACTION_BATCH: u64 = 500;

    /// Returns the latest revision, using the index's own connections.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn latest_revision(&self) -> Result<Revision, Error> {
        let sql = "SELECT revision, nonce FROM catalogue";
        let row = self.index_reader.query_one_raw(Statement::from_string(self.backend(), sql)).await?;
        let row = required(row, "catalogue")?;
        Ok(Revision { number: row.try_get_by_index(0)?, nonce: row.try_get_by_index(1)? })
    }

    /// Returns the next changes after a revision, in commit order.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RevisionUnavailable`] if this database never assigned `after`, or changes since then
    /// were compacted.
    pub(crate) async fn changes_after(&self, after: Revision, limit: u64) -> Result<Vec<Change>, Error> {
        let txn = self.read().await?;
        let (changes, _) = changes_after(&txn, after, limit).await?;
        txn.commit().await?;
        Ok(changes)
    }

    /// Compacts a batch of changes older than `retain`, and reports whether there may be more.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn compact_change_log(&self, retain: Duration) -> Result<bool, Error> {
        let before = self.now(&self.reader).await?.before(retain);
        let oldest = || {
            change::Entity::find()
                .select_only()
                .columns([change::Column::Revision, change::Column::Nonce, change::Column::ChangedAt])
                .order_by_asc(change::Column::Revision)
                .limit(Self::COMPACTION_BATCH)
                .into_tuple::<(i64, i64, Timestamp)>()
        };
        let is_due = |(_, _, changed_at): &(i64, i64, Timestamp)| *changed_at < before;
        if !oldest().one(&self.reader).await?.as_ref().is_some_and(is_due) {
            return Ok(false);
        }
        let txn = self.write(Turn::Background).await?;
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
        Ok(count as u64 == Self::COMPACTION_BATCH)
    }
}

/// Returns the next changes after a revision, and the ends of the log, within a read transaction.
pub(super) async fn changes_after(
    txn: &DatabaseTransaction,
    after: Revision,
    limit: u64,
) -> Result<(Vec<Change>, Revisions), Error> {
    let found = change::Entity::find()
        .filter(change::Column::Revision.gte(after.number))
        .order_by_asc(change::Column::Revision)
        .limit(limit + 1)
        .all(txn)
        .await?;
    let ends = revisions(txn).await?;
    let is_given = match found.first() {
        Some(first) if first.revision == after.number => first.nonce == after.nonce,
        // The last compacted revision, or the one before the first change.
        _ => after == ends.oldest,
    };
    // Nothing follows the latest revision, whatever the log has lost.
    if !is_given && after != ends.latest {
        return Err(Error::RevisionUnavailable { oldest: ends.oldest.number });
    }
    Ok((found.into_iter().filter(|row| row.revision > after.number).map(Change::from).collect(), ends))
}

impl From<change::Model> for Change {
    fn from(row: change::Model) -> Self {
        Self {
            revision: Revision { number: row.revision, nonce: row.nonce },
            image: row.image,
            kind: row.kind,
            creator: row.creator,
            grantees: row.grantees_json.into_noun(),
            at: row.changed_at,
        }
    }
}

pub(super) async fn revisions(db: &impl ConnectionTrait) -> Result<Revisions, DbErr> {
    let row = required(catalogue::Entity::find_by_id(1).one(db).await?, "catalogue")?;
    Ok(Revisions {
        latest: Revision { number: row.revision, nonce: row.nonce },
        oldest: Revision { number: row.compacted_revision, nonce: row.compacted_nonce },
    })
}

/// The place of a logged change.
#[derive(Copy, Clone, Debug)]
pub(super) struct Logged {
    pub(super) revision: i64,
    /// Time of the change. It is later than all earlier changes even if a clock was set back, so sorting
    /// images by update time sorts them by change.
    pub(super) at: Timestamp,
}

#[derive(Debug)]
pub(super) struct NewChange<'a> {
    pub(super) image: ImageId,
    pub(super) kind: ChangeKind,
    pub(super) creator: &'a str,
    /// Grantees who may gain or lose visibility of the image.
    pub(super) grantees: BTreeSet<Grantee>,
}

impl<'a> NewChange<'a> {
    /// Creates a change by which no grantee gains or loses visibility of the image.
    pub(super) fn new(image: ImageId, kind: ChangeKind, creator: &'a str) -> Self {
        Self { image, kind, creator, grantees: BTreeSet::new() }
    }
}

/// Appends a change of an image to the change log, under a new revision.
pub(super) async fn log(
    txn: &WriteTransaction,
    change: NewChange<'_>,
    now: Timestamp,
) -> Result<Logged, DbErr> {
    let logged = log_all(txn, &[change], now).await?;
    required(logged.into_iter().next(), "a change")
}

/// Appends changes to the change log. Write transactions are serialised, so their new revisions are in commit
/// order.
pub(super) async fn log_all(
    txn: &WriteTransaction,
    changes: &[NewChange<'_>],
    now: Timestamp,
) -> Result<Vec<Logged>, DbErr> {
    use catalogue::{Column, Entity};
    let count = i64::try_from(changes.len()).unwrap_or(i64::MAX);
    if count == 0 {
        return Ok(Vec::new());
    }
    let nonces: Vec<i64> = changes.iter().map(|_| Revision::random_nonce()).collect();
    let last = || Expr::col(Column::ChangedAt);
    let later = Expr::case(last().gte(now), last().add(count)).finally(now.micros() + count - 1);
    let updated = Entity::update_many()
        .col_expr(Column::Revision, Expr::col(Column::Revision).add(count))
        .col_expr(Column::Nonce, Expr::value(nonces.last().copied()))
        .col_expr(Column::ChangedAt, later.into())
        .exec_with_returning(txn)
        .await?;
    let row = required(updated.first(), "catalogue")?;
    txn.reach(Revision { number: row.revision, nonce: row.nonce });
    let (mut rows, mut logged) = (Vec::with_capacity(changes.len()), Vec::with_capacity(changes.len()));
    for ((change, nonce), before) in changes.iter().zip(nonces).zip((0..count).rev()) {
        let revision = row.revision - before;
        let at = Timestamp::from_micros(row.changed_at.micros() - before);
        let change = change::Model {
            revision,
            nonce,
            image: change.image,
            kind: change.kind,
            creator: change.creator.to_owned(),
            grantees_json: AsJson(change.grantees.clone()),
            changed_at: at,
        };
        rows.push(change.into_active_model());
        logged.push(Logged { revision, at });
    }
    txn.defer(change::Entity::insert_many(rows));
    hints::send(txn, Hint::Changed);
    Ok(logged)
}
