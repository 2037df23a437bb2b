//! The schema of 0.1.0.

use sea_orm_migration::{
    prelude::*,
    sea_orm::{ConnectionTrait, DbBackend},
};

pub(super) struct Initial;

impl MigrationName for Initial {
    fn name(&self) -> &'static str {
        "m0001_initial"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Initial {
    /// Runs the migration in a transaction on SQLite, too.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    #[expect(elided_lifetimes_in_paths, reason = "the trait's signature")]
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let is_postgres = manager.get_database_backend() == DbBackend::Postgres;
        // Text keys are ordered by code points, whatever the locale of the database.
        let (key, uuid, bytes, clustered) = if is_postgres {
            ("text COLLATE \"C\"", "uuid", "bytea", "")
        } else {
            ("text", "blob", "blob", " WITHOUT ROWID")
        };
        for statement in TABLES.iter().chain(&INDEXES) {
            let statement = statement
                .replace("KEY_TEXT", key)
                .replace("UUID", uuid)
                .replace("BYTES", bytes)
                .replace(" CLUSTERED", clustered);
            manager.get_connection().execute_unprepared(&statement).await?;
        }
        if is_postgres {
            manager.get_connection().execute_unprepared(MANY_GROUPS).await?;
        }
        let first_row = Query::insert()
            .into_table("catalogue")
            .columns(["id", "catalogue_id"])
            .values_panic([1.into(), uuid::Uuid::new_v4().into()])
            .to_owned();
        manager.execute(first_row).await
    }
}

const TABLES: [&str; 16] = [
    "CREATE TABLE catalogue (id integer PRIMARY KEY, catalogue_id UUID NOT NULL, revision bigint NOT NULL DEFAULT 0, \
     nonce bigint NOT NULL DEFAULT 0, compacted_revision bigint NOT NULL DEFAULT 0, \
     compacted_nonce bigint NOT NULL DEFAULT 0, round bigint NOT NULL DEFAULT 0, first_round bigint NOT NULL DEFAULT 0, changed_at bigint NOT NULL DEFAULT 0, \
     index_bytes bigint NOT NULL DEFAULT 0)",
    "CREATE TABLE images (id UUID PRIMARY KEY, name text NOT NULL, description text NOT NULL, creator KEY_TEXT NOT NULL, \
     status integer NOT NULL, status_message text NOT NULL, repository text NOT NULL, tag text NOT NULL, \
     reference_given boolean NOT NULL, template boolean NOT NULL, snapshot boolean NOT NULL, enabled boolean NOT NULL, \
     pulled boolean NOT NULL, configuration_revision bigint NOT NULL, artifact_json text, artifact_image text, \
     artifact_config text, artifact_digest text, artifact_worker text, artifact_missing boolean NOT NULL, created_at bigint NOT NULL, updated_at bigint NOT NULL, revision bigint NOT NULL, edit_revision bigint NOT NULL, \
     latest_build UUID, deleted boolean NOT NULL, index_bytes bigint NOT NULL)",
    "CREATE TABLE configurations (image UUID NOT NULL, revision bigint NOT NULL, json text NOT NULL, archive text, \
     base text, PRIMARY KEY (image, revision))",
    "CREATE TABLE grants (image UUID NOT NULL, grantee KEY_TEXT NOT NULL, view boolean NOT NULL, \
     modify boolean NOT NULL, \"delete\" boolean NOT NULL, PRIMARY KEY (image, grantee)) CLUSTERED",
    "CREATE TABLE image_references (repository KEY_TEXT NOT NULL, tag KEY_TEXT NOT NULL, image UUID NOT NULL, \
     PRIMARY KEY (repository, tag)) CLUSTERED",
    "CREATE TABLE creators (subject KEY_TEXT PRIMARY KEY, images bigint NOT NULL, index_bytes bigint NOT NULL, \
     context_bytes bigint NOT NULL, answer_bytes bigint NOT NULL) CLUSTERED",
    "CREATE TABLE builds (id UUID PRIMARY KEY, image UUID NOT NULL, number bigint NOT NULL, kind integer NOT NULL, \
     state integer NOT NULL, attempt integer NOT NULL, failures integer NOT NULL, requested_by KEY_TEXT NOT NULL, \
     requester_json text NOT NULL, \
     creator text NOT NULL, queued_at bigint NOT NULL, started_at bigint, finished_at bigint, worker text, claimed_at bigint, \
     lease_expires_at bigint, cancel_requested_at bigint, stop_confirmed boolean NOT NULL, report_sequence bigint NOT NULL, \
     last_sequence bigint NOT NULL, steps_total integer NOT NULL, steps_done integer NOT NULL, steps_cached integer NOT NULL, \
     error_json text, log_bytes bigint NOT NULL, log_truncated boolean NOT NULL, configuration_revision bigint NOT NULL, \
     repository text NOT NULL, tag text NOT NULL, requirements_json text NOT NULL, base_json text, requirements_key text NOT NULL, \
     preferred_worker text, workspace_json text, round bigint NOT NULL, not_before bigint, trace text)",
    "CREATE TABLE turns (round bigint NOT NULL, requester KEY_TEXT NOT NULL, PRIMARY KEY (round, requester)) CLUSTERED",
    "CREATE TABLE build_records (build UUID NOT NULL, first_sequence bigint NOT NULL, last_sequence bigint NOT NULL, \
     json text NOT NULL, PRIMARY KEY (build, first_sequence))",
    "CREATE TABLE changes (revision bigint PRIMARY KEY, nonce bigint NOT NULL, image UUID NOT NULL, kind integer NOT NULL, \
     creator text NOT NULL, grantees_json text NOT NULL, changed_at bigint NOT NULL)",
    "CREATE TABLE workers (name KEY_TEXT PRIMARY KEY, labels_json text NOT NULL, slots integer NOT NULL, \
     engine_version text NOT NULL, capabilities_json text NOT NULL, pools_json text NOT NULL, instance text NOT NULL, session UUID, \
     connected_at bigint NOT NULL, heard_at bigint NOT NULL, held_since bigint NOT NULL, drained boolean NOT NULL, draining boolean NOT NULL, \
     protocol_version integer NOT NULL, unsupported_reason text NOT NULL, withheld_json text NOT NULL, \
     engine_warning text NOT NULL)",
    "CREATE TABLE answers (subject KEY_TEXT NOT NULL, request KEY_TEXT NOT NULL, digest text NOT NULL, json text NOT NULL, \
     bytes bigint NOT NULL, answered_at bigint NOT NULL, PRIMARY KEY (subject, request))",
    "CREATE TABLE contexts (upload UUID PRIMARY KEY, digest text UNIQUE, uploader KEY_TEXT NOT NULL, size_bytes bigint NOT NULL, \
     paths BYTES NOT NULL, used_at bigint NOT NULL)",
    "CREATE TABLE context_chunks (upload UUID NOT NULL, number bigint NOT NULL, bytes BYTES NOT NULL, \
     PRIMARY KEY (upload, number))",
    "CREATE TABLE pushed_digests (digest KEY_TEXT PRIMARY KEY) CLUSTERED",
    "CREATE TABLE engine_images (worker text NOT NULL, engine_id text NOT NULL, config_digest text, \
     PRIMARY KEY (worker, engine_id)) CLUSTERED",
];

/// Indexes. Build state 1 is queued, 2 to 4 are held by a worker; statements must repeat a partial index's
/// condition literally.
///
/// No condition implies another one: Postgres, which takes each of these indexes for nearly empty, might use
/// any that fits, and read all of its dead entries.
const INDEXES: [&str; 18] = [
    "CREATE INDEX images_by_artifact ON images (artifact_image) WHERE artifact_image IS NOT NULL",
    "CREATE INDEX images_by_artifact_config ON images (artifact_config) WHERE artifact_config IS NOT NULL",
    "CREATE INDEX images_by_artifact_digest ON images (artifact_digest) WHERE artifact_digest IS NOT NULL",
    "CREATE INDEX images_by_artifact_worker ON images (artifact_worker, id) \
     WHERE artifact_worker IS NOT NULL AND artifact_digest IS NULL",
    "CREATE INDEX engine_images_by_config ON engine_images (worker, config_digest) WHERE config_digest IS NOT NULL",
    "CREATE INDEX configurations_by_archive ON configurations (archive) WHERE archive IS NOT NULL",
    "CREATE INDEX configurations_by_base ON configurations (base) WHERE base IS NOT NULL",
    "CREATE INDEX references_of_image ON image_references (image)",
    "CREATE UNIQUE INDEX builds_of_image ON builds (image, number)",
    "CREATE INDEX builds_queued_by_requirements ON builds (requirements_key, round, queued_at, id) WHERE state = 1",
    "CREATE INDEX builds_queued_by_turn ON builds (round, queued_at, id) WHERE state = 1",
    "CREATE INDEX builds_queued_by_time ON builds (queued_at) WHERE state = 1",
    "CREATE INDEX builds_queued_of_requester ON builds (requested_by, round) WHERE state = 1",
    "CREATE INDEX builds_held_by_worker ON builds (worker, claimed_at) WHERE state IN (2, 3, 4)",
    "CREATE INDEX builds_active_of_image ON builds (image) WHERE finished_at IS NULL",
    "CREATE INDEX answers_by_time ON answers (answered_at)",
    "CREATE INDEX answers_of_subject ON answers (subject, answered_at)",
    "CREATE INDEX contexts_by_use ON contexts (used_at)",
];

/// Statistics override. Having seen few groups, Postgres would search for the builds of one among all builds.
const MANY_GROUPS: &str = "ALTER TABLE builds ALTER COLUMN requirements_key SET (n_distinct = 1000)";
