//! Between rows and nouns.

use sea_orm::{DbErr, Set};
use serde::{Serialize, de::DeserializeOwned};

use super::entity;
use crate::{
    build::{Build, BuildId, Kind, State, Steps},
    image::{Etag, Image, ImageId, Reference, Status},
    timestamp::Timestamp,
};

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<String, DbErr> {
    serde_json::to_string(value).map_err(|error| DbErr::Json(error.to_string()))
}

pub(super) fn from_json<T: DeserializeOwned>(json: &str) -> Result<T, DbErr> {
    serde_json::from_str(json).map_err(|error| DbErr::Json(error.to_string()))
}

/// Short, and the same for the same text in every process.
fn digest(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn image_from_row(row: entity::image::Model) -> Result<Image, DbErr> {
    Ok(Image {
        id: ImageId(row.id),
        name: row.name,
        description: row.description,
        creator: row.creator,
        template: row.template,
        snapshot: row.snapshot,
        status: (row.status != NO_STATUS).then(|| status_from_code(row.status)).transpose()?,
        status_message: row.status_message,
        reference: Reference::from_stored(row.repository, row.tag),
        reference_given: row.reference_given,
        enabled: row.enabled,
        pulled: row.pulled,
        configuration_revision: row.configuration_revision,
        artifact: row.artifact_json.as_deref().map(from_json).transpose()?,
        created_at: Timestamp::from_micros(row.created_at),
        updated_at: Timestamp::from_micros(row.updated_at),
        revision: row.revision,
        etag: Etag(row.edit_revision),
        latest_build: row.latest_build.map(BuildId),
    })
}

/// Returns the row of an image that is not deleted.
pub(super) fn image_to_row(image: &Image) -> Result<entity::image::Model, DbErr> {
    Ok(entity::image::Model {
        id: image.id.0,
        name: image.name.clone(),
        description: image.description.clone(),
        creator: image.creator.clone(),
        status: image.status.map_or(NO_STATUS, status_to_code),
        status_message: image.status_message.clone(),
        repository: image.reference.repository().to_owned(),
        tag: image.reference.tag().to_owned(),
        reference_given: image.reference_given,
        template: image.template,
        snapshot: image.snapshot,
        enabled: image.enabled,
        pulled: image.pulled,
        configuration_revision: image.configuration_revision,
        artifact_json: image.artifact.as_ref().map(to_json).transpose()?,
        artifact_image: image.artifact.as_ref().map(|artifact| artifact.image_id.clone()),
        created_at: image.created_at.micros(),
        updated_at: image.updated_at.micros(),
        revision: image.revision,
        edit_revision: image.etag.0,
        latest_build: image.latest_build.map(|build| build.0),
        deleted: false,
        index_bytes: 0,
    })
}

pub(super) fn build_from_row(row: entity::build::Model) -> Result<Build, DbErr> {
    Ok(Build {
        id: BuildId(row.id),
        image: ImageId(row.image),
        number: row.number,
        kind: kind_from_code(row.kind)?,
        state: state_from_code(row.state)?,
        attempt: row.attempt,
        failures: row.failures,
        requested_by: row.requested_by,
        queued_at: Timestamp::from_micros(row.queued_at),
        started_at: row.started_at.map(Timestamp::from_micros),
        finished_at: row.finished_at.map(Timestamp::from_micros),
        worker: row.worker,
        claimed_at: row.claimed_at.map(Timestamp::from_micros),
        lease_expires_at: row.lease_expires_at.map(Timestamp::from_micros),
        cancel_requested_at: row.cancel_requested_at.map(Timestamp::from_micros),
        stop_confirmed: row.stop_confirmed,
        report_sequence: row.report_sequence,
        last_sequence: row.last_sequence,
        steps: Steps { total: row.steps_total, done: row.steps_done, cached: row.steps_cached },
        error: row.error_json.as_deref().map(from_json).transpose()?,
        log_bytes: row.log_bytes,
        log_truncated: row.log_truncated,
        configuration_revision: row.configuration_revision,
        reference: Reference::from_stored(row.repository, row.tag),
        requirements: from_json(&row.requirements_json)?,
        preferred_worker: row.preferred_worker,
        workspace: row.workspace_json.as_deref().map(from_json).transpose()?,
        round: row.round,
        not_before: row.not_before.map(Timestamp::from_micros),
        trace: row.trace,
    })
}

pub(super) fn build_to_row(build: &Build) -> Result<entity::build::Model, DbErr> {
    Ok(entity::build::Model {
        id: build.id.0,
        image: build.image.0,
        number: build.number,
        kind: kind_to_code(build.kind),
        state: state_to_code(build.state),
        attempt: build.attempt,
        failures: build.failures,
        requested_by: build.requested_by.clone(),
        queued_at: build.queued_at.micros(),
        started_at: build.started_at.map(Timestamp::micros),
        finished_at: build.finished_at.map(Timestamp::micros),
        worker: build.worker.clone(),
        claimed_at: build.claimed_at.map(Timestamp::micros),
        lease_expires_at: build.lease_expires_at.map(Timestamp::micros),
        cancel_requested_at: build.cancel_requested_at.map(Timestamp::micros),
        stop_confirmed: build.stop_confirmed,
        report_sequence: build.report_sequence,
        last_sequence: build.last_sequence,
        steps_total: build.steps.total,
        steps_done: build.steps.done,
        steps_cached: build.steps.cached,
        error_json: build.error.as_ref().map(to_json).transpose()?,
        log_bytes: build.log_bytes,
        log_truncated: build.log_truncated,
        configuration_revision: build.configuration_revision,
        repository: build.reference.repository().to_owned(),
        tag: build.reference.tag().to_owned(),
        requirements_key: digest(&to_json(&(&build.requirements, &build.preferred_worker))?),
        requirements_json: to_json(&build.requirements)?,
        preferred_worker: build.preferred_worker.clone(),
        workspace_json: build.workspace.as_ref().map(to_json).transpose()?,
        round: build.round,
        not_before: build.not_before.map(Timestamp::micros),
        trace: build.trace.clone(),
    })
}

/// Where a build stands, for its row: all that is not as it was queued.
pub(super) fn build_to_standing(build: &Build) -> Result<entity::build::ActiveModel, DbErr> {
    Ok(entity::build::ActiveModel {
        id: Set(build.id.0),
        state: Set(state_to_code(build.state)),
        attempt: Set(build.attempt),
        failures: Set(build.failures),
        not_before: Set(build.not_before.map(Timestamp::micros)),
        started_at: Set(build.started_at.map(Timestamp::micros)),
        finished_at: Set(build.finished_at.map(Timestamp::micros)),
        worker: Set(build.worker.clone()),
        claimed_at: Set(build.claimed_at.map(Timestamp::micros)),
        lease_expires_at: Set(build.lease_expires_at.map(Timestamp::micros)),
        cancel_requested_at: Set(build.cancel_requested_at.map(Timestamp::micros)),
        stop_confirmed: Set(build.stop_confirmed),
        report_sequence: Set(build.report_sequence),
        last_sequence: Set(build.last_sequence),
        steps_total: Set(build.steps.total),
        steps_done: Set(build.steps.done),
        steps_cached: Set(build.steps.cached),
        error_json: Set(build.error.as_ref().map(to_json).transpose()?),
        log_bytes: Set(build.log_bytes),
        log_truncated: Set(build.log_truncated),
        ..Default::default()
    })
}

/// The status of a template, which has none.
pub(super) const NO_STATUS: i32 = 0;

pub(super) fn status_to_code(status: Status) -> i32 {
    match status {
        Status::BuildPending => 1,
        Status::Building => 2,
        Status::BuildFinished => 3,
        Status::BuildCancelled => 4,
        Status::Snapshotting => 5,
        Status::Error => 6,
    }
}

fn status_from_code(code: i32) -> Result<Status, DbErr> {
    Ok(match code {
        1 => Status::BuildPending,
        2 => Status::Building,
        3 => Status::BuildFinished,
        4 => Status::BuildCancelled,
        5 => Status::Snapshotting,
        6 => Status::Error,
        _ => return Err(unknown("status", code)),
    })
}

pub(super) fn state_to_code(state: State) -> i32 {
    match state {
        State::Queued => 1,
        State::Claimed => 2,
        State::Running => 3,
        State::Publishing => 4,
        State::Succeeded => 5,
        State::Failed => 6,
        State::Cancelled => 7,
    }
}

fn state_from_code(code: i32) -> Result<State, DbErr> {
    Ok(match code {
        1 => State::Queued,
        2 => State::Claimed,
        3 => State::Running,
        4 => State::Publishing,
        5 => State::Succeeded,
        6 => State::Failed,
        7 => State::Cancelled,
        _ => return Err(unknown("state", code)),
    })
}

pub(super) fn kind_to_code(kind: Kind) -> i32 {
    match kind {
        Kind::Build => 1,
        Kind::Pull => 2,
        Kind::Snapshot => 3,
    }
}

fn kind_from_code(code: i32) -> Result<Kind, DbErr> {
    Ok(match code {
        1 => Kind::Build,
        2 => Kind::Pull,
        3 => Kind::Snapshot,
        _ => return Err(unknown("kind", code)),
    })
}

fn unknown(what: &str, code: i32) -> DbErr {
    DbErr::Type(format!("unknown {what} {code}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_reads_back() {
        for code in 1..=6 {
            assert_eq!(status_from_code(code).map(status_to_code), Ok(code));
        }
        for code in 1..=7 {
            assert_eq!(state_from_code(code).map(state_to_code), Ok(code));
        }
        for code in 1..=3 {
            assert_eq!(kind_from_code(code).map(kind_to_code), Ok(code));
        }
        assert!(state_from_code(0).is_err() && status_from_code(0).is_err() && kind_from_code(0).is_err());
    }
}
