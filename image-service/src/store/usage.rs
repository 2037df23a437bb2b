//! What the images of each creator, and all together, take in the memory of the index: counted in the transaction of every write
//! that changes it, so that the index can always be loaded again.

use sea_orm::{
    ColumnTrait, Condition, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, sea_query::Expr,
};

use super::{
    entity::{catalogue, creator},
    write::Write,
};
use crate::{
    error::Error,
    image::{Growth, Usage},
};

/// What a write adds; less than nothing where it takes away.
#[derive(Copy, Clone, Debug)]
pub(super) struct Change {
    pub(super) images: i64,
    pub(super) bytes: i64,
}

impl Write<'_> {
    /// Counts what a write adds to the images of a creator.
    ///
    /// # Errors
    ///
    /// Those of [`Quotas::admit`](crate::image::Quotas::admit).
    pub(super) async fn charge(&self, subject: &str, change: Change) -> Result<(), Error> {
        let Change { images, bytes } = change;
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
        let before = |now: i64, added: i64| u64::try_from(now - added).unwrap_or(0);
        let used = Usage {
            catalogue_bytes: before(of_all, bytes),
            creator_images: before(of_creator.images, images),
            creator_bytes: before(of_creator.index_bytes, bytes),
        };
        let added = |added: i64| u64::try_from(added).unwrap_or(0);
        self.store.quotas.admit(used, Growth { images: added(images), bytes: added(bytes) })
    }

    fn release(&self, subject: &str, change: Change) {
        let Change { images, bytes } = change;
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
