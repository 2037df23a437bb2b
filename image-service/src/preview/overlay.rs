//! The images of a preview, as its rows change them one after the other.

use std::collections::HashMap;

use crate::{
    access::{Action, Standing},
    build::{Build, BuildId, State},
    dispatch::{self, Event, Rows},
    error::{Error, Resource},
    image::{BatchAction, Etag, Image, ImageId, ImageInView, Precondition, Status},
    index::VisibleImage,
    request::Request,
    store::Store,
    timestamp::Timestamp,
};

/// The images that a caller can see, and the changes made to them.
///
/// References do not change, because no row of a batch claims one.
#[derive(Debug)]
pub(super) struct Overlay<'a> {
    request: &'a Request,
    store: &'a Store,
    now: Timestamp,
    /// Number of the latest revision.
    revision: i64,
    images: HashMap<ImageId, VisibleImage>,
    /// Images that have changed; `None` for a deleted one.
    changed: HashMap<ImageId, Option<Image>>,
    /// Builds that may be cancelled.
    builds: HashMap<BuildId, Build>,
    /// Number of the caller's queued builds, counted up to the maximum that it may have.
    pending: u64,
}

impl<'a> Overlay<'a> {
    pub(super) fn new(
        request: &'a Request,
        store: &'a Store,
        now: Timestamp,
        revision: i64,
        images: impl IntoIterator<Item = VisibleImage>,
    ) -> Self {
        let images = images.into_iter().map(|found| (found.entry.image.id, found)).collect();
        let (changed, builds) = (HashMap::new(), HashMap::new());
        Self { request, store, now, revision, images, changed, builds, pending: 0 }
    }

    /// Returns the time at which all changes happen.
    pub(super) fn now(&self) -> Timestamp {
        self.now
    }

    /// Counts the caller's queued builds.
    pub(super) async fn count_pending(&mut self) -> Result<(), Error> {
        self.pending = self.store.pending_builds(self.request.caller.subject()).await?;
        Ok(())
    }

    /// Returns the builds that cancelling each image would affect.
    pub(super) fn builds_to_cancel(&self) -> Vec<BuildId> {
        let latest = |found: &VisibleImage| found.entry.image.build_to_cancel(found.standing, None, None);
        self.images.values().filter_map(|found| latest(found).ok()).collect()
    }

    /// Reads builds that are going to be cancelled.
    pub(super) async fn read_builds(&mut self, ids: impl IntoIterator<Item = BuildId>) -> Result<(), Error> {
        self.builds.extend(self.store.builds_by_id(ids).await?);
        Ok(())
    }

    /// Applies the action of a batch to an image.
    ///
    /// # Errors
    ///
    /// Returns the errors that the row would have.
    pub(super) fn row(
        &mut self,
        action: BatchAction,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<ImageInView, Error> {
        match action {
            BatchAction::Build => self.build(id, etag, BuildId::new()),
            BatchAction::CancelBuild => Ok(self.cancel(id, etag, None)?.0),
            BatchAction::Enable => self.enable(id, etag, true),
            BatchAction::Disable => self.enable(id, etag, false),
            BatchAction::Delete => self.delete(id, etag),
        }
    }

    pub(super) fn enable(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        enabled: bool,
    ) -> Result<ImageInView, Error> {
        let action = if enabled { Action::Enable } else { Action::Disable };
        let (image, standing) = self.target(id, etag, action)?;
        let mut image = image.clone();
        if image.enabled != enabled {
            image.enabled = enabled;
            image = self.edit(image);
        }
        Ok(in_view(image, standing))
    }

    /// Queues a build with this id.
    pub(super) fn build(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        build: BuildId,
    ) -> Result<ImageInView, Error> {
        let (image, standing) = self.target(id, etag, Action::Build)?;
        self.store.require_storage()?;
        self.store.policy().require_room(self.pending)?;
        let mut image = image.clone();
        image.latest_build = Some(build);
        image.status = Some(Status::from_build(image.build_kind(), State::Queued));
        image.status_message.clear();
        self.pending += 1;
        Ok(in_view(self.save(image), standing))
    }

    /// Cancels the latest build, which must have been [read](Self::read_builds).
    pub(super) fn cancel(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        meant: Option<BuildId>,
    ) -> Result<(ImageInView, Build), Error> {
        let (image, standing) = self.seen(id)?;
        let latest = image.build_to_cancel(standing, etag, meant)?;
        // Builds are deleted only with their image, so the image was deleted since the lookup.
        let build = self.builds.get(&latest).cloned().ok_or(Error::NotFound(Resource::Image(id)))?;
        let mut image = image.clone();
        let event = Event::Cancel { by: self.request.caller.subject().to_owned() };
        let rows = Rows { build: build.clone(), configuration: None };
        let decision =
            dispatch::decide(rows, &event, self.store.policy(), self.now).map_err(Error::Refused)?;
        let build = decision.build.unwrap_or(build);
        let (status, message) = (Some(Status::from_build(build.kind, build.state)), build.message());
        if image.status != status || image.status_message != message {
            image.status = status;
            image.status_message = message;
            image = self.save(image);
        }
        self.builds.insert(latest, build.clone());
        Ok((in_view(image, standing), build))
    }

    fn delete(&mut self, id: ImageId, etag: Option<Precondition>) -> Result<ImageInView, Error> {
        let (image, standing) = self.target(id, etag, Action::Delete)?;
        let image = image.clone();
        self.changed.insert(id, None);
        Ok(in_view(image, standing))
    }

    /// Saves an image that a client has changed, under a new etag.
    pub(super) fn edit(&mut self, mut image: Image) -> Image {
        image.etag = Etag(self.revision + 1);
        self.save(image)
    }

    /// Saves an image that has changed, under a new revision.
    fn save(&mut self, mut image: Image) -> Image {
        self.revision += 1;
        image.revision = self.revision;
        image.updated_at = self.now;
        self.changed.insert(image.id, Some(image.clone()));
        image
    }

    /// Returns an image on which the caller may perform the action.
    fn target(
        &self,
        id: ImageId,
        etag: Option<Precondition>,
        action: Action,
    ) -> Result<(&Image, Standing), Error> {
        let (image, standing) = self.seen(id)?;
        image.admit(standing, etag, action)?;
        Ok((image, standing))
    }

    /// Returns an image that the caller can see.
    fn seen(&self, id: ImageId) -> Result<(&Image, Standing), Error> {
        let missing = Error::NotFound(Resource::Image(id));
        let Some(found) = self.images.get(&id) else {
            return Err(missing);
        };
        match self.changed.get(&id) {
            None => Ok((&found.entry.image, found.standing)),
            Some(Some(changed)) => Ok((changed, found.standing)),
            Some(None) => Err(missing),
        }
    }
}

fn in_view(image: Image, standing: Standing) -> ImageInView {
    ImageInView { actions: image.allowed_actions(standing), image, configuration: None }
}
