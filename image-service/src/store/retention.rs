//! Older builds of an image are forgotten, in small transactions beside the work.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait};

use super::{
    Store, contexts,
    entity::{build, build_record, configuration, image},
    values::AsJson,
};
use crate::{build::BuildId, error::Error, image::ImageId, turns::Turn};

impl Store {
    /// Looks through the builds of the next images, by id, and forgets those that are too many; the last image that was looked at, none
    /// at the end.
    pub(crate) async fn forget_builds_after(
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
                self.forget_builds_of(image, keep).await?;
            }
        }
        Ok(last)
    }

    /// Forgets the oldest builds of an image, so that `keep` are left, with their histories and the configurations that nothing else
    /// names. What is not over stays, and so does the build of the artifact.
    pub(crate) async fn forget_builds_of(&self, of: ImageId, keep: u64) -> Result<(), Error> {
        const AT_ONCE: u64 = 100;
        let beyond = build::Entity::find()
            .filter(build::Column::Image.eq(of))
            .order_by_desc(build::Column::Number)
            .offset(keep)
            .limit(AT_ONCE)
            .all(&self.reader)
            .await?;
        if beyond.is_empty() {
            return Ok(());
        }
        let Some(record) = image::Entity::find_by_id(of).one(&self.reader).await? else {
            return Ok(());
        };
        let artifact = record.artifact_json.map(|AsJson(artifact)| artifact.build);
        let is_due = |build: &&build::Model| build.state.is_final() && Some(build.id) != artifact;
        for old in beyond.iter().rev().filter(is_due) {
            self.forget_build(of, old.id).await?;
        }
        Ok(())
    }

    /// Forgets one build that is over, and the configurations of its image that are neither the image's own nor a build's, at once:
    /// whoever watches the build sees all of its history or none.
    async fn forget_build(&self, of: ImageId, build: BuildId) -> Result<(), Error> {
        let txn = self.write(Turn::Background).await?;
        txn.later(build::Entity::delete_many().filter(build::Column::Id.eq(build)));
        txn.later(build_record::Entity::delete_many().filter(build_record::Column::Build.eq(build)));
        let current = image::Entity::find_by_id(of)
            .select_only()
            .column(image::Column::ConfigurationRevision)
            .into_query();
        let of_builds = build::Entity::find()
            .select_only()
            .column(build::Column::ConfigurationRevision)
            .filter(build::Column::Image.eq(of))
            .into_query();
        contexts::touch_named(&txn, of, self.now(&txn).await?);
        txn.later(
            configuration::Entity::delete_many()
                .filter(configuration::Column::Image.eq(of))
                .filter(configuration::Column::Revision.not_in_subquery(current))
                .filter(configuration::Column::Revision.not_in_subquery(of_builds)),
        );
        txn.commit().await
    }
}
