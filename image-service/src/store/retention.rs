//! Deletion of old builds, in small transactions alongside other work.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait};

use super::{
    Store, contexts,
    entity::{build, build_record, configuration, image},
    transaction::WriteTransaction,
    values::AsJson,
};
use crate::{build::BuildId, error::Error, image::ImageId, turns::Turn};

impl Store {
    /// Deletes surplus builds of the next images by id. Returns the last image examined, or `None` at the
    /// end.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn prune_builds_after(
        &self,
        after: ImageId,
        keep: u64,
    ) -> Result<Option<ImageId>, Error> {
        const AT_ONCE: u64 = 500;
        let found = build::Entity::find()
            .select_only()
            .column(build::Column::Image)
            .column_as(build::Column::Id.count(), "builds")
            .filter(build::Column::Image.gt(after))
            .group_by(build::Column::Image)
            .order_by_asc(build::Column::Image)
            .limit(AT_ONCE)
            .into_tuple::<(ImageId, i64)>()
            .all(&self.reader)
            .await?;
        let last = found.last().map(|(image, _)| *image);
        for (image, builds) in found {
            if u64::try_from(builds).is_ok_and(|builds| builds > keep) {
                self.prune_builds_of(image, keep).await?;
            }
        }
        Ok(last)
    }

    /// Deletes builds beyond the newest `keep`, and configurations left unused. Active builds and the
    /// artifact's build stay.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn prune_builds_of(&self, image: ImageId, keep: u64) -> Result<(), Error> {
        const AT_ONCE: u64 = 100;
        let beyond = build::Entity::find()
            .filter(build::Column::Image.eq(image))
            .order_by_desc(build::Column::Number)
            .offset(keep)
            .limit(AT_ONCE)
            .all(&self.reader)
            .await?;
        if beyond.is_empty() {
            return Ok(());
        }
        let Some(record) = image::Entity::find_by_id(image).one(&self.reader).await? else {
            return Ok(());
        };
        let artifact = record.artifact_json.map(|AsJson(artifact)| artifact.build);
        let is_due = |build: &&build::Model| build.state.is_final() && Some(build.id) != artifact;
        for old in beyond.iter().rev().filter(is_due) {
            self.delete_build(image, old.id).await?;
        }
        Ok(())
    }

    /// Atomically deletes a final build and unused configurations. A watch sees its whole history or none.
    async fn delete_build(&self, image: ImageId, build: BuildId) -> Result<(), Error> {
        let txn = self.write(Turn::Background).await?;
        txn.defer(build::Entity::delete_many().filter(build::Column::Id.eq(build)));
        txn.defer(build_record::Entity::delete_many().filter(build_record::Column::Build.eq(build)));
        contexts::touch_named(&txn, image, self.now(&txn).await?);
        delete_unused_configurations(&txn, image);
        txn.commit().await
    }
}

/// Deletes the configurations of an image that are neither its current one nor that of a build.
pub(super) fn delete_unused_configurations(txn: &WriteTransaction, image: ImageId) {
    let current = image::Entity::find_by_id(image)
        .select_only()
        .column(image::Column::ConfigurationRevision)
        .into_query();
    let of_builds = build::Entity::find()
        .select_only()
        .column(build::Column::ConfigurationRevision)
        .filter(build::Column::Image.eq(image))
        .into_query();
    txn.defer(
        configuration::Entity::delete_many()
            .filter(configuration::Column::Image.eq(image))
            .filter(configuration::Column::Revision.not_in_subquery(current))
            .filter(configuration::Column::Revision.not_in_subquery(of_builds)),
    );
}
