//! What operating it needs: the trace of a build, and how many builds a caller has in the queue.

use sea_orm_migration::{prelude::*, schema::string_null};

pub(super) struct Operating;

impl MigrationName for Operating {
    fn name(&self) -> &'static str {
        "m0008_operating"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Operating {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.alter_table(Table::alter().table("builds").add_column(string_null("trace")).take()).await?;
        // Of the queued alone: 1 is their state.
        let queued = "CREATE INDEX builds_queued_of_requester ON builds (requested_by) WHERE state = 1";
        manager.get_connection().execute_unprepared(queued).await?;
        Ok(())
    }
}
