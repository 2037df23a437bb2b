//! The memory that the images of each creator, and all together, take in the index: counted in the transaction of every write
//! that changes it, so that the index can always be loaded again.

use sea_orm::{
    ColumnTrait, Condition, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, sea_query::Expr,
};

use super::{
    Store,
    entity::{catalogue, creator},
    write::Write,
};
use crate::{
    error::Error,
    image::{Growth, Usage},
};

/// The use that a write adds; less than nothing where it takes away.
#[derive(Copy, Clone, Debug)]
pub(crate) struct UsageChange {
    pub(crate) images: i64,
    pub(crate) bytes: i64,
}

impl Store {
    /// Checks that a write may add this to the images of a creator.
    ///
    /// # Errors
    ///
    /// Those of [`Quotas::admit`](crate::image::Quotas::admit).
    pub(crate) async fn require_quota(&self, subject: &str, change: UsageChange) -> Result<(), Error> {
        let of_creator = creator::Entity::find_by_id(subject).one(&self.reader).await?;
        let of_all = catalogue::Entity::find_by_id(1).one(&self.reader).await?;
        let (images, bytes) = of_creator.map_or((0, 0), |row| (row.images, row.index_bytes));
        self.quotas.admit(usage(of_all.map_or(0, |row| row.index_bytes), images, bytes), change.growth())
    }
}

/// Says what is there of it before a write.
fn usage(catalogue_bytes: i64, creator_images: i64, creator_bytes: i64) -> Usage {
    let count = |number: i64| u64::try_from(number).unwrap_or(0);
    Usage {
        catalogue_bytes: count(catalogue_bytes),
        creator_images: count(creator_images),
        creator_bytes: count(creator_bytes),
    }
}

impl UsageChange {
    fn growth(self) -> Growth {
        let added = |number: i64| u64::try_from(number).unwrap_or(0);
        Growth { images: added(self.images), bytes: added(self.bytes) }
    }
}

impl Write<'_> {
    /// Counts what a write adds to the images of a creator.
    ///
    /// # Errors
    ///
    /// Those of [`Quotas::admit`](crate::image::Quotas::admit).
    pub(super) async fn charge(&self, subject: &str, change: UsageChange) -> Result<(), Error> {
        let UsageChange { images, bytes } = change;
        if images <= 0 && bytes <= 0 {
            self.release(subject, change);
            return Ok(());
        }
        let of_creator = creator::Entity::update_many()
            .col_expr(creator::Column::Images, Expr::col(creator::Column::Images).add(images))
            .col_expr(creator::Column::IndexBytes, Expr::col(creator::Column::IndexBytes).add(bytes))
            .filter(creator::Column::Subject.eq(subject))
            .exec_with_returning(&self.txn)
            .await?;
        let of_creator = match of_creator.into_iter().next() {
            Some(of_creator) => of_creator,
            None => {
                let first = creator::Model { subject: subject.to_owned(), images, index_bytes: bytes };
                self.txn.later(creator::Entity::insert(first.clone().into_active_model()));
                first
            }
        };
        let of_all = catalogue::Entity::update_many()
            .col_expr(catalogue::Column::IndexBytes, Expr::col(catalogue::Column::IndexBytes).add(bytes))
            .exec_with_returning(&self.txn)
            .await?;
        let of_all = of_all.first().map_or(bytes, |row| row.index_bytes);
        let used = usage(of_all - bytes, of_creator.images - images, of_creator.index_bytes - bytes);
        self.store.quotas.admit(used, change.growth())
    }

    fn release(&self, subject: &str, change: UsageChange) {
        let UsageChange { images, bytes } = change;
        if images == 0 && bytes == 0 {
            return;
        }
        self.txn.later(
            creator::Entity::update_many()
                .col_expr(creator::Column::Images, Expr::col(creator::Column::Images).add(images))
                .col_expr(creator::Column::IndexBytes, Expr::col(creator::Column::IndexBytes).add(bytes))
                .filter(creator::Column::Subject.eq(subject)),
        );
        self.txn.later(
            catalogue::Entity::update_many()
                .col_expr(catalogue::Column::IndexBytes, Expr::col(catalogue::Column::IndexBytes).add(bytes)),
        );
        if images < 0 {
            let has_none = Condition::all()
                .add(creator::Column::Subject.eq(subject))
                .add(creator::Column::Images.lte(0));
            self.txn.later(creator::Entity::delete_many().filter(has_none));
        }
    }
}
