//! The tables as sea-orm entities. The types of columns are in [`values`](super::values).

use std::collections::{BTreeMap, BTreeSet};

use super::values::{AsJson, StatusCode};
use crate::{
    access::{Grantee, Identity, Pools},
    build::{BuildId, DistantBase, Failure, Kind, State, Workspace},
    build_context::ContextDigest,
    change::ChangeKind,
    dispatch::WithheldAbility,
    image::{Artifact, Capability, Etag, ImageId, Requirements},
    timestamp::Timestamp,
};

/// Defines the module of a table from its key and its other columns.
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
    /// State of the whole catalogue, in a single row.
    catalogue, "catalogue", key { id: i32 }
    /// Identifier of this database.
    catalogue_id: Uuid,
    /// Revision of the latest change.
    revision: i64,
    nonce: i64,
    /// Revision of the last compacted change.
    compacted_revision: i64,
    compacted_nonce: i64,
    /// Current round of the queue.
    round: i64,
    /// Lower bound of the rounds of queued builds.
    first_round: i64,
    /// Time of the latest change.
    changed_at: Timestamp,
    /// Memory that all images take in the index, in bytes.
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
    /// Engine's identifier of the artifact.
    artifact_image: Option<String>,
    /// Digest of the artifact's configuration, if it is not the engine's identifier.
    artifact_config: Option<String>,
    /// Digest of the artifact in a registry.
    artifact_digest: Option<String>,
    /// Worker whose engine holds the artifact, or held it until it was lost.
    artifact_worker: Option<String>,
    artifact_missing: bool,
    created_at: Timestamp,
    updated_at: Timestamp,
    revision: i64,
    /// Revision of the last change that a client made to the record.
    edit_revision: Etag,
    latest_build: Option<BuildId>,
    /// Set on a tombstone: the image is invisible, and purged once its latest build is final.
    deleted: bool,
    /// Memory that the image takes in the index, in bytes.
    index_bytes: i64,
}

table! {
    configuration, "configurations", key { image: ImageId, revision: i64 }
    json: String,
    /// Digest of the archive that the configuration names.
    archive: Option<String>,
    /// Base image of a generated Dockerfile.
    base: Option<String>,
}

table! {
    /// Artifacts that workers have reported as made, and not removed yet.
    engine_image, "engine_images", key { worker: String, engine_id: String }
    /// Digest of the configuration, if it is not the engine's identifier.
    config_digest: Option<String>,
}

table! {
    /// Digests in registries, and of their configurations, of all artifacts that were ever pushed, by which
    /// they are known under any name of a registry.
    pushed_digest, "pushed_digests", key { digest: String }
}

table! {
    /// Archives, and uploads under way.
    context, "contexts", key { upload: Uuid }
    /// `None` while the upload is incomplete or about to be deleted.
    digest: Option<ContextDigest>,
    /// Caller that has uploaded it first.
    uploader: String,
    /// Size in bytes; of an upload, what has been received.
    size_bytes: i64,
    /// The stored form of the paths of its files; empty while the upload is incomplete.
    paths: Vec<u8>,
    /// Time of the upload, or of the last time that a configuration named the archive.
    used_at: Timestamp,
}

table! {
    /// Bytes of archives, in chunks numbered from 0.
    context_chunk, "context_chunks", key { upload: Uuid, number: i64 }
    bytes: Vec<u8>,
}

table! {
    /// Requesters of builds that were claimed in the current round of the queue.
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
    requester_json: AsJson<Identity>,
    creator: String,
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
    /// Labels that a worker must have to take the build.
    requirements_json: AsJson<Requirements>,
    base_json: Option<AsJson<DistantBase>>,
    /// Digest of all that decides which workers may take the build or should, by which the queue is searched.
    requirements_key: String,
    preferred_worker: Option<String>,
    workspace_json: Option<AsJson<Workspace>>,
    round: i64,
    /// Earliest time at which the build may be claimed again.
    not_before: Option<Timestamp>,
    /// `traceparent` of the call that requested the build.
    trace: Option<String>,
}

table! {
    /// Chunks of build histories, each appended by one transaction.
    build_record, "build_records", key { build: BuildId, first_sequence: i64 }
    last_sequence: i64,
    json: String,
}

table! {
    /// The change log, with one row per change of an image, in commit order.
    change, "changes", key { revision: i64 }
    /// Random number, which differs in the changes after a backup was restored.
    nonce: i64,
    image: ImageId,
    kind: ChangeKind,
    /// Creator of the image, who always sees it. Only the grantees below may have gained or lost visibility
    /// of it by this change.
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
    pools_json: AsJson<Pools>,
    /// Identifier of the worker's process.
    instance: String,
    /// Session that speaks for the worker; `None` after it said goodbye.
    session: Option<Uuid>,
    connected_at: Timestamp,
    heard_at: Timestamp,
    /// Set if an operator wants the worker to get no more builds.
    drained: bool,
    /// Set while the worker itself takes no more builds.
    draining: bool,
    /// Version of the dispatch protocol that it speaks; 0 if an earlier version wrote the row.
    protocol_version: i32,
    /// Reason for giving it no builds at all; empty if it gets some.
    unsupported_reason: String,
    withheld_json: AsJson<Vec<WithheldAbility>>,
    /// Warning to operators about its engine; empty if there is none.
    engine_warning: String,
    /// Lower bound of the claim times of the builds that it holds.
    held_since: Timestamp,
}

table! {
    /// Permissions on images for others than their creators.
    grant, "grants", key { image: ImageId, grantee: Grantee }
    view: bool,
    modify: bool,
    delete: bool,
}

table! {
    /// Owners of references. An image owns those that it is set to, that its active build will write, or that
    /// its artifact has.
    image_reference, "image_references", key { repository: String, tag: String }
    image: ImageId,
}

table! {
    /// Usage of each caller that has any.
    creator, "creators", key { subject: String }
    /// Number of images that the caller has created.
    images: i64,
    /// Memory that the images take in the index, in bytes.
    index_bytes: i64,
    /// Size of the archives that the caller has uploaded, in bytes.
    context_bytes: i64,
    /// Size of the remembered answers to the caller, in bytes.
    answer_bytes: i64,
}

table! {
    /// Answers to requests that may be repeated.
    answer, "answers", key { subject: String, request: String }
    digest: String,
    json: String,
    /// Size of the row, in bytes.
    bytes: i64,
    answered_at: Timestamp,
}
