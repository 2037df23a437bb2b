//! The creation of an image: what a caller gives, and the record and the first build that come of it.

use super::{
    Configuration, Description, Etag, Image, ImageId, ImageInView, Name, Reference, Requirements, Status,
};
use crate::{
    access::{Principal, Standing},
    build::{Build, Job, Kind, Workspace},
    timestamp::Timestamp,
};

/// The input for creating an image; every part has been checked.
#[derive(Clone, Debug)]
pub(crate) struct NewImage {
    pub(crate) name: Name,
    pub(crate) description: Description,
    pub(crate) template: bool,
    pub(crate) enabled: bool,
    pub(crate) reference: WantedReference,
    pub(crate) configuration: Configuration,
}

/// The reference that an image shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WantedReference {
    /// This one, or none.
    Given(Reference),
    /// This one, derived from the name, or a variation of it that is free.
    Derived(Reference),
    /// This one, which it does not write.
    Pulled(Reference),
}

/// The workspace that a snapshot is taken of.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotOrder {
    pub(crate) workspace: Workspace,
    pub(crate) worker: String,
    /// The creator that the image shall have.
    pub(crate) creator: String,
}

/// An image that is to be created.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Creation<'a> {
    pub(crate) new: &'a NewImage,
    pub(crate) creator: &'a str,
    /// The container that it is committed from; `None` when it is built or pulled.
    pub(crate) snapshot: Option<&'a SnapshotOrder>,
}

impl Creation<'_> {
    /// Tells whether builds of it write its reference.
    pub(crate) fn writes_reference(&self) -> bool {
        !self.new.template && !self.is_pulled()
    }

    /// Returns its first build, in the queue; `None` for a template.
    pub(crate) fn first_build(
        &self,
        id: ImageId,
        reference: &Reference,
        requested_by: &str,
        now: Timestamp,
    ) -> Option<Build> {
        let kind = match self.snapshot {
            Some(_) => Kind::Snapshot,
            None if self.is_pulled() => Kind::Pull,
            None => Kind::Build,
        };
        let job = Job {
            kind,
            configuration_revision: 1,
            reference: reference.clone(),
            requirements: self.snapshot.map_or_else(
                || self.new.configuration.requirements(),
                |order| Requirements::of_snapshot(order.worker.clone()),
            ),
            preferred_worker: None,
            workspace: self.snapshot.map(|order| order.workspace.clone()),
        };
        (!self.new.template).then(|| Build::queued(id, 1, requested_by.to_owned(), job, now))
    }

    /// Returns its record, as of the change that creates it.
    pub(crate) fn record(
        &self,
        id: ImageId,
        reference: Reference,
        first_build: Option<&Build>,
        revision: i64,
        at: Timestamp,
    ) -> Image {
        let new = self.new;
        Image {
            id,
            name: new.name.as_str().to_owned(),
            description: new.description.as_str().to_owned(),
            creator: self.creator.to_owned(),
            template: new.template,
            snapshot: self.snapshot.is_some(),
            status: first_build.map(|build| Status::of(build.kind, build.state)),
            status_message: String::new(),
            reference,
            reference_given: new.reference.is_given(),
            enabled: new.enabled,
            pulled: self.is_pulled(),
            configuration_revision: 1,
            artifact: None,
            created_at: at,
            updated_at: at,
            revision,
            etag: Etag(revision),
            latest_build: first_build.map(|build| build.id),
        }
    }

    /// Returns the record as the caller sees it who has created it, maybe in another's name.
    pub(crate) fn in_view(&self, image: Image, caller: &Principal) -> ImageInView {
        let standing = caller.standing_to_new(self.creator);
        // Whoever vouches for somebody else does not see what that one sees.
        let configuration = (standing == Standing::Owner).then(|| self.new.configuration.clone());
        ImageInView { actions: image.allowed_actions(standing), image, configuration }
    }

    fn is_pulled(&self) -> bool {
        self.new.configuration.is_pull() && self.snapshot.is_none()
    }
}

impl WantedReference {
    /// Returns the reference that an image gets: what is derived is varied until it is free, if the image `writes` it. `owner`
    /// returns which image a reference belongs to.
    ///
    /// # Errors
    ///
    /// Those of `owner`.
    pub(crate) async fn choose<E, F: Future<Output = Result<Option<ImageId>, E>>>(
        &self,
        image: ImageId,
        writes: bool,
        owner: impl Fn(Reference) -> F,
    ) -> Result<Reference, E> {
        let (Self::Given(wanted) | Self::Derived(wanted) | Self::Pulled(wanted)) = self;
        let mut chosen = wanted.clone();
        if let Self::Derived(_) = self {
            let mut variation = image;
            while writes && owner(chosen.clone()).await?.is_some_and(|owner| owner != image) {
                chosen = wanted.varied(variation);
                variation = ImageId::new();
            }
        }
        Ok(chosen)
    }

    /// Tells whether a client has given it, rather than its being derived or pulled.
    pub(crate) fn is_given(&self) -> bool {
        matches!(self, Self::Given(_))
    }
}
