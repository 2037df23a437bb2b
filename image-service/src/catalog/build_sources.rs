//! Images that builds start from or copy from: what the requester of a build cannot see does not exist for the build.

use super::Catalog;
use crate::{
    access::{Principal, Visibility},
    dispatch::Attempt,
    error::{Error, Resource},
    image::{ResolvedSource, SourceReference},
};

impl Catalog {
    /// Resolves the references that an attempt names, in their order, for the requester of its build.
    ///
    /// A repository below a prefix, or with a reference of any image, is the catalogue's: whatever it does not know there
    /// is missing. The requester has the roles of when the build was queued, and sees what it is granted now.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the worker does not hold the attempt.
    pub(crate) async fn resolve_sources(
        &self,
        worker: &Principal,
        attempt: Attempt,
        references: &[String],
    ) -> Result<Vec<ResolvedSource>, Error> {
        let build = self.store.builds_by_id([attempt.build]).await?.remove(&attempt.build);
        let build = build
            .filter(|build| build.is_attempt_of(worker.subject(), attempt.number))
            .ok_or(Error::NotFound(Resource::Build))?;
        let visibility = build.requester.visibility();
        let mut resolved = Vec::with_capacity(references.len());
        for text in references {
            resolved.push(match SourceReference::parse(text) {
                Some(reference) => self.resolve_source(&visibility, &reference).await?,
                None => ResolvedSource::Missing,
            });
        }
        Ok(resolved)
    }

    async fn resolve_source(
        &self,
        visibility: &Visibility,
        reference: &SourceReference,
    ) -> Result<ResolvedSource, Error> {
        let owners = self.store.owners(reference).await?;
        for found in self.index.images_by_id(visibility, &owners.images).await?.into_values() {
            let image = &found.entry.image;
            if let Some(artifact) = image.artifact().filter(|artifact| reference.names(artifact)) {
                return Ok(ResolvedSource::Artifact(image.id, Box::new(artifact)));
            }
        }
        let is_ours = owners.has_repository || self.prefixes.contain(&reference.repository);
        Ok(if is_ours { ResolvedSource::Missing } else { ResolvedSource::Foreign })
    }
}
