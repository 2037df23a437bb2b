//! Creation of images: record, configuration and first build.

use sea_orm::{ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter};

use super::{
    WithBuild, builds,
    change_log::{self, NewChange},
    contexts, decisions,
    entity::{self, configuration, image},
    images, queue, references,
    request_transaction::RequestTransaction,
    values::to_json,
};
use crate::{
    build::{Build, Record},
    change::ChangeKind,
    dispatch::BuildChange,
    error::{Error, Resource},
    image::{Configuration, Creation, ImageId, NewImage, SnapshotOrder, UsageChange},
};

impl RequestTransaction<'_> {
    /// Creates an image and queues its first build, unless it is a template.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyPendingBuilds`] if the caller may not queue another build,
    /// [`Error::ReferenceTaken`] if another image owns the given reference, [`Error::Invalid`] if the archive
    /// of the configuration is not kept, and [`Error::CreatorQuotaExceeded`] or [`Error::CatalogueFull`] if a
    /// quota leaves no room.
    pub(crate) async fn create(&mut self, new: &NewImage) -> Result<WithBuild, Error> {
        self.add(Creation { new, creator: self.request.caller.subject(), snapshot: None }).await
    }

    /// Creates an image from a running workspace and queues the snapshot.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the image that the workspace was started from does not exist, and the
    /// errors of [`create`](Self::create).
    pub(crate) async fn snapshot(
        &mut self,
        new: impl FnOnce(Configuration) -> NewImage,
        order: &SnapshotOrder,
    ) -> Result<WithBuild, Error> {
        let source = image::Entity::find_by_id(order.workspace.source)
            .filter(image::Column::Deleted.eq(false))
            .one(&self.txn)
            .await?
            .ok_or(Error::NotFound(Resource::Image(order.workspace.source)))?;
        let revision = source.configuration_revision;
        let new = new(images::configuration(&self.txn, source.id, revision).await?);
        self.add(Creation { new: &new, creator: &order.creator, snapshot: Some(order) }).await
    }

    async fn add(&mut self, creation: Creation<'_>) -> Result<WithBuild, Error> {
        let Creation { new, creator, .. } = creation;
        if !new.template {
            self.require_room().await?;
        }
        let (now, id) = (self.now, ImageId::new());
        self.request.created.set(id);
        let writes = creation.writes_reference();
        let reference = references::choose(&self.txn, id, &new.reference, writes).await?;
        let mut build = creation.first_build(id, &reference, self.request.caller.identity(), now);
        let change_log::Logged { revision, at } =
            change_log::log(&self.txn, NewChange::new(id, ChangeKind::Content, creator), now).await?;
        let image = creation.record(id, reference, build.as_ref(), revision, at);
        let bytes = image.index_bytes_with(&new.configuration);
        self.charge(creator, UsageChange::of_image(bytes)).await?;
        let row = image::Model { index_bytes: bytes, ..image.clone().into() };
        self.txn.defer(image::Entity::insert(row.into_active_model()));
        self.write_configuration(id, 1, &new.configuration).await?;
        if writes {
            references::take_chosen(&self.txn, id, &new.reference, &image.reference).await?;
        }
        self.effects.committed.changed.insert(id);
        let build = match &mut build {
            Some(build) => {
                self.enqueue(build).await?;
                Some(builds::in_view(&self.txn, build.clone(), self.store.policy(), now).await?)
            }
            None => None,
        };
        Ok((creation.in_view(image, &self.request.caller), build))
    }

    pub(super) async fn write_configuration(
        &self,
        image: ImageId,
        revision: i64,
        configuration: &Configuration,
    ) -> Result<(), Error> {
        contexts::require(&self.txn, configuration, self.now).await?;
        let row = configuration::Model {
            image,
            revision,
            json: to_json(configuration)?,
            archive: configuration.archive().map(str::to_owned),
            base: configuration.base().map(str::to_owned),
        };
        self.txn.defer(configuration::Entity::insert(row.into_active_model()));
        Ok(())
    }

    /// Queues a build, and returns the first record of its history.
    pub(super) async fn enqueue(&mut self, build: &mut Build) -> Result<Record, Error> {
        build.round = queue::next_round(&self.txn, &build.requester.subject).await?;
        build.trace.clone_from(&self.request.trace);
        let first = build.record_queued();
        self.txn.defer(entity::build::Entity::insert(entity::build::ActiveModel::queued(build)?));
        decisions::record(&self.txn, &[BuildChange::queued(build, &first)], &mut self.effects.committed)?;
        Ok(first)
    }
}
