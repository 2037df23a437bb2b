//! The sixteenth schema: when a build may be claimed again, and why a worker gets none.

use sea_orm_migration::{
    prelude::*,
    sea_orm::{ConnectionTrait, DbBackend},
};

use crate::store::is_locked;

pub(super) struct Eligibility;

impl MigrationName for Eligibility {
    fn name(&self) -> &'static str {
        "m0016_eligibility"
    }
}

/// Tables, and the columns that they get. Replicas of the version before write none of these.
const COLUMNS: [(&str, &str, &str); 5] = [
    ("builds", "not_before", "bigint"),
    ("workers", "protocol_version", "integer NOT NULL DEFAULT 0"),
    ("workers", "unsupported_reason", "text NOT NULL DEFAULT ''"),
    ("workers", "withheld_json", "text NOT NULL DEFAULT '[]'"),
    ("workers", "engine_warning", "text NOT NULL DEFAULT ''"),
];

#[async_trait::async_trait]
impl MigrationTrait for Eligibility {
    /// Each column is a step of its own, and one that is there is passed over.
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let is_shared = db.get_database_backend() == DbBackend::Postgres;
        for (table, column, kind) in COLUMNS {
            let add = format!("ALTER TABLE {table} ADD COLUMN {column} {kind}");
            while !manager.has_column(table, column).await? {
                if !is_shared {
                    db.execute_unprepared(&add).await?;
                    continue;
                }
                // Nobody waits behind this for who reads for long, as a backup does.
                let briefly = format!("BEGIN; SET LOCAL lock_timeout = 200; {add}; COMMIT");
                if let Err(error) = db.execute_unprepared(&briefly).await {
                    db.execute_unprepared("ROLLBACK").await?;
                    if !is_locked(&error) {
                        return Err(error);
                    }
                    db.execute_unprepared("SELECT pg_sleep(0.5)").await?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use sea_orm::ConnectionTrait;

    use crate::store::{Store, known::policy};

    #[tokio::test]
    async fn workers_of_the_version_before_take_builds_after_an_upgrade() -> Result<(), Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let store = Store::open(directory.path(), None, policy()).await?;
        for statement in [
            "ALTER TABLE builds DROP COLUMN not_before",
            "ALTER TABLE workers DROP COLUMN protocol_version",
            "ALTER TABLE workers DROP COLUMN unsupported_reason",
            // As if an upgrade was interrupted, `withheld_json` is there already.
            "DELETE FROM seaql_migrations WHERE version = 'm0016_eligibility'",
            "INSERT INTO workers (name, labels_json, slots, engine_version, capabilities_json, instance, connected_at, \
             heard_at, drained, draining) VALUES ('w1', '{}', 2, '28.5.2', '[]', 'a process', 1, 1, FALSE, FALSE)",
        ] {
            store.writer.execute_unprepared(statement).await?;
        }
        store.close().await?;
        let store = Store::open(directory.path(), None, policy()).await?;
        let workers = store.workers(None, 10).await?;
        let [worker] = workers.as_slice() else { panic!("{workers:?}") };
        assert_eq!((worker.name.as_str(), worker.protocol_version), ("w1", 0));
        assert!(worker.unsupported_reason.is_empty() && worker.withheld.is_empty());
        Ok(store.close().await?)
    }
}
