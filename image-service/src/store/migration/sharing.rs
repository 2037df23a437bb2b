//! The second schema: grants, templates, editing, search, references of their own, remembered answers.

use sea_orm_migration::{
    prelude::*,
    schema::{big_integer, boolean, string, text, text_null, uuid, uuid_null},
    sea_orm::{
        ActiveValue::Set, ColumnTrait, DbBackend, EntityTrait, FromQueryResult, IntoActiveModel, QueryFilter,
        Statement,
    },
};
use uuid::Uuid;

use crate::{
    image::{Artifact, Configuration, Reference, search_text},
    store::{
        entity::{image, image_text},
        rows,
    },
};

pub(super) struct Sharing;

impl MigrationName for Sharing {
    fn name(&self) -> &'static str {
        "m0002_sharing"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Sharing {
    /// Whole or not at all, on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let database = manager.get_connection();
        for (table, column) in columns() {
            let add = Table::alter().table(table).add_column(column).take();
            manager.alter_table(add).await?;
        }
        // A template has no build.
        database
            .execute_unprepared(
                "UPDATE images SET latest_build_id = latest_build, edit_revision = revision, \
                 image_name = repository || ':' || tag",
            )
            .await?;
        database.execute_unprepared("ALTER TABLE images DROP COLUMN latest_build").await?;
        database
            .execute_unprepared("ALTER TABLE images RENAME COLUMN latest_build_id TO latest_build")
            .await?;
        manager.drop_index(Index::drop().table("images").name("images_reference").to_owned()).await?;
        for table in tables() {
            manager.create_table(table).await?;
        }
        database
            .execute_unprepared(
                "INSERT INTO image_references (repository, tag, image) SELECT repository, tag, id FROM images",
            )
            .await?;
        let is_postgres = manager.get_database_backend() == DbBackend::Postgres;
        let of_backend: &[&str] = if is_postgres { &POSTGRES } else { &SQLITE };
        for statement in of_backend {
            database.execute_unprepared(statement).await?;
        }
        for statement in INDEXES {
            database.execute_unprepared(statement).await?;
        }
        write_texts(manager).await
    }
}

fn columns() -> Vec<(&'static str, ColumnDef)> {
    let flag = |name: &'static str, default: bool| boolean(name).default(default).take();
    let json = |name: &'static str, default: &'static str| text(name).default(default).take();
    vec![
        ("images", string("image_name").default("").take()),
        ("images", flag("reference_given", true)),
        ("images", flag("template", false)),
        ("images", flag("snapshot", false)),
        ("images", flag("enabled", true)),
        ("images", flag("pulled", false)),
        ("images", big_integer("edit_revision").default(0).take()),
        ("images", uuid_null("latest_build_id").take()),
        ("builds", json("requirements_json", "{}")),
        ("builds", json("requirements_key", "")),
        ("builds", text_null("workspace_json").take()),
        ("changes", json("viewers_json", "[]")),
        ("workers", json("capabilities_json", "[]")),
    ]
}

fn tables() -> Vec<TableCreateStatement> {
    vec![
        Table::create()
            .table("grants")
            .col(uuid("image"))
            .col(string("subject"))
            .col(boolean("view"))
            .col(boolean("modify"))
            .col(boolean("delete"))
            .primary_key(Index::create().col("image").col("subject"))
            .take(),
        Table::create()
            .table("image_references")
            .col(string("repository"))
            .col(string("tag"))
            .col(uuid("image"))
            .primary_key(Index::create().col("repository").col("tag"))
            .take(),
        Table::create()
            .table("image_texts")
            .col(big_integer("row").auto_increment().primary_key())
            .col(uuid("image").unique_key())
            .col(text("text"))
            .take(),
        Table::create()
            .table("answers")
            .col(string("subject"))
            .col(string("request"))
            .col(string("digest"))
            .col(text("json"))
            .col(big_integer("answered_at"))
            .primary_key(Index::create().col("subject").col("request"))
            .take(),
    ]
}

const INDEXES: [&str; 10] = [
    "CREATE INDEX grants_of_subject ON grants (subject, image)",
    "CREATE INDEX references_of_image ON image_references (image)",
    "CREATE INDEX answers_by_time ON answers (answered_at)",
    "CREATE INDEX builds_by_requirements ON builds (state, requirements_key, queued_at, id)",
    "DROP INDEX images_by_update",
    "CREATE INDEX images_latest_first ON images (updated_at DESC, id)",
    "CREATE INDEX images_by_name ON images (name, id)",
    "CREATE INDEX images_by_creation ON images (created_at, id)",
    "CREATE INDEX images_by_image_name ON images (image_name, id)",
    "CREATE INDEX images_by_status ON images (status, id)",
];

/// The index of the texts holds no copy of them, and follows them by triggers.
const SQLITE: [&str; 4] = [
    "CREATE VIRTUAL TABLE image_search USING fts5 \
     (text, content = 'image_texts', content_rowid = 'row', tokenize = 'trigram case_sensitive 1')",
    "CREATE TRIGGER image_texts_inserted AFTER INSERT ON image_texts BEGIN \
     INSERT INTO image_search (rowid, text) VALUES (new.row, new.text); END",
    "CREATE TRIGGER image_texts_deleted AFTER DELETE ON image_texts BEGIN \
     INSERT INTO image_search (image_search, rowid, text) VALUES ('delete', old.row, old.text); END",
    "CREATE TRIGGER image_texts_updated AFTER UPDATE OF text ON image_texts BEGIN \
     INSERT INTO image_search (image_search, rowid, text) VALUES ('delete', old.row, old.text); \
     INSERT INTO image_search (rowid, text) VALUES (new.row, new.text); END",
];

/// Texts are ordered by code points, as on SQLite, whatever the database's locale is.
const POSTGRES: [&str; 7] = [
    "CREATE EXTENSION IF NOT EXISTS pg_trgm",
    "CREATE INDEX image_texts_trigrams ON image_texts USING gin (text gin_trgm_ops)",
    "ALTER TABLE images ALTER COLUMN name TYPE text COLLATE \"C\"",
    "ALTER TABLE images ALTER COLUMN creator TYPE text COLLATE \"C\"",
    "ALTER TABLE images ALTER COLUMN image_name TYPE text COLLATE \"C\"",
    "ALTER TABLE grants ALTER COLUMN subject TYPE text COLLATE \"C\"",
    "ALTER TABLE workers ALTER COLUMN name TYPE text COLLATE \"C\"",
];

#[derive(FromQueryResult)]
struct Found {
    id: Uuid,
    name: String,
    description: String,
    repository: String,
    tag: String,
    artifact_json: Option<String>,
    json: String,
}

/// What the images of the first schema are found by.
async fn write_texts(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    let database = manager.get_connection();
    let sql = "SELECT i.id, i.name, i.description, i.repository, i.tag, i.artifact_json, c.json FROM images i \
               JOIN configurations c ON c.image = i.id AND c.revision = i.configuration_revision";
    let statement = Statement::from_string(manager.get_database_backend(), sql);
    for found in Found::find_by_statement(statement).all(database).await? {
        let configuration: Configuration = rows::from_json(&found.json)?;
        let text = search_text(&found.name, &found.description, &configuration).as_str().to_owned();
        let mut row = image_text::Model { row: 0, image: found.id, text }.into_active_model();
        row.row = sea_orm::NotSet;
        image_text::Entity::insert(row).exec_without_returning(database).await?;
        // Until now a reference could not change: the artifact has that of its image.
        if let Some(mut artifact) =
            found.artifact_json.as_deref().map(rows::from_json::<Artifact>).transpose()?
        {
            artifact.reference = Some(Reference::from_stored(found.repository, found.tag));
            let row = image::ActiveModel {
                id: Set(found.id),
                artifact_json: Set(Some(rows::to_json(&artifact)?)),
                ..Default::default()
            };
            image::Entity::update_many()
                .set(row)
                .filter(image::Column::Id.eq(found.id))
                .exec(database)
                .await?;
        }
    }
    Ok(())
}
