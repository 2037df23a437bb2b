//! The schema, one migration a change of it.

use sea_orm_migration::{
    prelude::*,
    schema::{
        big_integer, big_integer_null, boolean, integer, string, string_null, text, text_null, uuid,
        uuid_null,
    },
};

mod accepting;
mod archives;
mod collecting;
mod eligibility;
mod finding;
mod operating;
mod sharing;
mod turns;
mod watching;

#[derive(Debug)]
pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(Catalogue),
            Box::new(sharing::Sharing),
            Box::new(watching::Watching),
            Box::new(turns::Turns),
            Box::new(accepting::Accepting),
            Box::new(archives::Archives),
            Box::new(collecting::Collecting),
            Box::new(operating::Traces),
            Box::new(operating::Queued),
            Box::new(finding::ChangeTimes),
            Box::new(finding::Finding),
            Box::new(finding::Orders),
            Box::new(finding::ShortTerms),
            Box::new(finding::Eras),
            Box::new(finding::UnsettledPlaces),
            Box::new(eligibility::Eligibility),
        ]
    }
}

/// The first schema: images, their configurations, builds and histories, the change log, workers.
struct Catalogue;

impl MigrationName for Catalogue {
    fn name(&self) -> &'static str {
        "m0001_catalogue"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Catalogue {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in tables() {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        let first_row = Query::insert()
            .into_table("catalogue")
            .columns(["id", "history", "revision", "compacted_revision"])
            .values_panic([1.into(), uuid::Uuid::new_v4().into(), 0_i64.into(), 0_i64.into()])
            .to_owned();
        manager.execute(first_row).await
    }
}

fn tables() -> Vec<TableCreateStatement> {
    vec![
        Table::create()
            .table("catalogue")
            .col(integer("id").primary_key())
            .col(uuid("history"))
            .col(big_integer("revision"))
            .col(big_integer("compacted_revision"))
            .take(),
        Table::create()
            .table("images")
            .col(uuid("id").primary_key())
            .col(text("name"))
            .col(text("description"))
            .col(string("creator"))
            .col(integer("status"))
            .col(text("status_message"))
            .col(string("repository"))
            .col(string("tag"))
            .col(big_integer("configuration_revision"))
            .col(text_null("artifact_json"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .col(big_integer("revision"))
            .col(uuid("latest_build"))
            .col(boolean("deleted"))
            .take(),
        Table::create()
            .table("configurations")
            .col(uuid("image"))
            .col(big_integer("revision"))
            .col(text("json"))
            .primary_key(Index::create().col("image").col("revision"))
            .take(),
        builds(),
        Table::create()
            .table("build_records")
            .col(uuid("build"))
            .col(big_integer("first_sequence"))
            .col(big_integer("last_sequence"))
            .col(text("json"))
            .primary_key(Index::create().col("build").col("first_sequence"))
            .take(),
        Table::create()
            .table("changes")
            .col(big_integer("revision").primary_key())
            .col(uuid("image"))
            .col(string("creator"))
            .take(),
        Table::create()
            .table("workers")
            .col(string("name").primary_key())
            .col(text("labels_json"))
            .col(integer("slots"))
            .col(string("engine_version"))
            .col(string("instance"))
            .col(uuid_null("session"))
            .col(big_integer("connected_at"))
            .col(big_integer("heard_at"))
            .take(),
    ]
}

fn builds() -> TableCreateStatement {
    Table::create()
        .table("builds")
        .col(uuid("id").primary_key())
        .col(uuid("image"))
        .col(big_integer("number"))
        .col(integer("kind"))
        .col(integer("state"))
        .col(integer("attempt"))
        .col(integer("failures"))
        .col(string("requested_by"))
        .col(big_integer("queued_at"))
        .col(big_integer_null("started_at"))
        .col(big_integer_null("finished_at"))
        .col(string_null("worker"))
        .col(big_integer_null("lease_expires_at"))
        .col(big_integer_null("cancel_requested_at"))
        .col(boolean("stop_confirmed"))
        .col(big_integer("report_sequence"))
        .col(big_integer("last_sequence"))
        .col(integer("steps_total"))
        .col(integer("steps_done"))
        .col(integer("steps_cached"))
        .col(text_null("error_json"))
        .col(big_integer("log_bytes"))
        .col(boolean("log_truncated"))
        .col(big_integer("configuration_revision"))
        .col(string("repository"))
        .col(string("tag"))
        .take()
}

fn indexes() -> Vec<IndexCreateStatement> {
    let index = |table: &'static str, name: &'static str, columns: &[&'static str]| {
        let mut index = Index::create();
        index.table(table).name(name);
        for column in columns {
            index.col(*column);
        }
        index
    };
    vec![
        // A tombstone keeps its reference until the work that may write it has stopped.
        index("images", "images_reference", &["repository", "tag"]).unique().take(),
        index("images", "images_by_update", &["updated_at", "id"]),
        index("images", "images_of_creator_by_update", &["creator", "updated_at", "id"]),
        index("builds", "builds_of_image", &["image", "number"]).unique().take(),
        index("builds", "builds_by_state", &["state", "queued_at", "id"]),
    ]
}
