//! The fifth schema: a build knows when it was claimed, so that a worker that never begins it does not keep it.

use sea_orm_migration::{prelude::*, schema::big_integer_null};

pub(super) struct Accepting;

impl MigrationName for Accepting {
    fn name(&self) -> &'static str {
        "m0005_accepting"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Accepting {
    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let column = big_integer_null("claimed_at");
        manager.alter_table(Table::alter().table("builds").add_column(column).take()).await
    }
}
