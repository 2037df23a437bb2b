//! What was decided about builds: their rows and histories, and what follows from it for their images.

use std::collections::HashMap;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, DbErr, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect, QueryTrait,
    Set,
};

use super::{
    changes::{self, NewChange},
    contexts,
    entity::{build, build_record, configuration, grant, image, image_reference},
    hints, made, queue, references, required,
    values::{AsJson, StatusCode, to_json},
    writing::Writing,
};
use crate::{
    build::State,
    change::ChangeKind,
    dispatch::{BuildChange, Committed, Decision},
    error::Error,
    hint::Hint,
    image::{ImageId, Status},
    timestamp::Timestamp,
};

/// Writes what was decided about builds, and what follows from it for their images.
pub(super) async fn apply<'a>(
    txn: &Writing,
    decisions: impl IntoIterator<Item = &'a Decision>,
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), Error> {
    let mut all = BuildChange::of_decisions(decisions);
    // Those that write the same columns together: fewer statements are to be prepared.
    all.sort_by_key(BuildChange::enters_a_state);
    for moved in &all {
        let mut standing = build::ActiveModel::standing(moved.build);
        if !moved.enters_a_state() {
            // Three indexes begin with it, and would be written anew.
            standing.not_set(build::Column::State);
        }
        txn.later(build::Entity::update(standing).validate()?);
    }
    record(txn, &all, committed)?;
    follow(txn, all, now, committed).await
}

/// Appends what has happened to the histories of builds.
pub(super) fn record(txn: &Writing, all: &[BuildChange<'_>], committed: &mut Committed) -> Result<(), DbErr> {
    let mut chunks = Vec::new();
    for BuildChange { build, records, .. } in all {
        for records in records {
            if let (Some(first), Some(last)) = (records.first(), records.last()) {
                let chunk = build_record::Model {
                    build: build.id,
                    first_sequence: first.sequence,
                    last_sequence: last.sequence,
                    json: to_json(records)?,
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
        if !build.state.is_held() && !committed.queue_moved {
            committed.queue_moved = true;
            hints::send(txn, Hint::QueueMoved);
        }
    }
    if !chunks.is_empty() {
        txn.later(build_record::Entity::insert_many(chunks));
    }
    made::remember(txn, all.iter().filter_map(|moved| moved.artifact));
    Ok(())
}

/// Brings images to where their builds stand.
pub(super) async fn follow(
    txn: &Writing,
    mut all: Vec<BuildChange<'_>>,
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), Error> {
    // Only a state that a build has entered says anything of its image.
    all.retain(BuildChange::enters_a_state);
    if all.is_empty() {
        return Ok(());
    }
    let ids = all.iter().map(|moved| moved.build.image);
    let images = image::Entity::find().filter(image::Column::Id.is_in(ids)).all(txn).await?;
    let mut images: HashMap<ImageId, image::Model> = images.into_iter().map(|row| (row.id, row)).collect();
    let mut kept = Vec::with_capacity(all.len());
    for moved in all {
        let image = required(images.remove(&moved.build.image), "the image of a build")?;
        if !image.deleted {
            kept.push((image, moved));
        } else if moved.build.state.is_final() {
            purge(txn, moved.build.image, now);
        }
    }
    follow_latest(txn, &mut kept, now, committed).await?;
    let ended = kept.iter().filter(|(_, moved)| moved.build.state.is_final());
    references::settle(txn, ended.map(|(image, _)| image)).await
}

/// Brings images to where their latest builds stand.
async fn follow_latest(
    txn: &Writing,
    images: &mut [(image::Model, BuildChange<'_>)],
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), DbErr> {
    let changed: Vec<_> = images
        .iter_mut()
        .filter_map(|(image, moved)| {
            let status = StatusCode(Some(Status::of(moved.build.kind, moved.build.state)));
            let message = moved.build.message();
            let is_latest = image.latest_build == Some(moved.build.id);
            (is_latest && (image.status != status || image.status_message != message)).then(|| {
                image.status = status;
                image.status_message = message;
                (image, moved.artifact)
            })
        })
        .collect();
    let changes =
        changed.iter().map(|(image, _)| NewChange::new(image.id, ChangeKind::Status, &image.creator));
    let logged = changes::log_all(txn, &changes.collect::<Vec<_>>(), now).await?;
    for ((image, artifact), logged) in changed.into_iter().zip(logged) {
        image.revision = logged.revision;
        image.updated_at = logged.at;
        if let Some(artifact) = artifact {
            image.artifact_json = Some(AsJson(artifact.clone()));
            image.artifact_image = Some(artifact.image_id.clone());
        }
        let row = image::ActiveModel {
            id: Set(image.id),
            revision: Set(image.revision),
            status: Set(image.status),
            status_message: Set(image.status_message.clone()),
            updated_at: Set(image.updated_at),
            artifact_json: Set(image.artifact_json.clone()),
            artifact_image: Set(image.artifact_image.clone()),
            ..Default::default()
        };
        txn.later(image::Entity::update(row).validate()?);
        committed.changed.insert(image.id);
    }
    Ok(())
}

/// Removes all that is left of a deleted image whose work has stopped.
pub(super) fn purge(txn: &Writing, image: ImageId, now: Timestamp) {
    contexts::touch_named(txn, image, now);
    let builds = build::Entity::find()
        .select_only()
        .column(build::Column::Id)
        .filter(build::Column::Image.eq(image))
        .into_query();
    txn.later(build_record::Entity::delete_many().filter(build_record::Column::Build.in_subquery(builds)));
    txn.later(build::Entity::delete_many().filter(build::Column::Image.eq(image)));
    txn.later(configuration::Entity::delete_many().filter(configuration::Column::Image.eq(image)));
    txn.later(grant::Entity::delete_many().filter(grant::Column::Image.eq(image)));
    txn.later(image_reference::Entity::delete_many().filter(image_reference::Column::Image.eq(image)));
    txn.later(image::Entity::delete_many().filter(image::Column::Id.eq(image)));
}
