//! The fourth schema: the queue takes turns between those who ask for builds, and workers can be drained.

use sea_orm_migration::{
    prelude::*,
    schema::{big_integer, boolean},
};

pub(super) struct Turns;

impl MigrationName for Turns {
    fn name(&self) -> &'static str {
        "m0004_turns"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Turns {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let add = |table: &'static str, column: &mut ColumnDef| {
            Table::alter().table(table).add_column(column.take()).take()
        };
        // What is queued already is of one round: the oldest goes first, as before.
        manager.alter_table(add("builds", big_integer("round").default(0))).await?;
        manager.alter_table(add("catalogue", big_integer("round").default(0))).await?;
        for column in ["drained", "draining"] {
            manager.alter_table(add("workers", boolean(column).default(false))).await?;
        }
        for index in INDEXES {
            manager.get_connection().execute_unprepared(index).await?;
        }
        Ok(())
    }
}

const INDEXES: [&str; 4] = [
    "DROP INDEX builds_by_requirements",
    "CREATE INDEX builds_by_requirements ON builds (state, requirements_key, round, queued_at, id)",
    "CREATE INDEX builds_by_turn ON builds (state, round, queued_at, id)",
    "CREATE INDEX builds_of_requester ON builds (requested_by, round)",
];
