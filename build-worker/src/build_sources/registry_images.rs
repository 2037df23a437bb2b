//! Images of registries: whether a build may use them, and what the engine keeps of them for it.

use proto::dispatch::source::Source;

use super::{BuildSources, no_platforms, words_of};
use crate::{
    base_images::{BaseImage, Origin},
    engine::{Configuration, EngineError, EngineEvent, EngineImage, EventSender, Manifest},
    reference,
};

/// An image of a registry in the engine.
#[derive(Debug)]
pub(crate) struct HeldImage {
    /// The image for the engine's platform.
    pub(crate) image: EngineImage,
    /// Digest of its configuration.
    pub(crate) config_digest: String,
    /// The image with this configuration that is kept for builds.
    pub(crate) base: BaseImage,
}

impl BuildSources {
    /// Returns a reference with the digest that the registry has for it, so that the engine takes what was decided
    /// about; `None` if that is an image which the requester cannot see.
    pub(super) async fn pin(&self, image: &str) -> Result<Option<String>, EngineError> {
        let digest = self.engine.registry_digest(image, &self.creator).await?;
        let pinned = format!("{}@{digest}", reference::repository(image));
        Ok((!self.is_hidden(&pinned, &digest).await?).then_some(pinned))
    }

    /// Reports whether a digest stands for an image that the requester cannot see: the digest of a configuration,
    /// or that by which the image is pulled.
    pub(super) async fn is_hidden(&self, pinned: &str, digest: &str) -> Result<bool, EngineError> {
        let reference = format!("{}@{digest}", reference::repository(pinned));
        Ok(match self.resolve(vec![reference]).await?.pop().flatten() {
            Some(Source::Artifact(_) | Source::Foreign(_)) => false,
            Some(Source::Missing(_)) | None => true,
        })
    }

    /// Reports whether an image that the engine knows by these digests is readable for the creator in all
    /// registries that it was pulled from with credentials.
    async fn may_read(&self, pinned: &str, repo_digests: &[String]) -> Result<bool, EngineError> {
        let repository = reference::repository(pinned);
        let others = repo_digests.iter().filter_map(|digest| reference::canonical(digest));
        for other in others.filter(|other| reference::repository(other) != repository) {
            if !reference::is_ours(&other) && self.engine.has_credentials(&other) {
                match self.engine.registry_digest(&other, &self.creator).await {
                    Ok(_) => {}
                    // Containerd knows an image by all of its names, and the registry need not have it.
                    Err(EngineError::Refused(reason)) if words_of(&reason) == Self::NOT_FOUND => {}
                    Err(EngineError::Refused(_)) => return Ok(false),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(true)
    }

    /// Reports whether the requester may have an image that the engine holds by this reference.
    ///
    /// A registry can answer with any digest, and what the engine has already is not even asked of the registry.
    ///
    /// # Errors
    ///
    /// Returns an error if that cannot be decided now.
    pub(crate) async fn may_have(&self, pinned: &str, held: &HeldImage) -> Result<bool, EngineError> {
        Ok(!self.is_hidden(pinned, &held.config_digest).await?
            && self.may_read(pinned, &held.base.image.repo_digests).await?)
    }

    /// Makes sure that the engine has an image of a registry, and keeps it.
    pub(super) async fn hold(
        &self,
        image: &str,
        pinned: &str,
        events: &EventSender,
    ) -> Result<HeldImage, EngineError> {
        if let Some(found) = self.engine.image(pinned).await? {
            return self.keep(pinned, found, Origin::Found).await;
        }
        let mut pulling = self.engine.pull(reference::familiar(image), pinned, &self.creator)?;
        while let Some(event) = pulling.next().await {
            match event? {
                EngineEvent::Built(_) => {}
                // The receiver may be gone.
                event @ (EngineEvent::Progress(_) | EngineEvent::Gap(_)) => {
                    drop(events.send(Ok(event)).await)
                }
            }
        }
        let pulled = self.engine.image(pinned).await?.ok_or_else(|| EngineError::removed(pinned))?;
        self.keep(pinned, pulled, Origin::Pulled).await
    }

    /// Keeps an image that the engine has by this name until the end of the attempt, at least.
    ///
    /// BuildKit would use any image of an index that containerd has the parts of, without verifying its layers;
    /// so of an index, only the image for the engine's platform is for builds.
    ///
    /// # Errors
    ///
    /// Returns an error if the build may use an image of another platform, or if the engine does not work.
    pub(crate) async fn keep(
        &self,
        name: &str,
        image: EngineImage,
        origin: Origin,
    ) -> Result<HeldImage, EngineError> {
        let whole = self.keep_by(&image.id, &image, origin).await?;
        let (name, image, origin) = match self.engine.manifest(&image, name).await? {
            Manifest::Unknown if self.names_platform => return Err(no_platforms(name)),
            Manifest::Only | Manifest::Unknown => (name.to_owned(), image, origin),
            Manifest::OfIndex(digest) => {
                let own = format!("{}@{digest}", reference::repository(name));
                let (image, origin) = self.image_of_index(&own).await?;
                (own, image, origin)
            }
        };
        let config_digest = self.config_digest(&name, &image).await?;
        let base = if config_digest == image.id {
            whole
        } else {
            self.in_use().push(whole.in_use);
            self.keep_by(&config_digest, &image, origin).await?
        };
        Ok(HeldImage { image, config_digest, base })
    }

    async fn keep_by(
        &self,
        digest: &str,
        image: &EngineImage,
        origin: Origin,
    ) -> Result<BaseImage, EngineError> {
        self.bases.keep(image, digest, origin).await?.ok_or_else(|| EngineError::removed(&image.id))
    }

    /// Returns an image that came with its index, by a name of its own.
    async fn image_of_index(&self, own: &str) -> Result<(EngineImage, Origin), EngineError> {
        if let Some(found) = self.engine.image(own).await? {
            return Ok((found, Origin::Found));
        }
        // The engine has it already: this gives it the name.
        let mut naming = self.engine.pull(reference::familiar(own), own, &self.creator)?;
        while let Some(event) = naming.next().await {
            event?;
        }
        let named = self.engine.image(own).await?.ok_or_else(|| EngineError::removed(own))?;
        Ok((named, Origin::Pulled))
    }

    /// Returns the digest of the configuration that builds get of an image.
    async fn config_digest(&self, name: &str, image: &EngineImage) -> Result<String, EngineError> {
        if !image.config_digest.is_empty() {
            return Ok(image.config_digest.clone());
        }
        let Configuration { digest, layers } = self.engine.configuration(name).await?;
        // These were verified.
        if layers != image.layers {
            let rule = format!("{name}: has several images for the engine's platform");
            return Err(EngineError::Refused(rule));
        }
        Ok(digest)
    }
}
