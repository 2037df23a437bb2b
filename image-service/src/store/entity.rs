//! The tables, as sea-orm sees them. Times are microseconds since the epoch; kinds and states are small numbers that
//! the rows beside this file give and read; texts named `json` are serialised nouns.
#![expect(unreachable_pub, reason = "sea-orm's derives want public items")]

/// Makes the module of a table from the fields of a row.
macro_rules! table {
    ($(#[$about:meta])* $module:ident, $table:tt $($fields:tt)*) => {
        $(#[$about])*
        pub(crate) mod $module {
            use sea_orm::entity::prelude::*;

            #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
            #[sea_orm(table_name = $table)]
            pub struct Model { $($fields)* }

            #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
            pub enum Relation {}

            impl ActiveModelBehavior for ActiveModel {}
        }
    };
}

table! {
    /// One row: what holds for the whole catalogue.
    catalogue, "catalogue"
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i32,
        /// Names this database.
        pub history: Uuid,
        /// The revision of the latest change.
        pub revision: i64,
        /// That of the latest change.
        pub nonce: i64,
        /// Changes up to this revision are no longer in the change log.
        pub compacted_revision: i64,
        /// That of the last change that was forgotten.
        pub compacted_nonce: i64,
        /// The round that the queue is in.
        pub round: i64,
        /// No queued build is of a round before this one.
        pub first_round: i64,
        /// When the latest change was made.
        pub changed_at: i64,
        /// The memory that all images take in the index. Bytes.
        pub index_bytes: i64,
}

table! {
    image, "images"
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub name: String,
        pub description: String,
        pub creator: String,
        pub status: i32,
        pub status_message: String,
        pub repository: String,
        pub tag: String,
        pub reference_given: bool,
        pub template: bool,
        pub snapshot: bool,
        pub enabled: bool,
        pub pulled: bool,
        pub configuration_revision: i64,
        pub artifact_json: Option<String>,
        /// The engine's identifier of the artifact.
        pub artifact_image: Option<String>,
        pub created_at: i64,
        pub updated_at: i64,
        pub revision: i64,
        /// The revision of the last change that a client made to the record: its etag.
        pub edit_revision: i64,
        pub latest_build: Option<Uuid>,
        /// A tombstone: invisible, and gone once the latest build is final.
        pub deleted: bool,
        /// The memory that it takes in the index. Bytes.
        pub index_bytes: i64,
}

table! {
    configuration, "configurations"
        #[sea_orm(primary_key, auto_increment = false)]
        pub image: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub revision: i64,
        pub json: String,
        /// The digest of the archive that it names.
        pub archive: Option<String>,
        /// The image that what is generated starts from.
        pub base: Option<String>,
}

table! {
    /// The artifacts that workers have reported as made, until they have removed it.
    made_image, "made_images"
        #[sea_orm(primary_key, auto_increment = false)]
        pub worker: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub engine_id: String,
}

table! {
    /// Archives that were uploaded, or are being.
    context, "contexts"
        #[sea_orm(primary_key, auto_increment = false)]
        pub upload: Uuid,
        /// None until it is whole, and when it is about to be forgotten.
        pub digest: Option<String>,
        pub size_bytes: i64,
        pub gzip: bool,
        /// Where the blocks that mark the end of the tar begin.
        pub tar_end: i64,
        /// When it was uploaded or named last.
        pub used_at: i64,
}

table! {
    /// The bytes of an archive, in order from 0.
    context_chunk, "context_chunks"
        #[sea_orm(primary_key, auto_increment = false)]
        pub upload: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i64,
        pub bytes: Vec<u8>,
}

table! {
    /// The requesters that have had a build claimed in the round that the queue has come to.
    turn, "turns"
        #[sea_orm(primary_key, auto_increment = false)]
        pub round: i64,
        #[sea_orm(primary_key, auto_increment = false)]
        pub requester: String,
}

table! {
    build, "builds"
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub image: Uuid,
        pub number: i64,
        pub kind: i32,
        pub state: i32,
        pub attempt: i32,
        pub failures: i32,
        pub requested_by: String,
        pub queued_at: i64,
        pub started_at: Option<i64>,
        pub finished_at: Option<i64>,
        pub worker: Option<String>,
        pub claimed_at: Option<i64>,
        pub lease_expires_at: Option<i64>,
        pub cancel_requested_at: Option<i64>,
        pub stop_confirmed: bool,
        pub report_sequence: i64,
        pub last_sequence: i64,
        pub steps_total: i32,
        pub steps_done: i32,
        pub steps_cached: i32,
        pub error_json: Option<String>,
        pub log_bytes: i64,
        pub log_truncated: bool,
        pub configuration_revision: i64,
        pub repository: String,
        pub tag: String,
        /// The labels that a worker must have to take it.
        pub requirements_json: String,
        /// A digest of the requirements and the preferred worker: the queue is searched by it.
        pub requirements_key: String,
        pub preferred_worker: Option<String>,
        pub workspace_json: Option<String>,
        pub round: i64,
        /// The earliest time at which it may be claimed again.
        pub not_before: Option<i64>,
        /// The `traceparent` of the call that has asked for it.
        pub trace: Option<String>,
}

table! {
    /// Chunks of the builds' histories: what one transaction appended.
    build_record, "build_records"
        #[sea_orm(primary_key, auto_increment = false)]
        pub build: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub first_sequence: i64,
        pub last_sequence: i64,
        pub json: String,
}

table! {
    /// The change log: one row a change of an image, in the order of commits.
    change, "changes"
        #[sea_orm(primary_key, auto_increment = false)]
        pub revision: i64,
        /// Chosen at random: a restored backup goes on with others.
        pub nonce: i64,
        pub image: Uuid,
        pub kind: i32,
        /// Its creator, who sees it as long as it exists; and those who may have gained or lost sight of it by this change.
        pub creator: String,
        pub grantees_json: String,
        pub changed_at: i64,
}

table! {
    worker, "workers"
        #[sea_orm(primary_key, auto_increment = false)]
        pub name: String,
        pub labels_json: String,
        pub slots: i32,
        pub engine_version: String,
        pub capabilities_json: String,
        /// The worker's process.
        pub instance: String,
        /// The connection that speaks for the worker; none when it said goodbye.
        pub session: Option<Uuid>,
        pub connected_at: i64,
        pub heard_at: i64,
        /// Whether an operator wants it to get nothing more.
        pub drained: bool,
        /// Whether it says so itself.
        pub draining: bool,
        /// The version of the dispatch protocol that it speaks; 0 where an earlier version wrote the row.
        pub protocol_version: i32,
        /// Why it gets no builds at all; empty when it takes some.
        pub unsupported_reason: String,
        pub withheld_json: String,
        /// What an operator has to know of its engine; empty when there is nothing.
        pub engine_warning: String,
        /// It holds no build that was claimed before this.
        pub held_since: i64,
}

table! {
    /// The permissions that others than its creator have of an image.
    grant, "grants"
        #[sea_orm(primary_key, auto_increment = false)]
        pub image: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub grantee: String,
        pub view: bool,
        pub modify: bool,
        pub delete: bool,
}

table! {
    /// The image that a reference belongs to: because it is set, because a build under way will write it, or because the artifact
    /// has it.
    image_reference, "image_references"
        #[sea_orm(primary_key, auto_increment = false)]
        pub repository: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub tag: String,
        pub image: Uuid,
}

table! {
    /// The use of the images of a creator together.
    creator, "creators"
        #[sea_orm(primary_key, auto_increment = false)]
        pub subject: String,
        pub images: i64,
        /// In the memory of the index. Bytes.
        pub index_bytes: i64,
}

table! {
    /// The answers to requests that may be repeated.
    answer, "answers"
        #[sea_orm(primary_key, auto_increment = false)]
        pub subject: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub request: String,
        pub digest: String,
        pub json: String,
        pub answered_at: i64,
}
