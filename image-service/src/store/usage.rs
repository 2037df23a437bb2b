//! Accounting of the index memory of each creator's images and of all images. Every write counts its change
//! in the same transaction, so that the index always fits when it is loaded again.

use sea_orm::{ColumnTrait, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, sea_query::Expr};

use super::{
    Store,
    entity::{catalogue, creator},
    request_transaction::RequestTransaction,
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
    /// Returns the errors of [`Quotas::admit`](crate::image::Quotas::admit).
    pub(crate) async fn require_quota(&self, subject: &str, change: UsageChange) -> Result<(), Error> {
        let of_creator = creator::Entity::find_by_id(subject).one(&self.reader).await?;
        let of_all = catalogue::Entity::find_by_id(1).one(&self.reader).await?;
        let (images, bytes) = of_creator.map_or((0, 0), |row| (row.images, row.index_bytes));
        let used = Usage {
            catalogue_bytes: of_all.map_or(0, |row| row.index_bytes) + change.bytes,
            creator_images: images + change.images,
            creator_bytes: bytes + change.bytes,
        };
        self.quotas.admit(used, change)
    }
}

impl RequestTransaction<'_> {
    /// Adds `change` to the usage of a creator.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Quotas::admit`](crate::image::Quotas::admit).
    pub(super) async fn charge(&self, subject: &str, change: UsageChange) -> Result<(), Error> {
        let UsageChange { images, bytes } = change;
        if images == 0 && bytes == 0 {
            return Ok(());
        }
        let of_creator = creator::Entity::update_many()
            .col_expr(creator::Column::Images, Expr::col(creator::Column::Images).add(images))
            .col_expr(creator::Column::IndexBytes, Expr::col(creator::Column::IndexBytes).add(bytes))
            .filter(creator::Column::Subject.eq(subject))
            .exec_with_returning(&self.txn)
            .await?;
        let of_creator = of_creator.into_iter().next().unwrap_or_else(|| {
            let first = creator::Model { subject: subject.to_owned(), images, index_bytes: bytes };
            self.txn.defer(creator::Entity::insert(first.clone().into_active_model()));
            first
        });
        if of_creator.images <= 0 {
            self.txn.defer(creator::Entity::delete_many().filter(creator::Column::Subject.eq(subject)));
        }
        let of_all = catalogue::Entity::update_many()
            .col_expr(catalogue::Column::IndexBytes, Expr::col(catalogue::Column::IndexBytes).add(bytes))
            .exec_with_returning(&self.txn)
            .await?;
        let used = Usage {
            catalogue_bytes: of_all.first().map_or(bytes, |row| row.index_bytes),
            creator_images: of_creator.images,
            creator_bytes: of_creator.index_bytes,
        };
        self.store.quotas.admit(used, change)
    }
}
