//! Conversions between rows and domain types.

use sea_orm::{DbErr, FromQueryResult, QueryResult, Set};

use super::{
    entity,
    values::{AsJson, StatusCode, to_json},
};
use crate::{
    build::{Build, Steps},
    image::{Artifact, Image, Reference},
};

impl From<entity::image::Model> for Image {
    fn from(row: entity::image::Model) -> Self {
        let reference = Reference::from_stored(row.repository, row.tag);
        let artifact = row.artifact_json.map(AsJson::into_noun);
        Self {
            id: row.id,
            name: row.name,
            description: row.description,
            creator: row.creator,
            template: row.template,
            snapshot: row.snapshot,
            status: row.status.0,
            status_message: row.status_message,
            artifact_reference: artifact.clone().and_then(|artifact| artifact.reference_besides(&reference)),
            reference,
            reference_given: row.reference_given,
            enabled: row.enabled,
            pulled: row.pulled,
            configuration_revision: row.configuration_revision,
            artifact: artifact.map(Into::into),
            artifact_missing: row.artifact_missing,
            created_at: row.created_at,
            updated_at: row.updated_at,
            revision: row.revision,
            etag: row.edit_revision,
            latest_build: row.latest_build,
        }
    }
}

impl From<Image> for entity::image::Model {
    /// Converts an image into a row that is not deleted.
    fn from(image: Image) -> Self {
        let artifact = image.artifact();
        Self {
            id: image.id,
            name: image.name,
            description: image.description,
            creator: image.creator,
            status: StatusCode(image.status),
            status_message: image.status_message,
            repository: image.reference.repository().to_owned(),
            tag: image.reference.tag().to_owned(),
            reference_given: image.reference_given,
            template: image.template,
            snapshot: image.snapshot,
            enabled: image.enabled,
            pulled: image.pulled,
            configuration_revision: image.configuration_revision,
            artifact_image: artifact.as_ref().map(|artifact| artifact.image_id.clone()),
            artifact_config: artifact.as_ref().and_then(Artifact::separate_config),
            artifact_digest: artifact.as_ref().and_then(|artifact| artifact.repo_digest.clone()),
            artifact_worker: artifact.as_ref().map(|artifact| artifact.worker.clone()),
            artifact_json: artifact.map(AsJson),
            artifact_missing: image.artifact_missing,
            created_at: image.created_at,
            updated_at: image.updated_at,
            revision: image.revision,
            edit_revision: image.etag,
            latest_build: image.latest_build,
            deleted: false,
            index_bytes: 0,
        }
    }
}

impl From<entity::build::Model> for Build {
    fn from(row: entity::build::Model) -> Self {
        Self {
            id: row.id,
            image: row.image,
            number: row.number,
            kind: row.kind,
            state: row.state,
            attempt: row.attempt,
            failures: row.failures,
            requester: row.requester_json.into_noun(),
            creator: row.creator,
            queued_at: row.queued_at,
            round: row.round,
            not_before: row.not_before,
            started_at: row.started_at,
            finished_at: row.finished_at,
            worker: row.worker,
            claimed_at: row.claimed_at,
            lease_expires_at: row.lease_expires_at,
            cancel_requested_at: row.cancel_requested_at,
            stop_confirmed: row.stop_confirmed,
            report_sequence: row.report_sequence,
            last_sequence: row.last_sequence,
            steps: Steps { total: row.steps_total, done: row.steps_done, cached: row.steps_cached },
            error: row.error_json.map(AsJson::into_noun),
            log_bytes: row.log_bytes,
            log_truncated: row.log_truncated,
            configuration_revision: row.configuration_revision,
            reference: Reference::from_stored(row.repository, row.tag),
            requirements: row.requirements_json.into_noun(),
            base: row.base_json.map(AsJson::into_noun),
            preferred_worker: row.preferred_worker,
            workspace: row.workspace_json.map(AsJson::into_noun),
            trace: row.trace,
        }
    }
}

impl FromQueryResult for Build {
    fn from_query_result(row: &QueryResult, prefix: &str) -> Result<Self, DbErr> {
        entity::build::Model::from_query_result(row, prefix).map(Self::from)
    }
}

impl entity::build::ActiveModel {
    /// Returns the row of a newly queued build.
    pub(super) fn queued(build: &Build) -> Result<Self, DbErr> {
        Ok(Self {
            image: Set(build.image),
            number: Set(build.number),
            kind: Set(build.kind),
            requested_by: Set(build.requester.subject.clone()),
            requester_json: Set(AsJson(build.requester.clone())),
            creator: Set(build.creator.clone()),
            queued_at: Set(build.queued_at),
            configuration_revision: Set(build.configuration_revision),
            repository: Set(build.reference.repository().to_owned()),
            tag: Set(build.reference.tag().to_owned()),
            requirements_json: Set(AsJson(build.requirements.clone())),
            requirements_key: Set(requirements_key(build)?),
            preferred_worker: Set(build.preferred_worker.clone()),
            workspace_json: Set(build.workspace.clone().map(AsJson)),
            round: Set(build.round),
            trace: Set(build.trace.clone()),
            ..Self::standing(build)?
        })
    }

    /// Returns the columns that may change after a build was queued.
    pub(super) fn standing(build: &Build) -> Result<Self, DbErr> {
        let mut columns = Self {
            id: Set(build.id),
            state: Set(build.state),
            attempt: Set(build.attempt),
            failures: Set(build.failures),
            not_before: Set(build.not_before),
            started_at: Set(build.started_at),
            finished_at: Set(build.finished_at),
            worker: Set(build.worker.clone()),
            claimed_at: Set(build.claimed_at),
            lease_expires_at: Set(build.lease_expires_at),
            cancel_requested_at: Set(build.cancel_requested_at),
            stop_confirmed: Set(build.stop_confirmed),
            report_sequence: Set(build.report_sequence),
            last_sequence: Set(build.last_sequence),
            steps_total: Set(build.steps.total),
            steps_done: Set(build.steps.done),
            steps_cached: Set(build.steps.cached),
            error_json: Set(build.error.clone().map(AsJson)),
            log_bytes: Set(build.log_bytes),
            log_truncated: Set(build.log_truncated),
            ..Self::default()
        };
        if build.base.is_some() {
            columns.base_json = Set(build.base.clone().map(AsJson));
            columns.requirements_key = Set(requirements_key(build)?);
        }
        Ok(columns)
    }
}

/// Returns the key of the builds that the same workers may take and should.
fn requirements_key(build: &Build) -> Result<String, DbErr> {
    let Build { requirements, requester, base, preferred_worker, .. } = build;
    Ok(digest(&to_json(&(requirements, &requester.pools, base, preferred_worker))?))
}

/// Returns a short digest that is the same in every process.
fn digest(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    hex::encode(&digest.as_ref()[..16])
}
