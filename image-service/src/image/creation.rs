//! The creation of an image: the input of a caller, and the record and first build that result from it.

use super::{
    Configuration, Description, Etag, Image, ImageId, ImageInView, Name, Reference, Requirements, Status,
};
use crate::{
    access::{Identity, Principal, Relation},
    build::{Build, Job, Kind, Workspace},
    timestamp::Timestamp,
};

/// The checked input for creating an image.
#[derive(Clone, Debug)]
pub(crate) struct NewImage {
    pub(crate) name: Name,
    pub(crate) description: Description,
    pub(crate) template: bool,
    pub(crate) enabled: bool,
    pub(crate) reference: WantedReference,
    pub(crate) configuration: Configuration,
}

/// The reference that an image is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WantedReference {
    /// This reference, or a failure if it is taken.
    Given(Reference),
    /// This reference, derived from the name, or with a number that makes it free.
    Derived(Reference),
    /// This reference, which the image does not write.
    Pulled(Reference),
}

/// The workspace to take a snapshot of.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotOrder {
    pub(crate) workspace: Workspace,
    pub(crate) worker: String,
    /// Creator of the new image.
    pub(crate) creator: String,
}

/// An image that is to be created.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Creation<'a> {
    pub(crate) new: &'a NewImage,
    pub(crate) creator: &'a str,
    /// Workspace that the image is committed from; `None` if the image is built or pulled.
    pub(crate) snapshot: Option<&'a SnapshotOrder>,
}

impl Creation<'_> {
    /// Reports whether builds of the image write its reference.
    pub(crate) fn writes_reference(&self) -> bool {
        !self.new.template && !self.is_pulled()
    }

    /// Returns the first build of the image, queued; `None` for a template.
    pub(crate) fn first_build(
        &self,
        id: ImageId,
        reference: &Reference,
        requester: &Identity,
        now: Timestamp,
    ) -> Option<Build> {
        let kind = match self.snapshot {
            Some(_) => Kind::Snapshot,
            None if self.is_pulled() => Kind::Pull,
            None => Kind::Build,
        };
        let job = Job {
            kind,
            creator: self.creator.to_owned(),
            configuration_revision: 1,
            reference: reference.clone(),
            requirements: self.snapshot.map_or_else(
                || self.new.configuration.requirements(),
                |order| Requirements::of_snapshot(order.worker.clone()),
            ),
            preferred_worker: None,
            workspace: self.snapshot.map(|order| order.workspace.clone()),
        };
        (!self.new.template).then(|| Build::queued(id, 1, requester.clone(), job, now))
    }

    /// Returns the record of the image, as of the change that creates it.
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
            status: first_build.map(|build| Status::from_build(build.kind, build.state)),
            status_message: String::new(),
            reference,
            artifact_reference: None,
            reference_given: new.reference.is_given(),
            enabled: new.enabled,
            pulled: self.is_pulled(),
            configuration_revision: 1,
            artifact: None,
            artifact_missing: false,
            created_at: at,
            updated_at: at,
            revision,
            etag: Etag(revision),
            latest_build: first_build.map(|build| build.id),
        }
    }

    /// Returns the record as seen by `caller`, which may have created the image for another subject.
    pub(crate) fn in_view(&self, image: Image, caller: &Principal) -> ImageInView {
        let standing = caller.standing_to_new(self.creator);
        // A caller that creates an image for another subject does not see everything that its creator sees.
        let configuration = (standing.relation == Relation::Owner).then(|| self.new.configuration.clone());
        ImageInView { actions: image.allowed_actions(standing), image, configuration }
    }

    fn is_pulled(&self) -> bool {
        self.new.configuration.is_pull() && self.snapshot.is_none()
    }
}

impl WantedReference {
    /// Returns the reference that an image gets.
    ///
    /// A derived reference gets a number if it is taken and the image `writes` it: one that is free while the
    /// one before is taken, so that equal states give equal references. `owner` returns the image that a
    /// reference belongs to.
    ///
    /// # Errors
    ///
    /// Returns the errors of `owner`.
    pub(crate) async fn choose<E, F: Future<Output = Result<Option<ImageId>, E>>>(
        &self,
        image: ImageId,
        writes: bool,
        owner: impl Fn(Reference) -> F,
    ) -> Result<Reference, E> {
        let (Self::Given(wanted) | Self::Derived(wanted) | Self::Pulled(wanted)) = self;
        let mut chosen = wanted.clone();
        if let Self::Derived(_) = self {
            let is_taken =
                async |reference| Ok(writes && owner(reference).await?.is_some_and(|owner| owner != image));
            if is_taken(chosen.clone()).await? {
                // Of the numbers up to `taken`, not all need be taken.
                let (mut taken, mut free) = (1, 2);
                while is_taken(wanted.numbered(free)).await? {
                    (taken, free) = (free, free.saturating_mul(2));
                }
                while free - taken > 1 {
                    let between = taken + (free - taken) / 2;
                    if is_taken(wanted.numbered(between)).await? {
                        taken = between;
                    } else {
                        free = between;
                    }
                }
                chosen = wanted.numbered(free);
            }
        }
        Ok(chosen)
    }

    /// Reports whether a client has given the reference, so that it is neither derived nor pulled.
    pub(crate) fn is_given(&self) -> bool {
        matches!(self, Self::Given(_))
    }
}
