//! What callers can do with images, builds and grants: authorise, write, publish.
//!
//! A write that is only to be validated is answered by a [`Preview`]. One that names no image that the caller sees is refused
//! without a transaction, in which visibility is checked again.

use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    access::{Action, Grantee, Permissions, Principal, Role, Sight},
    build::{BuildId, BuildInView},
    dispatch::Worker,
    error::{Error, Refusal, Resource, Violations},
    image::{
        Artifact, BatchAction, EditDraft, Etag, HeldImage, ImageDraft, ImageId, ImageInView, Place, Query,
        RepositoryPrefixes, SnapshotOrder, Written,
    },
    index::{CachedConfiguration, Index, Page, VisibleImage},
    preview::Preview,
    queue::Queue,
    request::Request,
    signals::Signals,
    store::{Store, WithBuild, Write},
};

pub(crate) use crate::store::{BatchOutcome, BatchTarget};

/// The catalogue, as every caller meets it.
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
    /// `violations` are those that were found before; all are reported together.
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

    /// Registers an image and queues the commit of a running workspace into it.
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
        if let Some(answer) = self.unseen(request, &Sight::Everything, order.workspace.source).await? {
            return Ok(answer);
        }
        self.transact(request, async |write| write.snapshot(of_source, &order).await).await
    }

    /// Returns one image, and its configuration.
    pub(crate) async fn image(
        &self,
        caller: &Principal,
        id: ImageId,
    ) -> Result<(VisibleImage, Arc<CachedConfiguration>), Error> {
        self.index.image_in_full(&caller.sight(), id).await
    }

    /// Renders the Dockerfile that an image is built from, and its context.
    pub(crate) async fn dockerfile(&self, caller: &Principal, id: ImageId) -> Result<Written, Error> {
        let (found, cached) = self.image(caller, id).await?;
        if found.entry.image.snapshot {
            return Err(Error::Refused(Refusal::SnapshotNotWritten));
        }
        cached.configuration.rendered().map_err(Error::Refused)
    }

    /// Returns the next images that the caller sees and that match.
    pub(crate) async fn images(
        &self,
        caller: &Principal,
        query: &Query,
        after: Option<&Place>,
        limit: usize,
        with_total: bool,
    ) -> Result<Page, Error> {
        self.index.list(caller, query, after, limit, with_total).await
    }

    /// Returns the configurations of images, where they are kept.
    pub(crate) async fn configurations(
        &self,
        images: &[VisibleImage],
    ) -> Result<Vec<Option<Arc<CachedConfiguration>>>, Error> {
        self.index.configurations(images).await
    }

    /// Changes what clients may write.
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

    /// Says whether an image can back workspaces.
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

    /// Removes an image; work that is under way is cancelled.
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

    /// Queues another build.
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

    /// Cancels the latest build, if it is the one that is meant.
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

    /// Does one thing to each of the images, each for itself.
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
        if !self.index.shows_any(&request.caller.sight(), &ids).await? {
            if let Some(answer) = self.store.remembered(request).await? {
                return Ok(answer);
            }
            let missing = |_| Err(Error::NotFound(Resource::Image));
            return Ok(targets.into_iter().map(|target| target.and_then(missing)).collect());
        }
        self.transact(request, async |write| write.batch(action, targets).await).await
    }

    /// Returns a draft of another image like this one.
    pub(crate) async fn clone_image(&self, caller: &Principal, id: ImageId) -> Result<ImageDraft, Error> {
        let (found, cached) = self.image(caller, id).await?;
        found.require(Action::Clone)?;
        Ok(found.entry.image.clone_draft(&cached.configuration))
    }

    /// Returns what to start a workspace from.
    pub(crate) async fn resolve_image(&self, caller: &Principal, id: ImageId) -> Result<Artifact, Error> {
        let found = self.index.image(&caller.sight(), id).await?;
        found.require(Action::CreateWorkspace)?;
        let image = &found.entry.image;
        let artifact = image.artifact.clone();
        let artifact =
            artifact.ok_or_else(|| Error::Internal("a finished build has left no artifact".into()))?;
        let reference = artifact.reference.clone().unwrap_or_else(|| image.reference.clone());
        Ok(Artifact { reference: Some(reference), ..*artifact })
    }

    /// Reads one build.
    pub(crate) async fn build(&self, caller: &Principal, id: BuildId) -> Result<BuildInView, Error> {
        let build = self.store.build(id).await?;
        self.index.visible(&caller.sight(), build.build.image, Resource::Build).await?;
        Ok(build)
    }

    /// Reads the next builds of an image, the newest first.
    pub(crate) async fn builds(
        &self,
        caller: &Principal,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<BuildInView>, Error> {
        self.index.image(&caller.sight(), image).await?;
        self.store.builds(image, before, limit).await
    }

    /// Reads the next grants of an image, in the order of their grantees.
    pub(crate) async fn grants(
        &self,
        caller: &Principal,
        image: ImageId,
        after: Option<&Grantee>,
        limit: u64,
    ) -> Result<Vec<(Grantee, Permissions)>, Error> {
        self.index.image(&caller.sight(), image).await?.require(Action::Share)?;
        self.store.grants(image, after, limit).await
    }

    /// Says what a subject may do with an image.
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

    /// Which images of a worker's engine nothing needs any more; what it has removed is forgotten.
    pub(crate) async fn unneeded(
        &self,
        worker: &Principal,
        held: Vec<HeldImage>,
        removed: &[String],
    ) -> Result<Vec<String>, Error> {
        self.store.forget_made(worker.subject(), removed).await?;
        self.store.unneeded(worker.subject(), held).await
    }

    /// Reads the next workers by name; every caller may.
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<Worker>, Error> {
        self.store.workers(after, limit).await
    }

    /// Says whether a worker gets no more builds; for admins.
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

    /// Writes to an image, if the caller sees it.
    async fn write<T: Serialize + DeserializeOwned>(
        &self,
        request: &Request,
        id: ImageId,
        write: impl AsyncFnOnce(&mut Write<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.unseen(request, &request.caller.sight(), id).await? {
            Some(answer) => Ok(answer),
            None => self.transact(request, write).await,
        }
    }

    /// Answers a write of an image that is not in sight, where that needs no transaction: `None` when it is in sight, or the answer
    /// that the same request got while it was.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is neither, and [`Error::RequestIdReused`].
    async fn unseen<T: DeserializeOwned>(
        &self,
        request: &Request,
        sight: &Sight,
        id: ImageId,
    ) -> Result<Option<T>, Error> {
        if self.index.shows_any(sight, &[id]).await? {
            return Ok(None);
        }
        let answer = self.store.remembered(request).await?;
        answer.ok_or(Error::NotFound(Resource::Image)).map(Some)
    }

    /// Writes, and tells whom it concerns of what is durable then.
    async fn transact<T: Serialize + DeserializeOwned>(
        &self,
        request: &Request,
        write: impl AsyncFnOnce(&mut Write<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (answer, effects) = self.store.transact(request, write).await?;
        self.queue.deliver(effects.messages);
        self.signals.announce(&effects.committed);
        Ok(answer)
    }
}

/// The image that a request was to give: that there is none is among the violations.
fn given(draft: Option<ImageDraft>, violations: &Violations) -> Result<ImageDraft, Error> {
    draft.ok_or_else(|| Error::Invalid(violations.clone()))
}
