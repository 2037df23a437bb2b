//! Images that builds start from or copy from: what the requester of a build cannot see does not exist for
//! the build.

use std::collections::BTreeSet;

use super::Catalog;
use crate::{
    access::{Grantee, Principal, Visibility},
    build::{Build, DistantBase},
    dispatch::Attempt,
    error::{Error, Resource},
    image::{ImageId, ResolvedSource, SourceReference},
};

impl Catalog {
    /// Resolves the references that an attempt names, in their order, for the requester of its build.
    ///
    /// A repository below a prefix, or with a reference of any image, is the catalogue's: whatever it does
    /// not know there is missing, and so is the digest of an invisible image in any other repository. The
    /// requester has the roles of when the build was queued, and sees what it is granted now. What the
    /// creator of the image that is built cannot see is missing, too.
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
            .ok_or(Error::NotFound(Resource::Build(attempt.build)))?;
        let mut resolved = Vec::with_capacity(references.len());
        for text in references {
            resolved.push(match SourceReference::parse(text) {
                Some(reference) => self.resolve_source(&build, worker, &reference).await?,
                None => ResolvedSource::Missing { is_elsewhere: false },
            });
        }
        Ok(resolved)
    }

    async fn resolve_source(
        &self,
        build: &Build,
        worker: &Principal,
        reference: &SourceReference,
    ) -> Result<ResolvedSource, Error> {
        let visibility = build.requester.visibility();
        let owners = self.store.owners(worker.subject(), reference).await?;
        let mut has_visible_digest = false;
        for found in self.index.images_by_id(&visibility, &owners.images).await?.into_values() {
            let image = &found.entry.image;
            let Some(artifact) = image.artifact() else { continue };
            if !self.is_seen_by_creator(build, image.id).await? {
                continue;
            }
            if reference.names(&artifact) {
                let worker_may_build = self.may_build_on(build, image.id, &artifact.worker).await?;
                return Ok(ResolvedSource::Artifact {
                    image: image.id,
                    artifact: Box::new(artifact),
                    worker_may_build,
                });
            }
            has_visible_digest |= reference.has_digest_of(&artifact);
        }
        let is_elsewhere = !self.prefixes.contain(&reference.repository);
        let is_foreign = is_elsewhere && (!owners.is_known || has_visible_digest);
        Ok(if is_foreign { ResolvedSource::Foreign } else { ResolvedSource::Missing { is_elsewhere } })
    }

    /// Reports whether the creator of the image that is built sees an image, too.
    ///
    /// Creators see what builds of their images print and make, whoever requests them. Which groups a creator has
    /// is known of callers only, so that what is granted to one of them does not count here.
    async fn is_seen_by_creator(&self, build: &Build, image: ImageId) -> Result<bool, Error> {
        if build.creator == build.requester.subject {
            return Ok(true);
        }
        let creator = BTreeSet::from([Grantee::Subject(build.creator.clone()), Grantee::Everybody]);
        let seen = self.index.images_by_id(&Visibility::new(creator, true), &[image]).await?;
        Ok(!seen.is_empty())
    }

    /// Reports whether a build may be handed back for the worker that alone holds an image.
    ///
    /// A build that was handed back before for another image stays with the worker that holds that one.
    async fn may_build_on(&self, build: &Build, image: ImageId, worker: &str) -> Result<bool, Error> {
        if build.base.as_ref().is_some_and(|base| base.image != image) {
            return Ok(false);
        }
        let base = Some(DistantBase { image, worker: worker.to_owned() });
        match self.store.worker(worker).await {
            Ok(worker) => Ok(worker.suits(&Build { base, ..build.clone() })),
            Err(Error::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
