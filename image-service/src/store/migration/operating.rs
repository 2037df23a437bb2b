//! What operating it needs: the trace of a build, and how many builds a caller has in the queue.

use sea_orm_migration::{prelude::*, schema::string_null};

/// The trace of a build.
pub(super) struct Traces;

impl MigrationName for Traces {
    fn name(&self) -> &'static str {
        "m0008_traces"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Traces {
    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.alter_table(Table::alter().table("builds").add_column(string_null("trace")).take()).await
    }
}

/// An index of the builds that a caller has in the queue.
pub(super) struct Queued;

impl MigrationName for Queued {
    fn name(&self) -> &'static str {
        "m0009_queued"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Queued {
    /// Not on Postgres, where it is built beside the work of replicas of the version before.
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let concurrently = match manager.get_database_backend() {
            sea_orm::DbBackend::Postgres => "CONCURRENTLY",
            sea_orm::DbBackend::Sqlite | sea_orm::DbBackend::MySql | _ => "",
        };
        let db = manager.get_connection();
        // One that was interrupted has left an index that is of no use.
        db.execute_unprepared("DROP INDEX IF EXISTS builds_queued_of_requester").await?;
        // Of the queued alone: 1 is their state.
        db.execute_unprepared(&format!(
            "CREATE INDEX {concurrently} builds_queued_of_requester ON builds (requested_by) WHERE state = 1"
        ))
        .await?;
        Ok(())
    }
}
