//! Operations of callers on images, builds and grants: authorise, write, publish.
//!
//! A write that is only validated is handled by a [`Preview`]. A write to images that the caller cannot see is refused
//! without a transaction; a transaction checks the visibility again.

use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    access::{Action, Grantee, Permissions, Principal, Role, Visibility},
    build::{BuildId, BuildInView},
    dispatch::Worker,
    error::{Error, Refusal, Resource, Violations},
    image::{
        Artifact, BatchAction, EditDraft, Etag, HeldImage, ImageDraft, ImageId, ImageInView, Position, Query,
        RepositoryPrefixes, SnapshotOrder, Written,
    },
    index::{CachedConfiguration, Index, Page, VisibleImage},
    preview::Preview,
    queue::Queue,
    request::Request,
    signals::Signals,
    store::{RequestTransaction, Store, WithBuild},
};

pub(crate) use crate::store::{BatchOutcome, BatchTarget};

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
    /// Returns [`Error::RoleMissing`] unless the caller is a builder, [`Error::Invalid`] with all violations, and the
    /// errors of [`RequestTransaction::create`].
    pub(crate) async fn create_image(
        &self,
        request: &Request,
        draft: Option<ImageDraft>,
        violations: Violations,
    ) -> Result<WithBuild, Error> {
        request.caller.require(Role::Builder)?;
        let draft = given(draft, &violations)?;
        let new = draft.check(&self.prefixes, request.caller.is_admin(), violations)?;
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
    /// [`Error::NotFound`] if the source image does not exist, and the errors of [`RequestTransaction::snapshot`].
    pub(crate) async fn snapshot_workspace(
        &self,
        request: &Request,
        draft: Option<ImageDraft>,
        order: SnapshotOrder,
        violations: Violations,
    ) -> Result<WithBuild, Error> {
        request.caller.require(Role::Service)?;
        let draft = given(draft, &violations)?;
        let of_source = draft.check_snapshot(&self.prefixes, request.caller.is_admin(), violations)?;
        if request.validate_only {
            return self.preview.snapshot_workspace(request, of_source, &order).await;
        }
        if let Some(answer) = self.unseen(request, &Visibility::Everything, order.workspace.source).await? {
            return Ok(answer);
        }
        self.transact(request, async |write| write.snapshot(of_source, &order).await).await
    }

    /// Returns an image and its configuration.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`Index::fresh`].
    pub(crate) async fn image(
        &self,
        caller: &Principal,
        id: ImageId,
    ) -> Result<(VisibleImage, Arc<CachedConfiguration>), Error> {
        self.index.image_in_full(&caller.visibility(), id).await
    }

    /// Renders the Dockerfile and the context that an image is built from.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`image`](Self::image), and [`Error::Refused`] if the image has no Dockerfile to show.
    pub(crate) async fn dockerfile(&self, caller: &Principal, id: ImageId) -> Result<Written, Error> {
        let (found, cached) = self.image(caller, id).await?;
        if found.entry.image.snapshot {
            return Err(Error::Refused(Refusal::SnapshotNotWritten));
        }
        cached.configuration.rendered().map_err(Error::Refused)
    }

    /// Returns the next images that the caller can see and that match a query.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Index::fresh`].
    pub(crate) async fn images(
        &self,
        caller: &Principal,
        query: &Query,
        after: Option<&Position>,
        limit: usize,
        with_total: bool,
    ) -> Result<Page, Error> {
        self.index.list(caller, query, after, limit, with_total).await
    }

    /// Returns the configurations of images; `None` for an image whose configuration is no longer kept.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub(crate) async fn configurations(
        &self,
        images: &[VisibleImage],
    ) -> Result<Vec<Option<Arc<CachedConfiguration>>>, Error> {
        self.index.configurations(images).await
    }

    /// Updates the fields of an image that clients may write.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`RequestTransaction::update`].
    pub(crate) async fn update_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
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
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`RequestTransaction::enable`].
    pub(crate) async fn enable_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
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
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`RequestTransaction::delete`].
    pub(crate) async fn delete_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
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
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`RequestTransaction::build`].
    pub(crate) async fn build_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
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
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`RequestTransaction::cancel`].
    pub(crate) async fn cancel_build(
        &self,
        request: &Request,
        id: ImageId,
        meant: Option<BuildId>,
    ) -> Result<WithBuild, Error> {
        if request.validate_only {
            return self.preview.cancel_build(request, id, meant).await;
        }
        self.write(request, id, async |write| write.cancel(id, meant).await).await
    }

    /// Applies an action to each of the images independently.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails or the request id was used before. Errors of single images are among the
    /// outcomes.
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
            let missing = |_| Err(Error::NotFound(Resource::Image));
            return Ok(targets.into_iter().map(|target| target.and_then(missing)).collect());
        }
        self.transact(request, async |write| write.batch(action, targets).await).await
    }

    /// Returns a draft for a clone of an image.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`image`](Self::image), [`Error::Forbidden`] without permission to clone it, and
    /// [`Error::Refused`] for an unfinished snapshot.
    pub(crate) async fn clone_image(&self, caller: &Principal, id: ImageId) -> Result<ImageDraft, Error> {
        let (found, cached) = self.image(caller, id).await?;
        found.require(Action::Clone)?;
        Ok(found.entry.image.clone_draft(&cached.configuration))
    }

    /// Returns the artifact to start a workspace from.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, [`Error::Forbidden`] without permission to use
    /// it, and [`Error::NotResolvable`] if the image cannot back workspaces now.
    pub(crate) async fn resolve_image(&self, caller: &Principal, id: ImageId) -> Result<Artifact, Error> {
        let found = self.index.image(&caller.visibility(), id).await?;
        found.require(Action::CreateWorkspace)?;
        let image = &found.entry.image;
        let artifact = image.artifact();
        let artifact =
            artifact.ok_or_else(|| Error::Internal("a finished build has left no artifact".into()))?;
        let reference = artifact.reference.clone().unwrap_or_else(|| image.reference.clone());
        Ok(Artifact { reference: Some(reference), ..artifact })
    }

    /// Returns a build.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the build does not exist or the caller cannot see its image.
    pub(crate) async fn build(&self, caller: &Principal, id: BuildId) -> Result<BuildInView, Error> {
        let build = self.store.build(id).await?;
        self.index.visible(&caller.visibility(), build.build.image, Resource::Build).await?;
        Ok(build)
    }

    /// Returns the next builds of an image, newest first.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image.
    pub(crate) async fn builds(
        &self,
        caller: &Principal,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<BuildInView>, Error> {
        self.index.image(&caller.visibility(), image).await?;
        self.store.builds(image, before, limit).await
    }

    /// Returns the next grants of an image, ordered by grantee.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and [`Error::Forbidden`] if it may not share it.
    pub(crate) async fn grants(
        &self,
        caller: &Principal,
        image: ImageId,
        after: Option<&Grantee>,
        limit: u64,
    ) -> Result<Vec<(Grantee, Permissions)>, Error> {
        self.index.image(&caller.visibility(), image).await?.require(Action::Share)?;
        self.store.grants(image, after, limit).await
    }

    /// Sets the permissions of a subject on an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of [`RequestTransaction::grant`].
    pub(crate) async fn grant(
        &self,
        request: &Request,
        image: ImageId,
        subject: &str,
        permissions: Permissions,
    ) -> Result<Permissions, Error> {
        if request.validate_only {
            return self.preview.grant(request, image, subject, permissions).await;
        }
        self.write(request, image, async |write| write.grant(image, subject, permissions).await).await
    }

    /// Returns the images of a worker's engine that are no longer needed.
    ///
    /// Forgets the images that the worker has `removed`.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read or written.
    pub(crate) async fn unused(
        &self,
        worker: &Principal,
        held: Vec<HeldImage>,
        removed: &[String],
    ) -> Result<Vec<String>, Error> {
        self.store.delete_engine_images(worker.subject(), removed).await?;
        self.store.unused(worker.subject(), held).await
    }

    /// Returns the next workers, ordered by name. Every caller may read them.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<Worker>, Error> {
        self.store.workers(after, limit).await
    }

    /// Drains a worker, so that it gets no more builds, or reverts that.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] unless the caller is an admin, and [`Error::NotFound`] if there is no such
    /// worker.
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
    /// Returns `None` if the image is visible, and otherwise the response that the same request got while it was.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is no such response, and [`Error::RequestIdReused`] if the id belongs to
    /// another request.
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
        answer.ok_or(Error::NotFound(Resource::Image)).map(Some)
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
