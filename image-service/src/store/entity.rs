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

/// Makes the module of a table from its key and its other columns.
macro_rules! table {
    (
        $(#[$about:meta])*
        $module:ident, $table:literal, key { $($(#[$about_key:meta])* $key:ident: $key_type:ty),+ $(,)? }
        $($(#[$about_column:meta])* $column:ident: $type:ty,)*
    ) => {
        $(#[$about])*
        pub(crate) mod $module {
            use sea_orm::entity::prelude::*;

            #[allow(unused_imports, reason = "each table has columns of some of these")]
            use super::*;

            #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
            #[sea_orm(table_name = $table)]
            pub(crate) struct Model {
                $($(#[$about_key])* #[sea_orm(primary_key, auto_increment = false)] pub(crate) $key: $key_type,)+
                $($(#[$about_column])* pub(crate) $column: $type,)*
            }

            #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
            pub(crate) enum Relation {}

            impl ActiveModelBehavior for ActiveModel {}
        }
    };
}

table! {
    /// One row: what holds for the whole catalogue.
    catalogue, "catalogue", key { id: i32 }
    /// Names this database.
    history: Uuid,
    /// The revision of the latest change.
    revision: i64,
    /// The nonce of the latest change.
    nonce: i64,
    /// Changes up to this revision are no longer in the change log.
    compacted_revision: i64,
    /// The nonce of the last change that was forgotten.
    compacted_nonce: i64,
    /// The round that the queue is in.
    round: i64,
    /// No queued build is of a round before this one.
    first_round: i64,
    /// The time of the latest change.
    changed_at: Timestamp,
    /// The memory that all images take in the index. Bytes.
    index_bytes: i64,
}

table! {
    image, "images", key { id: ImageId }
    name: String,
    description: String,
    creator: String,
    status: StatusCode,
    status_message: String,
    repository: String,
    tag: String,
    reference_given: bool,
    template: bool,
    snapshot: bool,
    enabled: bool,
    pulled: bool,
    configuration_revision: i64,
    artifact_json: Option<AsJson<Artifact>>,
    /// The engine's identifier of the artifact.
    artifact_image: Option<String>,
    created_at: Timestamp,
    updated_at: Timestamp,
    revision: i64,
    /// The revision of the last change that a client made to the record.
    edit_revision: Etag,
    latest_build: Option<BuildId>,
    /// A tombstone: invisible, and gone once the latest build is final.
    deleted: bool,
    /// The memory that it takes in the index. Bytes.
    index_bytes: i64,
}

table! {
    configuration, "configurations", key { image: ImageId, revision: i64 }
    json: String,
    /// The digest of the archive that it names.
    archive: Option<String>,
    /// The image that what is generated starts from.
    base: Option<String>,
}

table! {
    /// The artifacts that workers have reported as made, until they have removed it.
    made_image, "made_images", key { worker: String, engine_id: String }
}

table! {
    /// Archives that were uploaded, or are being.
    context, "contexts", key { upload: Uuid }
    /// None until it is whole, and when it is about to be forgotten.
    digest: Option<ContextDigest>,
    size_bytes: i64,
    gzip: bool,
    /// The offset of the blocks that mark the end of the tar. Bytes.
    tar_end: i64,
    /// The time of its upload, or of the last time that a configuration named it.
    used_at: Timestamp,
}

table! {
    /// The bytes of an archive, in order from 0.
    context_chunk, "context_chunks", key { upload: Uuid, number: i64 }
    bytes: Vec<u8>,
}

table! {
    /// The requesters that have had a build claimed in the round that the queue has come to.
    turn, "turns", key { round: i64, requester: String }
}

table! {
    build, "builds", key { id: BuildId }
    image: ImageId,
    number: i64,
    kind: Kind,
    state: State,
    attempt: i32,
    failures: i32,
    requested_by: String,
    queued_at: Timestamp,
    started_at: Option<Timestamp>,
    finished_at: Option<Timestamp>,
    worker: Option<String>,
    claimed_at: Option<Timestamp>,
    lease_expires_at: Option<Timestamp>,
    cancel_requested_at: Option<Timestamp>,
    stop_confirmed: bool,
    report_sequence: i64,
    last_sequence: i64,
    steps_total: i32,
    steps_done: i32,
    steps_cached: i32,
    error_json: Option<AsJson<Failure>>,
    log_bytes: i64,
    log_truncated: bool,
    configuration_revision: i64,
    repository: String,
    tag: String,
    /// The labels that a worker must have to take it.
    requirements_json: AsJson<Requirements>,
    /// A digest of the requirements and the preferred worker: the queue is searched by it.
    requirements_key: String,
    preferred_worker: Option<String>,
    workspace_json: Option<AsJson<Workspace>>,
    round: i64,
    /// The earliest time at which it may be claimed again.
    not_before: Option<Timestamp>,
    /// The `traceparent` of the call that has asked for it.
    trace: Option<String>,
}

table! {
    /// Chunks of the builds' histories: what one transaction appended.
    build_record, "build_records", key { build: BuildId, first_sequence: i64 }
    last_sequence: i64,
    json: String,
}

table! {
    /// The change log: one row a change of an image, in the order of commits.
    change, "changes", key { revision: i64 }
    /// Chosen at random: a restored backup goes on with others.
    nonce: i64,
    image: ImageId,
    kind: ChangeKind,
    /// Its creator, who sees it as long as it exists; and those who may have gained or lost sight of it by this change.
    creator: String,
    grantees_json: AsJson<BTreeSet<Grantee>>,
    changed_at: Timestamp,
}

table! {
    worker, "workers", key { name: String }
    labels_json: AsJson<BTreeMap<String, String>>,
    slots: i32,
    engine_version: String,
    capabilities_json: AsJson<BTreeSet<Capability>>,
    /// The worker's process.
    instance: String,
    /// The connection that speaks for the worker; none when it said goodbye.
    session: Option<Uuid>,
    connected_at: Timestamp,
    heard_at: Timestamp,
    /// Set when an operator wants it to get no more builds.
    drained: bool,
    /// Set when it takes no more builds by itself.
    draining: bool,
    /// The version of the dispatch protocol that it speaks; 0 where an earlier version wrote the row.
    protocol_version: i32,
    /// The reason for which it gets no builds at all; empty when it takes some.
    unsupported_reason: String,
    withheld_json: AsJson<Vec<WithheldAbility>>,
    /// A warning to operators about its engine; empty when there is none.
    engine_warning: String,
    /// It holds no build that was claimed before this.
    held_since: Timestamp,
}

table! {
    /// The permissions that others than its creator have of an image.
    grant, "grants", key { image: ImageId, grantee: Grantee }
    view: bool,
    modify: bool,
    delete: bool,
}

table! {
    /// The image that a reference belongs to: because it is set, because a build under way will write it, or because the artifact
    /// has it.
    image_reference, "image_references", key { repository: String, tag: String }
    image: ImageId,
}

table! {
    /// The use of the images of a creator together.
    creator, "creators", key { subject: String }
    images: i64,
    /// In the memory of the index. Bytes.
    index_bytes: i64,
}

table! {
    /// The answers to requests that may be repeated.
    answer, "answers", key { subject: String, request: String }
    digest: String,
    json: String,
    answered_at: Timestamp,
}
