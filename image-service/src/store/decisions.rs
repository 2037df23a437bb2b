//! Decisions on builds, written to their rows, histories and images.

use std::collections::HashMap;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, DbErr, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect, QueryTrait,
    Set,
};

use super::{
    change_log::{self, NewChange},
    contexts, engine_images,
    entity::{build, build_record, configuration, grant, image, image_reference},
    hints, queue, references, required,
    transaction::WriteTransaction,
    values::{AsJson, StatusCode, to_json},
};
use crate::{
    build::{Record, State},
    change::ChangeKind,
    dispatch::{BuildChange, Committed, Decision},
    error::Error,
    hint::Hint,
    image::{ImageId, Status},
    timestamp::Timestamp,
};

/// Writes decisions on builds, and their consequences for images.
pub(super) async fn apply<'a>(
    txn: &WriteTransaction,
    decisions: impl IntoIterator<Item = &'a Decision>,
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), Error> {
    let mut all = BuildChange::of_decisions(decisions);
    // Group updates of the same columns, so that fewer statements are prepared.
    all.sort_by_key(BuildChange::enters_a_state);
    for change in &all {
        let mut standing = build::ActiveModel::standing(change.build)?;
        if !change.enters_a_state() {
            // Indexes depend on the state, and setting it would rewrite their entries.
            standing.not_set(build::Column::State);
        }
        txn.defer(build::Entity::update(standing).validate()?);
    }
    record(txn, &all, committed)?;
    apply_to_images(txn, all, now, committed).await
}

/// Divides records into the parts that are stored as one chunk each, which is what a watch holds at least.
fn parts(mut records: &[Record]) -> Vec<&[Record]> {
    /// Size of the texts of a part, in bytes, unless it is a single record.
    const BYTES: usize = 128 * 1024;
    let mut parts = Vec::new();
    while !records.is_empty() {
        let mut bytes = 0;
        let fits = |record: &&Record| {
            bytes += record.event.text_bytes();
            bytes <= BYTES
        };
        let length = records.iter().take_while(fits).count().max(1);
        let (part, rest) = records.split_at(length);
        parts.push(part);
        records = rest;
    }
    parts
}

/// Appends new records to the histories of builds.
pub(super) fn record(
    txn: &WriteTransaction,
    all: &[BuildChange<'_>],
    committed: &mut Committed,
) -> Result<(), DbErr> {
    let mut chunks = Vec::new();
    for BuildChange { build, records, .. } in all {
        for records in records.iter().flat_map(|records| parts(records)) {
            if let (Some(first), Some(last)) = (records.first(), records.last()) {
                let chunk = build_record::Model {
                    build: build.id,
                    first_sequence: first.sequence,
                    last_sequence: last.sequence,
                    json: to_json(&records)?,
                };
                chunks.push(chunk.into_active_model());
            }
        }
        if !records.is_empty() {
            committed.recorded.push(build.id);
            hints::send(txn, Hint::Recorded(build.id));
        }
        if build.state == State::Queued && build.attempt > 0 {
            queue::reopen_round(txn, build.round);
        }
        if !build.state.is_held() && !committed.queue_changed {
            committed.queue_changed = true;
            hints::send(txn, Hint::QueueChanged);
        }
    }
    if !chunks.is_empty() {
        txn.defer(build_record::Entity::insert_many(chunks));
    }
    engine_images::record(txn, all.iter().filter_map(|change| change.artifact));
    Ok(())
}

/// Updates images to the states of their builds.
pub(super) async fn apply_to_images(
    txn: &WriteTransaction,
    mut all: Vec<BuildChange<'_>>,
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), Error> {
    // Only a newly entered state affects the image.
    all.retain(BuildChange::enters_a_state);
    if all.is_empty() {
        return Ok(());
    }
    let ids = all.iter().map(|change| change.build.image);
    let images = image::Entity::find().filter(image::Column::Id.is_in(ids)).all(txn).await?;
    let mut images: HashMap<ImageId, image::Model> = images.into_iter().map(|row| (row.id, row)).collect();
    let mut kept = Vec::with_capacity(all.len());
    for change in all {
        let image = required(images.remove(&change.build.image), "the image of a build")?;
        if !image.deleted {
            kept.push((image, change));
        } else if change.build.state.is_final() {
            purge(txn, change.build.image, now);
        }
    }
    apply_to_latest(txn, &mut kept, now, committed).await?;
    let ended = kept.iter().filter(|(_, change)| change.build.state.is_final());
    references::release_unused(txn, ended.map(|(image, _)| image)).await
}

/// Updates images to the states of their latest builds.
async fn apply_to_latest(
    txn: &WriteTransaction,
    images: &mut [(image::Model, BuildChange<'_>)],
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), DbErr> {
    let changed: Vec<_> = images
        .iter_mut()
        .filter_map(|(image, change)| {
            let status = StatusCode(Some(Status::from_build(change.build.kind, change.build.state)));
            let message = change.build.message();
            let is_latest = image.latest_build == Some(change.build.id);
            (is_latest && (image.status != status || image.status_message != message)).then(|| {
                image.status = status;
                image.status_message = message;
                (image, change.artifact)
            })
        })
        .collect();
    let changes =
        changed.iter().map(|(image, _)| NewChange::new(image.id, ChangeKind::Status, &image.creator));
    let logged = change_log::log_all(txn, &changes.collect::<Vec<_>>(), now).await?;
    for ((image, artifact), logged) in changed.into_iter().zip(logged) {
        image.revision = logged.revision;
        image.updated_at = logged.at;
        if let Some(artifact) = artifact {
            image.artifact_json = Some(AsJson(artifact.clone()));
            image.artifact_image = Some(artifact.image_id.clone());
            image.artifact_config = artifact.separate_config();
            image.artifact_digest.clone_from(&artifact.repo_digest);
            image.artifact_worker = Some(artifact.worker.clone());
            image.artifact_missing = false;
        }
        let row = image::ActiveModel {
            id: Set(image.id),
            revision: Set(image.revision),
            status: Set(image.status),
            status_message: Set(image.status_message.clone()),
            updated_at: Set(image.updated_at),
            artifact_json: Set(image.artifact_json.clone()),
            artifact_image: Set(image.artifact_image.clone()),
            artifact_config: Set(image.artifact_config.clone()),
            artifact_digest: Set(image.artifact_digest.clone()),
            artifact_worker: Set(image.artifact_worker.clone()),
            artifact_missing: Set(image.artifact_missing),
            ..Default::default()
        };
        txn.defer(image::Entity::update(row).validate()?);
        committed.changed.insert(image.id);
    }
    Ok(())
}

/// Deletes all rows of a tombstone whose builds have all stopped.
pub(super) fn purge(txn: &WriteTransaction, image: ImageId, now: Timestamp) {
    contexts::touch_named(txn, image, now);
    let builds = build::Entity::find()
        .select_only()
        .column(build::Column::Id)
        .filter(build::Column::Image.eq(image))
        .into_query();
    txn.defer(build_record::Entity::delete_many().filter(build_record::Column::Build.in_subquery(builds)));
    txn.defer(build::Entity::delete_many().filter(build::Column::Image.eq(image)));
    txn.defer(configuration::Entity::delete_many().filter(configuration::Column::Image.eq(image)));
    txn.defer(grant::Entity::delete_many().filter(grant::Column::Image.eq(image)));
    txn.defer(image_reference::Entity::delete_many().filter(image_reference::Column::Image.eq(image)));
    txn.defer(image::Entity::delete_many().filter(image::Column::Id.eq(image)));
}
