//! Images that workers have made in their engines, and their garbage collection.

use std::collections::BTreeSet;

use sea_orm::{ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect};

use super::{
    Store, contexts,
    entity::{build, configuration, engine_image, image, pushed_digest},
    queue,
    transaction::WriteTransaction,
    values::AsJson,
};
use crate::{
    build::{BuildId, Kind},
    error::Error,
    image::{Artifact, EngineContents, HeldImage, ImageId, UnusedContents},
    turns::Turn,
};

impl Store {
    /// Deletes the records of images that a worker has removed.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn delete_engine_images(
        &self,
        worker: &str,
        engine_ids: &[String],
    ) -> Result<(), Error> {
        if engine_ids.is_empty() {
            return Ok(());
        }
        let txn = self.write(Turn::Background).await?;
        engine_image::Entity::delete_many()
            .filter(engine_image::Column::Worker.eq(worker))
            .filter(engine_image::Column::EngineId.is_in(engine_ids))
            .exec(&txn)
            .await?;
        txn.commit().await
    }

    /// Returns the part of a worker's engine contents that can be removed.
    ///
    /// An artifact name is unused once its image has another artifact and no active build. An image is unused
    /// if it was built by a recorded or lost attempt and is neither an artifact nor a base of a configuration
    /// in use, nor belongs to an image with active builds. While the worker pulls, no image is unused: the
    /// pulled one may be among them.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn unused(
        &self,
        worker: &str,
        contents: EngineContents,
    ) -> Result<UnusedContents, Error> {
        let EngineContents { images: held, removed: _, artifacts: named } = contents;
        let txn = self.read().await?;
        let of_names = named.iter().map(|(image, _)| *image);
        let records: BTreeSet<ImageId> = held.iter().map(|held| held.image).chain(of_names).collect();
        let ids: BTreeSet<&str> = held.iter().map(|held| held.engine_id.as_str()).collect();
        let names: BTreeSet<&str> = held.iter().flat_map(|held| &held.names).map(String::as_str).collect();
        let pulls = queue::held()
            .filter(build::Column::Kind.eq(Kind::Pull))
            .filter(build::Column::Worker.eq(worker))
            .one(&txn)
            .await?;
        if pulls.is_some() {
            return Ok(UnusedContents::default());
        }
        let is_elsewhere = |row: &image::Model| {
            row.artifact_json.as_ref().is_some_and(|AsJson(artifact)| artifact.worker != worker)
        };
        let found = image::Entity::find().filter(image::Column::Id.is_in(records.clone())).all(&txn).await?;
        let elsewhere: BTreeSet<_> = found.iter().filter(|row| is_elsewhere(row)).map(|row| row.id).collect();
        let active = queue::active()
            .select_only()
            .column(build::Column::Image)
            .filter(build::Column::Image.is_in(records));
        let active: BTreeSet<ImageId> = active.into_tuple().all(&txn).await?.into_iter().collect();
        let built_by: BTreeSet<(ImageId, BuildId)> = found
            .iter()
            .filter(|row| !row.deleted)
            .filter_map(|row| {
                Some((row.id, row.artifact_json.as_ref().map(|AsJson(artifact)| artifact.build)?))
            })
            .collect();
        let artifacts = image::Entity::find()
            .select_only()
            .column(image::Column::ArtifactImage)
            .filter(image::Column::ArtifactImage.is_in(ids.iter().copied()));
        let artifacts: BTreeSet<String> = artifacts.into_tuple().all(&txn).await?.into_iter().collect();
        let recorded = engine_image::Entity::find()
            .filter(engine_image::Column::Worker.eq(worker))
            .filter(engine_image::Column::EngineId.is_in(ids));
        let recorded: BTreeSet<String> =
            recorded.all(&txn).await?.into_iter().map(|row| row.engine_id).collect();
        let bases = configuration::Entity::find()
            .select_only()
            .column(configuration::Column::Base)
            .filter(configuration::Column::Base.is_in(names))
            .filter(contexts::is_in_use());
        let bases: BTreeSet<String> = bases.into_tuple().all(&txn).await?.into_iter().collect();
        txn.commit().await?;
        let is_unused = |held: &HeldImage| {
            // Made by an attempt that was lost before it reported: another worker's artifact is in its place.
            let is_lost = held.is_named_by_builds() && elsewhere.contains(&held.image);
            (recorded.contains(&held.engine_id) || is_lost)
                && !artifacts.contains(&held.engine_id)
                && !active.contains(&held.image)
                && held.names.iter().all(|name| !bases.contains(name))
        };
        Ok(UnusedContents {
            images: held.into_iter().filter(is_unused).map(|held| held.engine_id).collect(),
            artifacts: named
                .into_iter()
                .filter(|artifact| !built_by.contains(artifact) && !active.contains(&artifact.0))
                .collect(),
        })
    }
}

/// Records the artifacts that workers have made, and the digests of those that were pushed; pulled ones need
/// no record.
pub(super) fn record<'a>(txn: &WriteTransaction, artifacts: impl Iterator<Item = &'a Artifact>) {
    let made: Vec<&Artifact> = artifacts.filter(|artifact| !artifact.pulled).collect();
    let pushed = made.iter().filter(|artifact| artifact.repo_digest.is_some());
    let digests: BTreeSet<String> = pushed
        .flat_map(|artifact| [artifact.repo_digest.clone(), artifact.config_digest.clone()])
        .flatten()
        .collect();
    let digests: Vec<_> =
        digests.into_iter().map(|digest| pushed_digest::Model { digest }.into_active_model()).collect();
    if !digests.is_empty() {
        txn.defer(pushed_digest::Entity::insert_many(digests).on_conflict_do_nothing());
    }
    let images: Vec<_> = made
        .into_iter()
        .map(|artifact| engine_image::Model {
            worker: artifact.worker.clone(),
            engine_id: artifact.image_id.clone(),
            config_digest: artifact.separate_config(),
        })
        .map(IntoActiveModel::into_active_model)
        .collect();
    if !images.is_empty() {
        txn.defer(engine_image::Entity::insert_many(images).on_conflict_do_nothing());
    }
}
