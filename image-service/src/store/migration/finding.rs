//! What lists are found by: on SQLite an index of everything that can be asked for, in the order of updates; on Postgres one of
//! terms, by era; an index for each order. A change has a time of its own, so that the order of updates is that of changes.

use sea_orm_migration::{
    prelude::*,
    schema::big_integer,
    sea_orm::{ConnectionTrait, DbBackend, Statement},
};

use crate::store::is_locked;

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

/// SQLite's index of images, which is filled at the start.
pub(super) struct Finding;

impl MigrationName for Finding {
    fn name(&self) -> &'static str {
        "m0011_finding"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Finding {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DbBackend::Sqlite {
            for statement in SQLITE {
                manager.get_connection().execute_unprepared(statement).await?;
            }
        }
        Ok(())
    }
}

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

/// An index for each order.
pub(super) struct Orders;

impl MigrationName for Orders {
    fn name(&self) -> &'static str {
        "m0012_orders"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Orders {
    /// Not on Postgres, where indexes are built beside the work of replicas of the version before.
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        for (name, columns) in ORDERS {
            create_index(db, name, &format!("images ({columns}, {LOOKED_AT})")).await?;
        }
        let concurrently = concurrently(db);
        for name in BEFORE {
            db.execute_unprepared(&format!("DROP INDEX {concurrently} IF EXISTS {name}")).await?;
        }
        Ok(())
    }
}

/// What Postgres' index has of terms of one or two characters, which have no trigram.
pub(super) struct ShortTerms;

impl MigrationName for ShortTerms {
    fn name(&self) -> &'static str {
        "m0013_short_terms"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for ShortTerms {
    /// Whole or not at all.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DbBackend::Postgres {
            manager.get_connection().execute_unprepared(SHORT_TERMS).await?;
        }
        Ok(())
    }
}

/// Postgres' eras of the order of updates, and one index of terms of every length by era.
pub(super) struct Eras;

impl MigrationName for Eras {
    fn name(&self) -> &'static str {
        "m0014_eras"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Eras {
    /// The index is built beside the work of replicas of the version before, and stands in for those that they know.
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() != DbBackend::Postgres {
            return Ok(());
        }
        let db = manager.get_connection();
        db.execute_unprepared(ERAS).await?;
        while !manager.has_column("image_texts", "era").await? {
            // Nobody waits behind this for who reads for long, as a backup does.
            if let Err(error) = db.execute_unprepared(ERA_OF_TEXT).await {
                db.execute_unprepared("ROLLBACK").await?;
                if !is_locked(&error) {
                    return Err(error);
                }
                db.execute_unprepared("SELECT pg_sleep(0.5)").await?;
            }
        }
        create_index(db, "image_texts_terms", TERMS_BY_ERA).await?;
        // What terms are common it has to know, to tell which are rare.
        db.execute_unprepared("ANALYZE image_texts").await?;
        for name in ["image_texts_trigrams", "image_texts_short_terms"] {
            db.execute_unprepared(&format!("DROP INDEX CONCURRENTLY IF EXISTS {name}")).await?;
        }
        Ok(())
    }
}

/// The places of SQLite's index of images that it is behind at.
pub(super) struct UnsettledPlaces;

impl MigrationName for UnsettledPlaces {
    fn name(&self) -> &'static str {
        "m0015_unsettled_places"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for UnsettledPlaces {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DbBackend::Sqlite {
            let table = "CREATE TABLE unsettled_places (place INTEGER PRIMARY KEY)";
            manager.get_connection().execute_unprepared(table).await?;
        }
        Ok(())
    }
}

const ERAS: &str = "CREATE TABLE IF NOT EXISTS eras \
    (era integer PRIMARY KEY, since bigint NOT NULL, until bigint NOT NULL, images bigint NOT NULL)";

const ERA_OF_TEXT: &str =
    "BEGIN; SET LOCAL lock_timeout = 200; ALTER TABLE image_texts ADD COLUMN era integer; COMMIT";

const TERMS_BY_ERA: &str =
    "image_texts USING gin (array_append(NULL::integer[], era), text gin_trgm_ops, short_terms(text))";

/// Every character of a text, and every two that follow one another, as numbers: code points have 21 bits.
const SHORT_TERMS: &str = "CREATE OR REPLACE FUNCTION short_terms(text) RETURNS bigint[] \
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$ \
    SELECT ARRAY(SELECT ascii(a)::bigint << 21 | ascii(b) \
    FROM unnest(string_to_array($1, NULL), string_to_array(substr($1, 2), NULL)) AS pairs (a, b) WHERE b IS NOT NULL) \
    || ARRAY(SELECT DISTINCT ascii(c)::bigint FROM unnest(string_to_array($1, NULL)) AS characters (c)) $$";

/// Creates an index unless there is one; on Postgres beside the work of others, and instead of one whose making was interrupted.
async fn create_index(db: &SchemaManagerConnection<'_>, name: &str, on: &str) -> Result<(), DbErr> {
    if db.get_database_backend() == DbBackend::Postgres && is_invalid(db, name).await? {
        db.execute_unprepared(&format!("DROP INDEX CONCURRENTLY {name}")).await?;
    }
    db.execute_unprepared(&format!("CREATE INDEX {} IF NOT EXISTS {name} ON {on}", concurrently(db))).await?;
    Ok(())
}

fn concurrently(db: &SchemaManagerConnection<'_>) -> &'static str {
    if db.get_database_backend() == DbBackend::Postgres { "CONCURRENTLY" } else { "" }
}

/// Whether Postgres was interrupted when it built an index.
async fn is_invalid(db: &SchemaManagerConnection<'_>, index: &str) -> Result<bool, DbErr> {
    let sql = format!(
        "SELECT 1 FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid \
         WHERE relname = '{index}' AND pg_table_is_visible(indrelid) AND NOT indisvalid"
    );
    let found = db.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
    Ok(found.is_some())
}

/// What has few values is walked value by value, in one direction. Of the others an index read backwards would not do: ids are
/// always in the one direction.
const ORDERS: [(&str, &str); 13] = [
    ("images_ordered_by_name", "name, id"),
    ("images_ordered_by_name_backwards", "name DESC, id"),
    ("images_ordered_by_image_name", "image_name, id"),
    ("images_ordered_by_image_name_backwards", "image_name DESC, id"),
    ("images_ordered_by_creation", "created_at, id"),
    ("images_ordered_by_creation_backwards", "created_at DESC, id"),
    ("images_ordered_by_update", "updated_at, id"),
    ("images_ordered_by_update_backwards", "updated_at DESC, id"),
    ("images_ordered_by_creator", "creator, id"),
    ("images_ordered_by_creator_backwards", "creator DESC, id"),
    ("images_ordered_by_status", "status, id"),
    ("images_ordered_by_enabled", "enabled, id"),
    ("images_ordered_by_pulled", "pulled, id"),
];

/// Says who sees an image and which filters let it through: those that are not looked for are passed by without being read.
const LOOKED_AT: &str = "creator, deleted, template, status, enabled, pulled";

/// What these stand in for.
const BEFORE: [&str; 8] = [
    "images_by_name",
    "images_by_image_name",
    "images_by_creation",
    "images_by_status",
    "images_by_creator",
    "images_by_enabled",
    "images_by_pulled",
    "images_latest_first",
];
