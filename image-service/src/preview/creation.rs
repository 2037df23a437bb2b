//! Previews of the creation of images.

use super::{Preview, Visibility};
use crate::{
    error::Error,
    image::{Configuration, Creation, ImageId, NewImage, SnapshotOrder, UsageChange},
    request::Request,
    store::WithBuild,
};

impl Preview {
    /// Returns the image that would be created, and its first build.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn create_image(&self, request: &Request, new: &NewImage) -> Result<WithBuild, Error> {
        self.create(request, &Creation { new, creator: request.caller.subject(), snapshot: None }).await
    }

    /// Returns the image to which a workspace would be committed, and its snapshot.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn snapshot_workspace(
        &self,
        request: &Request,
        new: impl FnOnce(Configuration) -> NewImage,
        order: &SnapshotOrder,
    ) -> Result<WithBuild, Error> {
        // The requester is responsible for the snapshot, and need not see the image that the workspace was
        // started from.
        let (_, cached) = self.index.image_in_full(&Visibility::everything(), order.workspace.source).await?;
        let new = new(cached.configuration.clone());
        let creation = Creation { new: &new, creator: &order.creator, snapshot: Some(order) };
        self.create(request, &creation).await
    }

    async fn create(&self, request: &Request, creation: &Creation<'_>) -> Result<WithBuild, Error> {
        let new = creation.new;
        if !new.template {
            let pending = self.store.pending_builds(request.caller.subject()).await?;
            self.store.policy().require_room(pending)?;
        }
        let (id, now) = (ImageId::new(), self.store.present().await?);
        let owner = |reference| async move { self.store.reference_owner(&reference).await };
        let reference = new.reference.choose(id, creation.writes_reference(), owner).await?;
        let build = creation.first_build(id, &reference, request.caller.identity(), now);
        let image = creation.record(id, reference, build.as_ref(), self.index.revision() + 1, now);
        let bytes = image.index_bytes_with(&new.configuration);
        self.store.require_quota(creation.creator, UsageChange::of_image(bytes)).await?;
        self.store.require_archive(&new.configuration).await?;
        self.require_reference(&image).await?;
        let build = match build {
            Some(mut build) => {
                build.record_queued();
                Some(self.store.queued_in_view(build).await?)
            }
            None => None,
        };
        Ok((creation.in_view(image, &request.caller), build))
    }
}
