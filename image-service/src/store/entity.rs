//! The tables, as sea-orm sees them. How a column keeps a noun is said in [`values`](super::values).

use std::collections::{BTreeMap, BTreeSet};

use super::values::{AsJson, StatusCode};
use crate::{
    access::Grantee,
    build::{BuildId, Failure, Kind, State, Workspace},
    change::ChangeKind,
    context::ContextDigest,
    dispatch::WithheldAbility,
    image::{Artifact, Capability, Etag, ImageId, Requirements},
    timestamp::Timestamp,
};

/// Makes the module of a table from the fields of a row.
macro_rules! table {
    ($(#[$about:meta])* $module:ident, $table:tt $($fields:tt)*) => {
        $(#[$about])*
        pub(crate) mod $module {
            use sea_orm::entity::prelude::*;

            #[allow(unused_imports, reason = "each table has columns of some of these")]
            use super::*;

            #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
            #[sea_orm(table_name = $table)]
            pub(crate) struct Model { $($fields)* }

            #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
            pub(crate) enum Relation {}

            impl ActiveModelBehavior for ActiveModel {}
        }
    };
}

table! {
    /// One row: what holds for the whole catalogue.
    catalogue, "catalogue"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: i32,
        /// Names this database.
        pub(crate) history: Uuid,
        /// The revision of the latest change.
        pub(crate) revision: i64,
        /// That of the latest change.
        pub(crate) nonce: i64,
        /// Changes up to this revision are no longer in the change log.
        pub(crate) compacted_revision: i64,
        /// That of the last change that was forgotten.
        pub(crate) compacted_nonce: i64,
        /// The round that the queue is in.
        pub(crate) round: i64,
        /// No queued build is of a round before this one.
        pub(crate) first_round: i64,
        /// When the latest change was made.
        pub(crate) changed_at: Timestamp,
        /// The memory that all images take in the index. Bytes.
        pub(crate) index_bytes: i64,
}

table! {
    image, "images"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: ImageId,
        pub(crate) name: String,
        pub(crate) description: String,
        pub(crate) creator: String,
        pub(crate) status: StatusCode,
        pub(crate) status_message: String,
        pub(crate) repository: String,
        pub(crate) tag: String,
        pub(crate) reference_given: bool,
        pub(crate) template: bool,
        pub(crate) snapshot: bool,
        pub(crate) enabled: bool,
        pub(crate) pulled: bool,
        pub(crate) configuration_revision: i64,
        pub(crate) artifact_json: Option<AsJson<Artifact>>,
        /// The engine's identifier of the artifact.
        pub(crate) artifact_image: Option<String>,
        pub(crate) created_at: Timestamp,
        pub(crate) updated_at: Timestamp,
        pub(crate) revision: i64,
        /// The revision of the last change that a client made to the record.
        pub(crate) edit_revision: Etag,
        pub(crate) latest_build: Option<BuildId>,
        /// A tombstone: invisible, and gone once the latest build is final.
        pub(crate) deleted: bool,
        /// The memory that it takes in the index. Bytes.
        pub(crate) index_bytes: i64,
}

table! {
    configuration, "configurations"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) image: ImageId,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) revision: i64,
        pub(crate) json: String,
        /// The digest of the archive that it names.
        pub(crate) archive: Option<String>,
        /// The image that what is generated starts from.
        pub(crate) base: Option<String>,
}

table! {
    /// The artifacts that workers have reported as made, until they have removed it.
    made_image, "made_images"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) worker: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) engine_id: String,
}

table! {
    /// Archives that were uploaded, or are being.
    context, "contexts"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) upload: Uuid,
        /// None until it is whole, and when it is about to be forgotten.
        pub(crate) digest: Option<ContextDigest>,
        pub(crate) size_bytes: i64,
        pub(crate) gzip: bool,
        /// Where the blocks that mark the end of the tar begin.
        pub(crate) tar_end: i64,
        /// When it was uploaded or named last.
        pub(crate) used_at: Timestamp,
}

table! {
    /// The bytes of an archive, in order from 0.
    context_chunk, "context_chunks"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) upload: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) number: i64,
        pub(crate) bytes: Vec<u8>,
}

table! {
    /// The requesters that have had a build claimed in the round that the queue has come to.
    turn, "turns"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) round: i64,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) requester: String,
}

table! {
    build, "builds"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: BuildId,
        pub(crate) image: ImageId,
        pub(crate) number: i64,
        pub(crate) kind: Kind,
        pub(crate) state: State,
        pub(crate) attempt: i32,
        pub(crate) failures: i32,
        pub(crate) requested_by: String,
        pub(crate) queued_at: Timestamp,
        pub(crate) started_at: Option<Timestamp>,
        pub(crate) finished_at: Option<Timestamp>,
        pub(crate) worker: Option<String>,
        pub(crate) claimed_at: Option<Timestamp>,
        pub(crate) lease_expires_at: Option<Timestamp>,
        pub(crate) cancel_requested_at: Option<Timestamp>,
        pub(crate) stop_confirmed: bool,
        pub(crate) report_sequence: i64,
        pub(crate) last_sequence: i64,
        pub(crate) steps_total: i32,
        pub(crate) steps_done: i32,
        pub(crate) steps_cached: i32,
        pub(crate) error_json: Option<AsJson<Failure>>,
        pub(crate) log_bytes: i64,
        pub(crate) log_truncated: bool,
        pub(crate) configuration_revision: i64,
        pub(crate) repository: String,
        pub(crate) tag: String,
        /// The labels that a worker must have to take it.
        pub(crate) requirements_json: AsJson<Requirements>,
        /// A digest of the requirements and the preferred worker: the queue is searched by it.
        pub(crate) requirements_key: String,
        pub(crate) preferred_worker: Option<String>,
        pub(crate) workspace_json: Option<AsJson<Workspace>>,
        pub(crate) round: i64,
        /// The earliest time at which it may be claimed again.
        pub(crate) not_before: Option<Timestamp>,
        /// The `traceparent` of the call that has asked for it.
        pub(crate) trace: Option<String>,
}

table! {
    /// Chunks of the builds' histories: what one transaction appended.
    build_record, "build_records"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) build: BuildId,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) first_sequence: i64,
        pub(crate) last_sequence: i64,
        pub(crate) json: String,
}

table! {
    /// The change log: one row a change of an image, in the order of commits.
    change, "changes"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) revision: i64,
        /// Chosen at random: a restored backup goes on with others.
        pub(crate) nonce: i64,
        pub(crate) image: ImageId,
        pub(crate) kind: ChangeKind,
        /// Its creator, who sees it as long as it exists; and those who may have gained or lost sight of it by this change.
        pub(crate) creator: String,
        pub(crate) grantees_json: AsJson<BTreeSet<Grantee>>,
        pub(crate) changed_at: Timestamp,
}

table! {
    worker, "workers"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) name: String,
        pub(crate) labels_json: AsJson<BTreeMap<String, String>>,
        pub(crate) slots: i32,
        pub(crate) engine_version: String,
        pub(crate) capabilities_json: AsJson<BTreeSet<Capability>>,
        /// The worker's process.
        pub(crate) instance: String,
        /// The connection that speaks for the worker; none when it said goodbye.
        pub(crate) session: Option<Uuid>,
        pub(crate) connected_at: Timestamp,
        pub(crate) heard_at: Timestamp,
        /// Whether an operator wants it to get nothing more.
        pub(crate) drained: bool,
        /// Whether it says so itself.
        pub(crate) draining: bool,
        /// The version of the dispatch protocol that it speaks; 0 where an earlier version wrote the row.
        pub(crate) protocol_version: i32,
        /// Why it gets no builds at all; empty when it takes some.
        pub(crate) unsupported_reason: String,
        pub(crate) withheld_json: AsJson<Vec<WithheldAbility>>,
        /// What an operator has to know of its engine; empty when there is nothing.
        pub(crate) engine_warning: String,
        /// It holds no build that was claimed before this.
        pub(crate) held_since: Timestamp,
}

table! {
    /// The permissions that others than its creator have of an image.
    grant, "grants"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) image: ImageId,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) grantee: Grantee,
        pub(crate) view: bool,
        pub(crate) modify: bool,
        pub(crate) delete: bool,
}

table! {
    /// The image that a reference belongs to: because it is set, because a build under way will write it, or because the artifact
    /// has it.
    image_reference, "image_references"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) repository: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) tag: String,
        pub(crate) image: ImageId,
}

table! {
    /// The use of the images of a creator together.
    creator, "creators"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) subject: String,
        pub(crate) images: i64,
        /// In the memory of the index. Bytes.
        pub(crate) index_bytes: i64,
}

table! {
    /// The answers to requests that may be repeated.
    answer, "answers"
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) subject: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) request: String,
        pub(crate) digest: String,
        pub(crate) json: String,
        pub(crate) answered_at: Timestamp,
}
