//! Previews of writes, for `validate_only`.
//!
//! They are computed from the index and from reads by key, with the decisions of the writes:
//! [`Image::admit`], [`Creation`](crate::image::Creation), [`dispatch::decide`](crate::dispatch::decide).
//! Values that only a write can know are made up: the ids of new objects, times, revisions, and etags.
//!
//! Invariants:
//! - No preview begins a write transaction, or waits for one.
//! - Each row of a batch is decided as if the rows before it had been written: an [`Overlay`] holds their
//!   changes.

use tokio::task;

use self::overlay::Overlay;
use crate::{
    access::{Action, Grantee, Permissions, Visibility},
    build::BuildId,
    dispatch::Worker,
    error::{Error, Refusal},
    fair_semaphore::FairSemaphore,
    image::{
        BatchAction, EditDraft, Image, ImageId, ImageInView, Precondition, RepositoryPrefixes, UsageChange,
    },
    index::{Index, VisibleImage},
    request::Request,
    store::{BatchOutcome, BatchTarget, Store, WithBuild},
};

mod creation;
mod overlay;

/// An evaluator of writes that does not perform them.
#[derive(Clone, Debug)]
pub(crate) struct Preview {
    store: Store,
    index: Index,
    batches: FairSemaphore,
}

impl Preview {
    /// Number of batches processed at once, because processors and connections are few.
    const BATCHES: usize = 2;
    /// Number of rows of a batch that are decided before the task yields.
    const YIELD_EVERY: usize = 64;

    pub(crate) fn new(store: Store, index: Index) -> Self {
        Self { store, index, batches: FairSemaphore::new(Self::BATCHES) }
    }

    /// Returns the image as an update by a client would leave it.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn update_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
        edit: EditDraft,
        prefixes: &RepositoryPrefixes,
    ) -> Result<ImageInView, Error> {
        let (found, cached) = self.index.image_in_full(&request.caller.visibility(), id).await?;
        let before = &found.entry.image;
        before.admit_edit(found.standing, etag, &edit)?;
        let edit = edit.check(
            before,
            &prefixes.namespace(&before.creator, request.caller.is_admin()),
            found.standing.may_change_reference(),
        )?;
        let mut image = before.clone();
        let configuration = edit.apply(&mut image, &cached.configuration);
        if let Some(configuration) = configuration {
            self.store.require_archive(configuration).await?;
        }
        if let Some(wanted) = &edit.reference {
            let owner = |reference| async move { self.store.reference_owner(&reference).await };
            let chosen = wanted.choose(id, image.writes_reference(), owner).await?;
            image.set_reference(chosen, wanted.is_given());
        }
        if image != *before {
            let current = &cached.configuration;
            let bytes =
                image.index_bytes_with(configuration.unwrap_or(current)) - before.index_bytes_with(current);
            self.store.require_quota(&image.creator, UsageChange::of_bytes(bytes)).await?;
            self.require_reference(&image).await?;
            image = self.overlay(request, [found.clone()]).await?.edit(image);
        }
        let configuration = configuration.unwrap_or(&cached.configuration).clone();
        let actions = image.allowed_actions(found.standing);
        Ok(ImageInView { image, configuration: Some(configuration), actions })
    }

    /// Returns the image as it would be after it was enabled or disabled.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn enable_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
        enabled: bool,
    ) -> Result<ImageInView, Error> {
        let found = self.index.image(&request.caller.visibility(), id).await?;
        self.overlay(request, [found]).await?.enable(id, etag, enabled)
    }

    /// Checks that an image could be deleted.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn delete_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<(), Error> {
        let found = self.index.image(&request.caller.visibility(), id).await?;
        found.entry.image.admit(found.standing, etag, Action::Delete)
    }

    /// Returns the image and the build that would be queued.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn build_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<WithBuild, Error> {
        let (found, cached) = self.index.image_in_full(&request.caller.visibility(), id).await?;
        let image = &found.entry.image;
        image.admit(found.standing, etag, Action::Build)?;
        let mut overlay = self.overlay(request, [found.clone()]).await?;
        overlay.count_pending().await?;
        let latest = self.store.builds_by_id(image.latest_build).await?;
        let number = latest.into_values().next().map_or(0, |latest| latest.number) + 1;
        let requester = request.caller.identity().clone();
        let mut build = image.next_build(number, &cached.configuration, requester, overlay.now());
        let image = overlay.build(id, etag, build.id)?;
        build.record_queued();
        Ok((image, Some(self.store.queued_in_view(build).await?)))
    }

    /// Returns the image and its latest build as a cancellation would leave them.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn cancel_build(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
        meant: Option<BuildId>,
    ) -> Result<WithBuild, Error> {
        let found = self.index.image(&request.caller.visibility(), id).await?;
        let latest = match found.entry.image.build_to_cancel(found.standing, etag, meant) {
            Err(Error::Refused(Refusal::OtherBuild)) => {
                return Err(self.store.other_build(meant, id).await?);
            }
            latest => latest?,
        };
        let mut overlay = self.overlay(request, [found]).await?;
        overlay.read_builds([latest]).await?;
        let (image, build) = overlay.cancel(id, etag, meant)?;
        Ok((image, Some(self.store.build_in_view(build).await?)))
    }

    /// Returns the outcome for each image of a batch.
    ///
    /// # Errors
    ///
    /// Returns the errors of the index and the database. The errors of single images are among the outcomes.
    pub(crate) async fn batch_images(
        &self,
        request: &Request,
        action: BatchAction,
        targets: Vec<BatchTarget>,
    ) -> Result<Vec<BatchOutcome>, Error> {
        let _turn = self.batches.acquire(&request.caller).await?;
        let ids: Vec<ImageId> = targets.iter().flatten().map(|(id, _)| *id).collect();
        let found = self.index.images_by_id(&request.caller.visibility(), &ids).await?;
        let mut overlay = self.overlay(request, found.into_values()).await?;
        match action {
            BatchAction::Build => overlay.count_pending().await?,
            BatchAction::CancelBuild => {
                let builds = overlay.builds_to_cancel();
                overlay.read_builds(builds).await?;
            }
            BatchAction::Enable | BatchAction::Disable | BatchAction::Delete => {}
        }
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            if outcomes.len() % Self::YIELD_EVERY == Self::YIELD_EVERY - 1 {
                task::yield_now().await;
            }
            let outcome = target.and_then(|(id, etag)| overlay.row(action, id, etag));
            outcomes.push(outcome.map(ImageInView::without_long_texts));
        }
        Ok(outcomes)
    }

    /// Returns the permissions that a grantee would have.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn grant(
        &self,
        request: &Request,
        image: ImageId,
        etag: Option<Precondition>,
        grantee: &Grantee,
        permissions: Permissions,
    ) -> Result<Permissions, Error> {
        let found = self.index.image(&request.caller.visibility(), image).await?;
        found.entry.image.admit(found.standing, etag, Action::Share)?;
        let granted = found.entry.granted(grantee);
        let is_one_more = !granted.can_view() && permissions.can_view();
        if is_one_more && found.entry.grant_count() as u64 >= Store::MAX_GRANTS {
            return Err(Error::Refused(Refusal::TooManyGrants));
        }
        if is_one_more {
            let bytes = i64::from(Image::GRANT_BYTES);
            self.store.require_quota(&found.entry.image.creator, UsageChange::of_bytes(bytes)).await?;
        }
        Ok(found.entry.image.permissions_of(grantee, permissions))
    }

    /// Returns the worker as it would be after it was drained or resumed.
    ///
    /// # Errors
    ///
    /// Returns the errors of the write.
    pub(crate) async fn drain_worker(&self, name: &str, drained: bool) -> Result<Worker, Error> {
        Ok(Worker { drained, ..self.store.worker(name).await? })
    }

    /// Creates the overlay for the images of a preview, all of them unchanged.
    async fn overlay<'a>(
        &'a self,
        request: &'a Request,
        images: impl IntoIterator<Item = VisibleImage>,
    ) -> Result<Overlay<'a>, Error> {
        let now = self.store.present().await?;
        Ok(Overlay::new(request, &self.store, now, self.index.revision(), images))
    }

    /// Checks that the reference written by an image's builds does not belong to another image.
    async fn require_reference(&self, image: &Image) -> Result<(), Error> {
        if !image.writes_reference() {
            return Ok(());
        }
        match self.store.reference_owner(&image.reference).await? {
            Some(owner) if owner != image.id => Err(Error::ReferenceTaken(image.reference.to_string())),
            Some(_) | None => Ok(()),
        }
    }
}
