//! Artifacts that the engines of workers should hold, and those that they have lost.

use std::collections::HashMap;

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Select, Set};

use super::{
    Store,
    change_log::{self, NewChange},
    entity::image,
    values::AsJson,
};
use crate::{
    build::BuildId,
    change::ChangeKind,
    dispatch::Committed,
    error::Error,
    image::{ArtifactReport, ExpectedArtifact, ImageId},
    turns::Turn,
};

impl Store {
    /// Returns the next artifacts after an image that a worker's engine should hold, in the order of their
    /// images.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn expected_artifacts(
        &self,
        worker: &str,
        after: ImageId,
        limit: u64,
    ) -> Result<Vec<ExpectedArtifact>, Error> {
        let rows = expected_of(worker)
            .filter(image::Column::Id.gt(after))
            .order_by_asc(image::Column::Id)
            .limit(limit)
            .all(&self.reader)
            .await?;
        let expected = rows.into_iter().filter_map(|row| {
            let AsJson(artifact) = row.artifact_json?;
            Some(ExpectedArtifact {
                image: row.id,
                build: artifact.build,
                engine_id: artifact.image_id,
                missing: row.artifact_missing,
            })
        });
        Ok(expected.collect())
    }

    /// Records which artifacts a worker's engine has lost, and which it has again.
    ///
    /// An artifact that has been replaced meanwhile is ignored, and so is one of another worker.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn record_artifacts(
        &self,
        worker: &str,
        report: ArtifactReport,
    ) -> Result<Committed, Error> {
        let ArtifactReport { missing, present } = report;
        let states = missing.into_iter().map(|artifact| (artifact, true));
        let reported: HashMap<(ImageId, BuildId), bool> =
            states.chain(present.into_iter().map(|artifact| (artifact, false))).collect();
        let mut committed = Committed::default();
        if reported.is_empty() {
            return Ok(committed);
        }
        let txn = self.write(Turn::Background).await?;
        let now = self.now(&txn).await?;
        let rows = expected_of(worker)
            .filter(image::Column::Id.is_in(reported.keys().map(|(image, _)| *image)))
            .all(&txn)
            .await?;
        let changed = rows.into_iter().filter_map(|row| {
            let AsJson(artifact) = row.artifact_json.as_ref()?;
            let missing = *reported.get(&(row.id, artifact.build))?;
            (row.artifact_missing != missing).then_some((row, missing))
        });
        let changed: Vec<_> = changed.collect();
        let changes = changed.iter().map(|(row, _)| NewChange::new(row.id, ChangeKind::Record, &row.creator));
        let logged = change_log::log_all(&txn, &changes.collect::<Vec<_>>(), now).await?;
        for ((row, missing), logged) in changed.iter().zip(logged) {
            let update = image::ActiveModel {
                id: Set(row.id),
                revision: Set(logged.revision),
                updated_at: Set(logged.at),
                artifact_missing: Set(*missing),
                ..Default::default()
            };
            txn.defer(image::Entity::update(update).validate()?);
            committed.changed.insert(row.id);
        }
        txn.commit().await?;
        Ok(committed)
    }
}

/// Selects the images whose artifacts only the engine of this worker should hold.
fn expected_of(worker: &str) -> Select<image::Entity> {
    // The condition of the index is repeated literally.
    image::Entity::find()
        .filter(image::Column::ArtifactWorker.is_not_null())
        .filter(image::Column::ArtifactDigest.is_null())
        .filter(image::Column::ArtifactWorker.eq(worker))
        .filter(image::Column::Deleted.eq(false))
}
