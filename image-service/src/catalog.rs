//! What callers can do with images and builds: authorise, write, publish.

use std::sync::Arc;

use crate::{
    access::{Action, Principal, Role},
    build::{Build, BuildId, BuildInView, Pending, PendingReason, State},
    dispatch::Event,
    error::{Error, Refusal},
    image::{Image, ImageDraft, ImageId, ImageInView, ImageKey, RepositoryPrefixes, View},
    queue::Queue,
    signals::Signals,
    store::{Committed, Store, WorkerRow},
    timestamp::Timestamp,
};

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

    /// Registers an image and queues its first build.
    pub(crate) async fn create_image(
        &self,
        caller: &Principal,
        draft: ImageDraft,
    ) -> Result<(ImageInView, BuildInView), Error> {
        caller.require(Role::Builder)?;
        let new = draft.check(&self.prefixes, caller.is_admin())?;
        let (image, build) = self.store.create_image(caller.subject(), &new, Timestamp::now()).await?;
        self.queued();
        let image = ImageInView { image, configuration: Some(new.configuration) };
        Ok((image, self.in_view(build).await))
    }

    /// Reads one image, in full.
    pub(crate) async fn image(&self, caller: &Principal, id: ImageId) -> Result<ImageInView, Error> {
        self.store.image(&caller.sight(), id, View::Full).await
    }

    /// Reads the next images that the caller sees, the latest update first.
    pub(crate) async fn images(
        &self,
        caller: &Principal,
        after: Option<ImageKey>,
        limit: u64,
        view: View,
    ) -> Result<Vec<ImageInView>, Error> {
        self.store.images(&caller.sight(), after, limit, view).await
    }

    /// Removes an image; work that is under way is cancelled.
    pub(crate) async fn delete_image(&self, caller: &Principal, id: ImageId) -> Result<(), Error> {
        self.permitted(caller, Action::Delete, id).await?;
        let (decision, committed) =
            self.store.delete_image(id, caller.subject(), self.queue.policy(), Timestamp::now()).await?;
        self.queue.deliver(decision);
        self.signals.announce(&committed);
        Ok(())
    }

    /// Queues another build.
    pub(crate) async fn build_image(
        &self,
        caller: &Principal,
        id: ImageId,
    ) -> Result<(Image, BuildInView), Error> {
        self.permitted(caller, Action::Build, id).await?;
        let (image, build) = self.store.queue_build(id, caller.subject(), Timestamp::now()).await?;
        self.queued();
        Ok((image, self.in_view(build).await))
    }

    /// Cancels the latest build, if it is the one that is meant.
    pub(crate) async fn cancel_build(
        &self,
        caller: &Principal,
        id: ImageId,
        meant: Option<BuildId>,
    ) -> Result<(Image, BuildInView), Error> {
        let image = self.permitted(caller, Action::CancelBuild, id).await?;
        if meant.is_some_and(|meant| meant != image.latest_build) {
            return Err(Error::Refused(Refusal::OtherBuild));
        }
        let event = Event::Cancel { by: caller.subject().to_owned() };
        self.queue.handle(image.latest_build, &event).await?;
        let image = self.store.image(&caller.sight(), id, View::Basic).await?.image;
        let build = self.build(caller, image.latest_build).await?;
        Ok((image, build))
    }

    /// Reads one build.
    pub(crate) async fn build(&self, caller: &Principal, id: BuildId) -> Result<BuildInView, Error> {
        let build = self.store.build(&caller.sight(), id).await?;
        Ok(self.in_view(build).await)
    }

    /// Reads the next builds of an image, the newest first.
    pub(crate) async fn builds(
        &self,
        caller: &Principal,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<BuildInView>, Error> {
        let builds = self.store.builds(&caller.sight(), image, before, limit).await?;
        let mut in_view = Vec::with_capacity(builds.len());
        for build in builds {
            in_view.push(self.in_view(build).await);
        }
        Ok(in_view)
    }

    /// Reads the next workers by name; every caller may.
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<WorkerRow>, Error> {
        self.store.workers(after, limit).await
    }

    /// Whether the service has heard of the worker lately.
    pub(crate) fn is_online(&self, worker: &WorkerRow) -> bool {
        worker.is_online(self.queue.times().silence, Timestamp::now())
    }

    async fn permitted(&self, caller: &Principal, action: Action, id: ImageId) -> Result<Image, Error> {
        let image = self.store.image(&caller.sight(), id, View::Basic).await?.image;
        caller.require_action(action, &image)?;
        Ok(image)
    }

    fn queued(&self) {
        self.signals.announce(&Committed { image_changed: true, recorded: None, queue_moved: true });
    }

    async fn in_view(&self, build: Build) -> BuildInView {
        let dispatching = Pending { reason: PendingReason::Dispatching, queue_position: 0 };
        let pending = match build.state {
            State::Queued => Some(self.pending(&build).await.unwrap_or_else(|error| {
                // What is computed when read must not fail a write that is durable.
                tracing::warn!(build = %build.id, %error, "cannot tell why a build is pending");
                dispatching
            })),
            State::Claimed => Some(dispatching),
            State::Running | State::Publishing | State::Succeeded | State::Failed | State::Cancelled => None,
        };
        BuildInView { build, pending }
    }

    async fn pending(&self, build: &Build) -> Result<Pending, Error> {
        let before = self.store.queued_before(build).await?;
        let workers = self.store.workers(None, 1_000).await?;
        let mut online = workers.iter().filter(|worker| self.is_online(worker)).peekable();
        let reason = if online.peek().is_none() {
            PendingReason::NoWorkerOnline
        } else if online.all(|worker| worker.slots_taken >= i64::from(worker.slots)) {
            PendingReason::AllSlotsTaken
        } else {
            PendingReason::Dispatching
        };
        Ok(Pending { reason, queue_position: i64::try_from(before).unwrap_or(i64::MAX).saturating_add(1) })
    }
}
