//! Reads: everything that needs no transaction.

use std::sync::Arc;

use super::Catalog;
use crate::{
    access::{Action, Grantee, Permissions, Principal},
    build::{BuildId, BuildInView},
    dispatch::Worker,
    error::{Error, Refusal, Resource},
    image::{Artifact, ImageDraft, ImageId, Position, Query, Written},
    index::{CachedConfiguration, Page, VisibleImage},
    search::{Part, Term},
};

impl Catalog {
    /// Returns an image and its configuration.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and the errors of
    /// [`Index::fresh`](crate::index::Index::fresh).
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
    /// Returns the errors of [`image`](Self::image), and [`Error::Refused`] if the image has no Dockerfile to
    /// show.
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
    /// Returns the errors of [`Index::fresh`](crate::index::Index::fresh).
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

    /// Returns the parts of an image that contain a search term.
    pub(crate) fn hits(&self, found: &VisibleImage, term: &Term) -> Vec<Part> {
        self.index.hits(&found.entry, term)
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
    /// Returns [`Error::NotFound`] if the caller cannot see the image, [`Error::Forbidden`] without
    /// permission to use it, and [`Error::NotResolvable`] if the image cannot back workspaces now.
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
        self.index.visible(&caller.visibility(), build.build.image, Resource::Build(build.build.id)).await?;
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
    /// Returns [`Error::NotFound`] if the caller cannot see the image, and [`Error::Forbidden`] if it may not
    /// share it.
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

    /// Returns the next workers, ordered by name. Every caller may read them.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<Worker>, Error> {
        self.store.workers(after, limit).await
    }
}
