//! Accounting of what each caller uses: images and their memory in the index, uploaded archives, remembered
//! answers. Every write counts its change in the same transaction, so that the index always fits when it is
//! loaded again, and nobody fills the disk.

use sea_orm::{ColumnTrait, DbErr, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, sea_query::Expr};

use super::{
    Store,
    entity::{catalogue, creator},
    transaction::WriteTransaction,
};
use crate::{
    error::Error,
    image::{Usage, UsageChange},
};

impl Store {
    /// Checks that a write may add `change` to the usage of a creator.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Quotas::admit`](crate::image::Quotas::admit), and [`Error::StorageFull`] if `change` adds
    /// something and the disk is full.
    pub(crate) async fn require_quota(&self, subject: &str, change: UsageChange) -> Result<(), Error> {
        if change.adds() {
            self.require_storage()?;
        }
        let of_creator = creator::Entity::find_by_id(subject).one(&self.reader).await?;
        let of_all = catalogue::Entity::find_by_id(1).one(&self.reader).await?;
        let of_creator = of_creator.unwrap_or_else(|| unused(subject));
        let used = Usage {
            catalogue_bytes: of_all.map_or(0, |row| row.index_bytes) + change.bytes,
            creator_images: of_creator.images + change.images,
            creator_bytes: of_creator.index_bytes + change.bytes,
            context_bytes: of_creator.context_bytes + change.context_bytes,
        };
        self.quotas.admit(used, change)
    }
}

/// Adds `change` to the usage of a caller, and returns what it is then.
///
/// # Errors
///
/// Returns the errors of [`Quotas::admit`](crate::image::Quotas::admit), and [`Error::StorageFull`] if `change` adds
/// something and the disk is full.
pub(super) async fn charge(
    txn: &WriteTransaction,
    store: &Store,
    subject: &str,
    change: UsageChange,
) -> Result<creator::Model, Error> {
    if change.adds() {
        store.require_storage()?;
    }
    use creator::Column::{AnswerBytes, ContextBytes, Images, IndexBytes, Subject};
    let UsageChange { images, bytes, context_bytes, answer_bytes } = change;
    let mut update = creator::Entity::update_many().filter(Subject.eq(subject));
    for (column, added) in
        [(Images, images), (IndexBytes, bytes), (ContextBytes, context_bytes), (AnswerBytes, answer_bytes)]
    {
        if added != 0 {
            update = update.col_expr(column, Expr::col(column).add(added));
        }
    }
    if change == UsageChange::default() {
        return Ok(creator::Entity::find_by_id(subject).one(txn).await?.unwrap_or_else(|| unused(subject)));
    }
    let used = update.exec_with_returning(txn).await?.into_iter().next().unwrap_or_else(|| {
        let first =
            creator::Model { images, index_bytes: bytes, context_bytes, answer_bytes, ..unused(subject) };
        txn.defer(creator::Entity::insert(first.clone().into_active_model()));
        first
    });
    if used == unused(subject) {
        txn.defer(creator::Entity::delete_many().filter(Subject.eq(subject)));
    }
    let catalogue_bytes = if bytes == 0 { 0 } else { charge_catalogue(txn, bytes).await? };
    let usage = Usage {
        catalogue_bytes,
        creator_images: used.images,
        creator_bytes: used.index_bytes,
        context_bytes: used.context_bytes,
    };
    store.quotas.admit(usage, change)?;
    Ok(used)
}

/// Adds to the memory that all images take in the index, and returns what it is then.
async fn charge_catalogue(txn: &WriteTransaction, bytes: i64) -> Result<i64, DbErr> {
    let of_all = catalogue::Entity::update_many()
        .col_expr(catalogue::Column::IndexBytes, Expr::col(catalogue::Column::IndexBytes).add(bytes))
        .exec_with_returning(txn)
        .await?;
    Ok(of_all.first().map_or(bytes, |row| row.index_bytes))
}

/// Returns the row of a caller that uses nothing, which is not kept.
fn unused(subject: &str) -> creator::Model {
    creator::Model {
        subject: subject.to_owned(),
        images: 0,
        index_bytes: 0,
        context_bytes: 0,
        answer_bytes: 0,
    }
}
