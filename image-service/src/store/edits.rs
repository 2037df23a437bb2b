//! What callers change: images created, edited, enabled, built, cancelled and deleted.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};

use super::{Effects, Store, builds, entity::image, images, write::Write};
use crate::{
    build::{Build, BuildId, BuildInView},
    error::{Error, Resource},
    image::{
        BatchAction, Configuration, EditDraft, Etag, ImageId, ImageInView, NewImage, RepositoryPrefixes,
        SnapshotOrder,
    },
    request::Request,
};

mod changing;
mod creating;

/// An image and the build that was asked for, if it has one.
pub(crate) type WithBuild = (ImageInView, Option<BuildInView>);

/// One image of a batch, or what is wrong with how it was named.
pub(crate) type BatchTarget = Result<(ImageId, Option<Etag>), Error>;

/// What came of one image of a batch.
pub(crate) type BatchOutcome = Result<ImageInView, Error>;

impl Store {
    /// Creates an image; its first build is in the queue, unless it is a template.
    pub(crate) async fn create_image(
        &self,
        request: &Request,
        new: &NewImage,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let answer = write.create(new, request.caller.subject(), None).await;
        write.finish(answer).await
    }

    /// Creates an image from a running workspace; the snapshot is in the queue.
    pub(crate) async fn snapshot_workspace(
        &self,
        request: &Request,
        new: impl FnOnce(Configuration) -> NewImage,
        order: &SnapshotOrder,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let source = image::Entity::find_by_id(order.workspace.source.0)
            .filter(image::Column::Deleted.eq(false))
            .one(&write.txn)
            .await?
            .ok_or(Error::NotFound(Resource::Image))?;
        let configuration =
            images::configuration(&write.txn, ImageId(source.id), source.configuration_revision).await?;
        let new = new(configuration);
        let answer = write.create(&new, &order.creator, Some(order)).await;
        write.finish(answer).await
    }

    /// Changes what clients may write.
    pub(crate) async fn update_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
        edit: EditDraft,
        prefixes: &RepositoryPrefixes,
    ) -> Result<(ImageInView, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let answer = write.update(id, etag, edit, prefixes).await;
        write.finish(answer).await
    }

    /// Says whether an image can back workspaces.
    pub(crate) async fn enable_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
        enabled: bool,
    ) -> Result<(ImageInView, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let answer = write.enable(id, etag, enabled).await;
        write.finish(answer).await
    }

    /// Queues another build of an image.
    pub(crate) async fn build_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let built = write.build(id, etag).await;
        let answer = write.in_view(built).await;
        write.finish(answer).await
    }

    /// Cancels the latest build, if it is the one that is meant.
    pub(crate) async fn cancel_build(
        &self,
        request: &Request,
        id: ImageId,
        meant: Option<BuildId>,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let cancelled = write.cancel(id, None, meant).await;
        let answer = write.in_view(cancelled).await;
        write.finish(answer).await
    }

    /// Makes an image invisible, and cancels the build that is under way. What is left of it is removed at once when no
    /// work is under way, else when that has stopped.
    pub(crate) async fn delete_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
    ) -> Result<((), Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let deleted = write.delete(id, etag).await.map(drop);
        write.finish(deleted).await
    }

    /// Does one thing to each of the images, each for itself, in one transaction.
    pub(crate) async fn batch_images(
        &self,
        request: &Request,
        action: BatchAction,
        targets: Vec<BatchTarget>,
    ) -> Result<(Vec<BatchOutcome>, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            let outcome = match target {
                Ok((id, etag)) => write.one_of_batch(action, id, etag).await,
                Err(error) => Err(error),
            };
            // What is refused has written nothing; when the database fails, all fail.
            if let Err(error @ (Error::Internal(_) | Error::Busy)) = outcome {
                return Err(error);
            }
            outcomes.push(outcome);
        }
        write.finish(Ok(outcomes)).await
    }
}

impl Write<'_> {
    /// Adds what the caller sees of a build.
    async fn in_view(&self, done: Result<(ImageInView, Build), Error>) -> Result<WithBuild, Error> {
        let (image, build) = done?;
        let build = builds::in_view(&self.txn, build, self.store.policy(), self.now).await?;
        Ok((image, Some(build)))
    }
}
