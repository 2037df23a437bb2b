//! What callers can do with images, builds and grants: authorise, write, publish.

use std::sync::Arc;

use crate::{
    access::{Action, Permissions, Principal, Role},
    build::{BuildId, BuildInView},
    error::{Error, Refusal, Violations},
    image::{
        Artifact, BatchAction, EditDraft, Etag, HeldImage, ImageDraft, ImageId, ImageInView, Place, Query,
        RepositoryPrefixes, View, Written,
    },
    queue::Queue,
    request::Request,
    signals::Signals,
    store::{Effects, Page, Store, WithBuild},
};

pub(crate) use crate::store::{BatchOutcome, BatchTarget, SnapshotOrder, WorkerRow};

/// The catalogue, as every caller meets it.
#[derive(Clone, Debug)]
pub(crate) struct Catalog {
    store: Store,
    signals: Arc<Signals>,
    queue: Arc<Queue>,
    prefixes: RepositoryPrefixes,
}

impl Catalog {
    pub(crate) fn new(
        store: Store,
        signals: Arc<Signals>,
        queue: Arc<Queue>,
        prefixes: RepositoryPrefixes,
    ) -> Self {
        Self { store, signals, queue, prefixes }
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
        Ok(self.publish(self.store.create_image(request, &new).await?))
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
        Ok(self.publish(self.store.snapshot_workspace(request, of_source, &order).await?))
    }

    /// Reads one image, in full.
    pub(crate) async fn image(&self, caller: &Principal, id: ImageId) -> Result<ImageInView, Error> {
        self.store.image(&caller.sight(), id, View::Full).await
    }

    /// The Dockerfile that an image is built from, and its context.
    pub(crate) async fn dockerfile(&self, caller: &Principal, id: ImageId) -> Result<Written, Error> {
        let found = self.image(caller, id).await?;
        if found.image.snapshot {
            return Err(Error::Refused(Refusal::SnapshotNotWritten));
        }
        let configuration =
            found.configuration.ok_or_else(|| Error::Internal("a full image has no configuration".into()))?;
        configuration.rendered().map_err(Error::Refused)
    }

    /// Reads the next images that the caller sees and that match.
    pub(crate) async fn images(
        &self,
        caller: &Principal,
        query: &Query,
        after: Option<&Place>,
        limit: u64,
        view: View,
        with_total: bool,
    ) -> Result<Page, Error> {
        self.store.list(&caller.sight(), query, after, limit, view, with_total).await
    }

    /// Changes what clients may write.
    pub(crate) async fn update_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
        edit: EditDraft,
    ) -> Result<ImageInView, Error> {
        Ok(self.publish(self.store.update_image(request, id, etag, edit, &self.prefixes).await?))
    }

    /// Says whether an image can back workspaces.
    pub(crate) async fn enable_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
        enabled: bool,
    ) -> Result<ImageInView, Error> {
        Ok(self.publish(self.store.enable_image(request, id, etag, enabled).await?))
    }

    /// Removes an image; work that is under way is cancelled.
    pub(crate) async fn delete_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
    ) -> Result<(), Error> {
        let deleted = self.store.delete_image(request, id, etag).await?;
        self.publish(deleted);
        Ok(())
    }

    /// Queues another build.
    pub(crate) async fn build_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
    ) -> Result<WithBuild, Error> {
        Ok(self.publish(self.store.build_image(request, id, etag).await?))
    }

    /// Cancels the latest build, if it is the one that is meant.
    pub(crate) async fn cancel_build(
        &self,
        request: &Request,
        id: ImageId,
        meant: Option<BuildId>,
    ) -> Result<WithBuild, Error> {
        Ok(self.publish(self.store.cancel_build(request, id, meant).await?))
    }

    /// Does one thing to each of the images, each for itself.
    pub(crate) async fn batch_images(
        &self,
        request: &Request,
        action: BatchAction,
        targets: Vec<BatchTarget>,
    ) -> Result<Vec<BatchOutcome>, Error> {
        Ok(self.publish(self.store.batch_images(request, action, targets).await?))
    }

    /// A draft of another image like this one.
    pub(crate) async fn clone_image(&self, caller: &Principal, id: ImageId) -> Result<ImageDraft, Error> {
        let found = self.store.image_for(&caller.sight(), id, View::Full, Some(Action::Clone)).await?;
        let configuration =
            found.configuration.ok_or_else(|| Error::Internal("a full image has no configuration".into()))?;
        Ok(found.image.clone_draft(&configuration))
    }

    /// What to start a workspace from.
    pub(crate) async fn resolve_image(&self, caller: &Principal, id: ImageId) -> Result<Artifact, Error> {
        let action = Some(Action::CreateWorkspace);
        let image = self.store.image_for(&caller.sight(), id, View::Basic, action).await?.image;
        let reference = image.reference;
        let artifact =
            image.artifact.ok_or_else(|| Error::Internal("a finished build has left no artifact".into()))?;
        Ok(Artifact { reference: artifact.reference.or(Some(reference)), ..artifact })
    }

    /// Reads one build.
    pub(crate) async fn build(&self, caller: &Principal, id: BuildId) -> Result<BuildInView, Error> {
        self.store.build(&caller.sight(), id).await
    }

    /// Reads the next builds of an image, the newest first.
    pub(crate) async fn builds(
        &self,
        caller: &Principal,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<BuildInView>, Error> {
        self.store.builds(&caller.sight(), image, before, limit).await
    }

    /// Reads the next grants of an image, by subject.
    pub(crate) async fn grants(
        &self,
        caller: &Principal,
        image: ImageId,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Vec<(String, Permissions)>, Error> {
        self.store.grants(&caller.sight(), image, after, limit).await
    }

    /// Says what a subject may do with an image.
    pub(crate) async fn grant(
        &self,
        request: &Request,
        image: ImageId,
        subject: &str,
        permissions: Permissions,
    ) -> Result<Permissions, Error> {
        Ok(self.publish(self.store.grant(request, image, subject, permissions).await?))
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
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<WorkerRow>, Error> {
        self.store.workers(after, limit).await
    }

    /// Says whether a worker gets no more builds; for admins.
    pub(crate) async fn drain_worker(
        &self,
        request: &Request,
        name: &str,
        drained: bool,
    ) -> Result<WorkerRow, Error> {
        request.caller.require(Role::Admin)?;
        Ok(self.publish(self.store.drain_worker(request, name, drained).await?))
    }

    /// Tells whom it concerns of what is durable now.
    fn publish<T>(&self, (answer, effects): (T, Effects)) -> T {
        self.queue.deliver(effects.messages);
        self.signals.announce(&effects.committed);
        answer
    }
}

/// The image that a request was to give: that there is none is among the violations.
fn given(draft: Option<ImageDraft>, violations: &Violations) -> Result<ImageDraft, Error> {
    draft.ok_or_else(|| Error::Invalid(violations.clone()))
}
