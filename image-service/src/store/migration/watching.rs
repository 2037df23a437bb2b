//! The third schema: a change log that is forgotten in time, and whose places tell a restored backup.

use sea_orm_migration::{prelude::*, schema::big_integer};

pub(super) struct Watching;

impl MigrationName for Watching {
    fn name(&self) -> &'static str {
        "m0003_watching"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Watching {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in [
            ("changes", "nonce"),
            ("changes", "changed_at"),
            ("catalogue", "nonce"),
            ("catalogue", "compacted_nonce"),
        ] {
            let mut column = big_integer(column);
            let add = Table::alter().table(table).add_column(column.default(0).take()).take();
            manager.alter_table(add).await?;
        }
        Ok(())
    }
}
