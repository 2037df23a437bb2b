//! Reads by key of what previews decide upon. None of them waits for a turn to write.

use std::collections::HashMap;

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};

use super::{Store, builds, contexts, entity::build, queue, references};
use crate::{
    build::{Build, BuildId, BuildInView},
    error::Error,
    image::{Configuration, ImageId, Reference},
    timestamp::Timestamp,
};

impl Store {
    /// Returns the present, by the clock that all who share the database have in common.
    pub(crate) async fn present(&self) -> Result<Timestamp, Error> {
        Ok(self.now(&self.reader).await?)
    }

    /// Returns the image that a reference belongs to.
    pub(crate) async fn reference_owner(&self, reference: &Reference) -> Result<Option<ImageId>, Error> {
        Ok(references::owner(&self.reader, reference).await?)
    }

    /// Checks that the archive is kept that a configuration names, if it names one.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when it is not.
    pub(crate) async fn require_archive(&self, configuration: &Configuration) -> Result<(), Error> {
        contexts::named(&self.reader, configuration).await?;
        Ok(())
    }

    /// Reads builds, those of them that there are.
    pub(crate) async fn builds_by_id(
        &self,
        ids: impl IntoIterator<Item = BuildId>,
    ) -> Result<HashMap<BuildId, Build>, Error> {
        let ids: Vec<_> = ids.into_iter().collect();
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let found = build::Entity::find().filter(build::Column::Id.is_in(ids)).all(&self.reader).await?;
        Ok(found.into_iter().map(|row| (row.id, row.into())).collect())
    }

    /// Counts the builds of a requester in the queue, up to the most that it may have there; 0 where that is any number.
    pub(crate) async fn pending_builds(&self, requester: &str) -> Result<u64, Error> {
        Ok(queue::pending_of(&self.reader, requester, &self.policy).await?)
    }

    /// Returns a build as callers would see it once it were in the queue.
    pub(crate) async fn queued_in_view(&self, mut build: Build) -> Result<BuildInView, Error> {
        build.round = queue::next_round(&self.reader, &build.requested_by).await?;
        self.build_in_view(build).await
    }

    /// Returns a build as callers would see it if it were in this state.
    pub(crate) async fn build_in_view(&self, build: Build) -> Result<BuildInView, Error> {
        let txn = self.read().await?;
        let now = self.now(&txn).await?;
        let build = builds::in_view(&txn, build, &self.policy, now).await?;
        txn.commit().await?;
        Ok(build)
    }
}
