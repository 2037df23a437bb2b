//! What lists are found by: on SQLite an index of everything that can be asked for, in the order of updates; an index for each
//! order. A change has a time of its own, so that the order of updates is that of changes.

use sea_orm_migration::{prelude::*, schema::big_integer, sea_orm::DbBackend};

/// The time of the latest change.
pub(super) struct ChangeTimes;

impl MigrationName for ChangeTimes {
    fn name(&self) -> &'static str {
        "m0010_change_times"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for ChangeTimes {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let column = big_integer("changed_at").default(0).take();
        manager.alter_table(Table::alter().table("catalogue").add_column(column).take()).await?;
        // A clock that is put back now must not bring new changes behind those that there are.
        let latest = "UPDATE catalogue SET changed_at = COALESCE((SELECT MAX(updated_at) FROM images), 0)";
        manager.get_connection().execute_unprepared(latest).await?;
        Ok(())
    }
}

/// What lists are found by. SQLite's index is filled at the start.
pub(super) struct Finding;

impl MigrationName for Finding {
    fn name(&self) -> &'static str {
        "m0011_finding"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Finding {
    /// Not on Postgres, where indexes are built beside the work of replicas of the version before.
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let is_postgres = manager.get_database_backend() == DbBackend::Postgres;
        for (name, columns) in INDEXES {
            // One that was interrupted has left an index that is of no use.
            db.execute_unprepared(&format!("DROP INDEX IF EXISTS {name}")).await?;
            let concurrently = if is_postgres { "CONCURRENTLY" } else { "" };
            db.execute_unprepared(&format!("CREATE INDEX {concurrently} {name} ON images ({columns})"))
                .await?;
        }
        if !is_postgres {
            for statement in SQLITE {
                db.execute_unprepared(statement).await?;
            }
        }
        Ok(())
    }
}

/// For what has few values, ties are in the order of ids.
const INDEXES: [(&str, &str); 3] = [
    ("images_by_creator", "creator, id"),
    ("images_by_enabled", "enabled, id"),
    ("images_by_pulled", "pulled, id"),
];

const SQLITE: [&str; 8] = [
    "DROP TRIGGER IF EXISTS image_texts_inserted",
    "DROP TRIGGER IF EXISTS image_texts_deleted",
    "DROP TRIGGER IF EXISTS image_texts_updated",
    "DROP TABLE IF EXISTS image_search",
    "DROP TABLE IF EXISTS image_places",
    "CREATE TABLE image_places (place INTEGER PRIMARY KEY, image BLOB NOT NULL UNIQUE, updated_at INTEGER NOT NULL)",
    "DROP TABLE IF EXISTS image_index",
    "CREATE VIRTUAL TABLE image_index USING fts5 \
     (words, content = '', contentless_delete = 1, detail = none, tokenize = 'ascii')",
];
