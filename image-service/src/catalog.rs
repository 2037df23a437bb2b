//! Operations of callers on images, builds and grants.
//!
//! The permissions are the table of [`access`](crate::access), and [`image::actions`](crate::image) the table
//! of what is possible now. Reads ask them through the index, and writes in the transaction of
//! [`RequestTransaction`].
//!
//! A write that is only validated is handled by a [`Preview`]. A write to images that the caller cannot see
//! is refused without a transaction; a transaction checks the visibility again.

use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    access::{Grantee, Permissions, Principal, Role, Visibility},
    build::BuildId,
    dispatch::Worker,
    error::{Error, Resource, Violations},
    image::{
        ArtifactReport, BatchAction, EditDraft, EngineContents, ExpectedArtifact, ImageDraft, ImageId,
        ImageInView, Precondition, RepositoryPrefixes, SnapshotOrder, UnusedContents,
    },
    index::Index,
    preview::Preview,
    queue::Queue,
    request::Request,
    signals::Signals,
    store::{RequestTransaction, Store, WithBuild},
};

pub(crate) use crate::store::{BatchOutcome, BatchTarget};

mod build_sources;
mod reads;

/// The operations of the catalogue, for all callers.
#[derive(Clone, Debug)]
pub(crate) struct Catalog {
    store: Store,
    index: Index,
    preview: Preview,
    signals: Arc<Signals>,
    queue: Arc<Queue>,
    prefixes: RepositoryPrefixes,
}

impl Catalog {
    pub(crate) fn new(
        store: Store,
        index: Index,
        signals: Arc<Signals>,
        queue: Arc<Queue>,
        prefixes: RepositoryPrefixes,
    ) -> Self {
        let preview = Preview::new(store.clone(), index.clone());
        Self { store, index, preview, signals, queue, prefixes }
    }

    /// Registers an image and, unless it is a template, queues its first build.
    ///
    /// `violations` are those found so far; all violations are reported together.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] unless the caller is a builder, [`Error::Invalid`] with all violations,
    /// and the errors of [`RequestTransaction::create`].
    pub(crate) async fn create_image(
        &self,
        request: &Request,
        draft: Option<ImageDraft>,
        violations: Violations,
    ) -> Result<WithBuild, Error> {
        request.caller.require(Role::Builder)?;
        let draft = given(draft, &violations)?;
        let namespace = self.prefixes.namespace(request.caller.subject(), request.caller.is_admin());
        let new = draft.check(&namespace, violations)?;
        if request.validate_only {
            return self.preview.create_image(request, &new).await;
        }
        self.transact(request, async |write| write.create(&new).await).await
    }

    /// Registers an image and queues a build that commits a running workspace into it.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] unless the caller is a service, [`Error::Invalid`] with all violations,
    /// [`Error::NotFound`] if the source image does not exist, and the errors of
    /// [`RequestTransaction::snapshot`].
    pub(crate) async fn snapshot_workspace(
        &self,
        request: &Request,
        draft: Option<ImageDraft>,
        order: SnapshotOrder,
        violations: Violations,
    ) -> Result<WithBuild, Error> {
        request.caller.require(Role::Service)?;
        let draft = given(draft, &violations)?;
        let namespace = self.prefixes.namespace(&order.creator, request.caller.is_admin());
        let of_source = draft.check_snapshot(&namespace, violations)?;
        if request.validate_only {
            return self.preview.snapshot_workspace(request, of_source, &order).await;
        }
        if let Some(answer) = self.unseen(request, &Visibility::everything(), order.workspace.source).await? {
            return Ok(answer);
        }
        self.transact(request, async |write| write.snapshot(of_source, &order).await).await
    }

    /// Updates the fields of an image that clients may write.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`RequestTransaction::update`].
    pub(crate) async fn update_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
        edit: EditDraft,
    ) -> Result<ImageInView, Error> {
        if request.validate_only {
            return self.preview.update_image(request, id, etag, edit, &self.prefixes).await;
        }
        self.write(request, id, async |write| write.update(id, etag, edit, &self.prefixes).await).await
    }

    /// Enables or disables an image for workspaces.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`RequestTransaction::enable`].
    pub(crate) async fn enable_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
        enabled: bool,
    ) -> Result<ImageInView, Error> {
        if request.validate_only {
            return self.preview.enable_image(request, id, etag, enabled).await;
        }
        self.write(request, id, async |write| write.enable(id, etag, enabled).await).await
    }

    /// Deletes an image and cancels its build in progress.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`RequestTransaction::delete`].
    pub(crate) async fn delete_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<(), Error> {
        if request.validate_only {
            return self.preview.delete_image(request, id, etag).await;
        }
        self.write(request, id, async |write| write.delete(id, etag).await.map(drop)).await
    }

    /// Queues another build of an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`RequestTransaction::build`].
    pub(crate) async fn build_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<WithBuild, Error> {
        if request.validate_only {
            return self.preview.build_image(request, id, etag).await;
        }
        self.write(request, id, async |write| write.build(id, etag).await).await
    }

    /// Cancels the latest build of an image.
    ///
    /// If a build is `meant`, it has to be the latest one.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`RequestTransaction::cancel`].
    pub(crate) async fn cancel_build(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Precondition>,
        meant: Option<BuildId>,
    ) -> Result<WithBuild, Error> {
        if request.validate_only {
            return self.preview.cancel_build(request, id, etag, meant).await;
        }
        self.write(request, id, async |write| write.cancel(id, etag, meant).await).await
    }

    /// Applies an action to each of the images independently.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails or the request id was used before. Errors of single images are
    /// among the outcomes.
    pub(crate) async fn batch_images(
        &self,
        request: &Request,
        action: BatchAction,
        targets: Vec<BatchTarget>,
    ) -> Result<Vec<BatchOutcome>, Error> {
        if request.validate_only {
            return self.preview.batch_images(request, action, targets).await;
        }
        let ids: Vec<ImageId> = targets.iter().flatten().map(|(id, _)| *id).collect();
        if !self.index.shows_any(&request.caller.visibility(), &ids).await? {
            if let Some(answer) = self.store.remembered(request).await? {
                return Ok(answer);
            }
            let missing = |(id, _)| Err(Error::NotFound(Resource::Image(id)));
            return Ok(targets.into_iter().map(|target| target.and_then(missing)).collect());
        }
        self.transact(request, async |write| write.batch(action, targets).await).await
    }

    /// Sets the permissions of a grantee on an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`RequestTransaction::grant`].
    pub(crate) async fn grant(
        &self,
        request: &Request,
        image: ImageId,
        etag: Option<Precondition>,
        grantee: Grantee,
        permissions: Permissions,
    ) -> Result<Permissions, Error> {
        if request.validate_only {
            return self.preview.grant(request, image, etag, &grantee, permissions).await;
        }
        self.write(request, image, async |write| write.grant(image, etag, grantee, permissions).await).await
    }

    /// Returns what is no longer needed in a worker's engine.
    ///
    /// Forgets the images that the worker has removed.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read or written.
    pub(crate) async fn unused(
        &self,
        worker: &Principal,
        contents: EngineContents,
    ) -> Result<UnusedContents, Error> {
        self.store.delete_engine_images(worker.subject(), &contents.removed).await?;
        self.store.unused(worker.subject(), contents).await
    }

    /// Returns the next artifacts after an image that a worker's engine should hold, in the order of their
    /// images.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub(crate) async fn expected_artifacts(
        &self,
        worker: &Principal,
        after: ImageId,
        limit: u64,
    ) -> Result<Vec<ExpectedArtifact>, Error> {
        self.store.expected_artifacts(worker.subject(), after, limit).await
    }

    /// Records which artifacts a worker's engine has lost, and which it has again.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be written.
    pub(crate) async fn record_artifacts(
        &self,
        worker: &Principal,
        report: ArtifactReport,
    ) -> Result<(), Error> {
        let committed = self.store.record_artifacts(worker.subject(), report).await?;
        self.signals.announce(&committed);
        Ok(())
    }

    /// Drains a worker, so that it gets no more builds, or reverts that.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] unless the caller is an admin, and [`Error::NotFound`] if there is no
    /// such worker.
    pub(crate) async fn drain_worker(
        &self,
        request: &Request,
        name: &str,
        drained: bool,
    ) -> Result<Worker, Error> {
        request.caller.require(Role::Admin)?;
        if request.validate_only {
            return self.preview.drain_worker(name, drained).await;
        }
        self.transact(request, async |write| write.drain(name, drained).await).await
    }

    /// Writes to an image, provided that the caller can see it.
    async fn write<T: Serialize + DeserializeOwned>(
        &self,
        request: &Request,
        id: ImageId,
        write: impl AsyncFnOnce(&mut RequestTransaction<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.unseen(request, &request.caller.visibility(), id).await? {
            Some(answer) => Ok(answer),
            None => self.transact(request, write).await,
        }
    }

    /// Answers a write to an image that is not visible to the caller, which needs no transaction.
    ///
    /// Returns `None` if the image is visible, and otherwise the response that the same request got while it
    /// was.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is no such response, and [`Error::RequestIdReused`] if the id
    /// belongs to another request.
    async fn unseen<T: DeserializeOwned>(
        &self,
        request: &Request,
        visibility: &Visibility,
        id: ImageId,
    ) -> Result<Option<T>, Error> {
        if self.index.shows_any(visibility, &[id]).await? {
            return Ok(None);
        }
        let answer = self.store.remembered(request).await?;
        answer.ok_or(Error::NotFound(Resource::Image(id))).map(Some)
    }

    /// Writes in a transaction, and announces its effects once they are durable.
    async fn transact<T: Serialize + DeserializeOwned>(
        &self,
        request: &Request,
        write: impl AsyncFnOnce(&mut RequestTransaction<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (answer, effects) = self.store.transact(request, write).await?;
        self.queue.deliver(effects.messages);
        self.signals.announce(&effects.committed);
        Ok(answer)
    }
}

/// Returns the draft of a request. If there is none, the violations say so.
fn given(draft: Option<ImageDraft>, violations: &Violations) -> Result<ImageDraft, Error> {
    draft.ok_or_else(|| Error::Invalid(violations.clone()))
}
