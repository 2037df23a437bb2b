//! Base images: what builds use of registries, or of the images that were loaded into the engine.
//!
//! BuildKit does not verify that the layers of an image are those that its configuration names, so a registry
//! could have others take their place, in everybody's builds. A pull does verify them. So the engine pulls
//! what a build may use, and the build gets it under a name that no registry can answer for; nor does the
//! engine fetch it for another platform then.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    engine::{Engine, EngineError, EngineImage},
    locks::{Locks, SharedLock},
    reference,
};

/// The base images that the engine keeps for builds.
#[derive(Debug)]
pub(crate) struct BaseImages {
    engine: Arc<dyn Engine>,
    /// Time for which a base image is kept after its last use.
    kept: Duration,
    /// Locks of the names that builds use.
    in_use: Locks,
    /// Time of the last known use of each name.
    last_uses: Mutex<HashMap<String, Instant>>,
}

/// A base image, which the engine keeps while this lives.
#[derive(Debug)]
pub(crate) struct BaseImage {
    pub(crate) name: String,
    /// The image that has the name.
    pub(crate) image: EngineImage,
    pub(crate) in_use: SharedLock,
}

/// The name of a base image in its engine, `trailer.invalid/base/<origin>:<digest>`.
struct BaseName<'a> {
    origin: Origin,
    /// Digest of the configuration, or of an index, without its algorithm.
    digest: &'a str,
}

/// The way in which an image came to the engine.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Pulled for a build, and removed once no build needs it.
    Pulled,
    /// Already there, and left there.
    Found,
}

impl BaseImages {
    /// Pattern of the repositories of base images.
    const REPOSITORIES: &str = "trailer.invalid/base/*";

    pub(crate) fn new(engine: Arc<dyn Engine>, kept: Duration) -> Self {
        Self { engine, kept, in_use: Locks::default(), last_uses: Mutex::default() }
    }

    /// Keeps an image that this digest stands for, of its configuration or of an index; returns `None` if the
    /// engine has lost it meanwhile.
    ///
    /// If another image with the digest is kept already, that one takes its place.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine does not work.
    pub(crate) async fn keep(
        &self,
        image: &EngineImage,
        digest: &str,
        origin: Origin,
    ) -> Result<Option<BaseImage>, EngineError> {
        let (_, digest) = digest.split_once(':').unwrap_or_default();
        let name = |origin| BaseName { origin, digest }.to_string();
        let in_use = self.in_use.lock_shared(digest).await;
        for known in [Origin::Pulled, Origin::Found].map(name) {
            if let Some(image) = self.engine.image(&known).await? {
                self.last_uses().insert(known.clone(), Instant::now());
                return Ok(Some(BaseImage { name: known, image, in_use }));
            }
        }
        let name = name(origin);
        match self.engine.tag(&image.id, &name).await {
            Ok(()) => {}
            Err(EngineError::Refused(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
        self.last_uses().insert(name.clone(), Instant::now());
        Ok(Some(BaseImage { name, image: image.clone(), in_use }))
    }

    /// Removes the base images that no build has used for some time.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot list its images.
    pub(crate) async fn collect(&self) -> Result<(), EngineError> {
        let names = self.engine.names(Self::REPOSITORIES).await?;
        let now = Instant::now();
        self.last_uses().retain(|name, _| names.contains(name));
        for name in names {
            let last_use = *self.last_uses().entry(name.clone()).or_insert(now);
            let Some(BaseName { origin, digest }) = BaseName::parse(&name) else { continue };
            if now.duration_since(last_use) < self.kept {
                continue;
            }
            let Some(_unused) = self.in_use.try_lock_exclusive(digest) else { continue };
            match self.remove(&name, origin).await {
                Ok(()) => tracing::info!(name, "removed an unused base image"),
                // A container uses it.
                Err(EngineError::Refused(_)) => drop(self.last_uses().insert(name, now)),
                Err(error) => tracing::warn!(name, %error, "cannot remove a base image"),
            }
        }
        Ok(())
    }

    /// Removes the name of a base image, and the image if it was pulled for builds and has no other name.
    async fn remove(&self, name: &str, origin: Origin) -> Result<(), EngineError> {
        let image = if origin == Origin::Pulled { self.engine.image(name).await? } else { None };
        // An engine may count digests among the names.
        let is_other = |other: &&String| *other != name && !other.contains('@');
        if let Some(image) = image.filter(|image| !image.names.iter().any(|other| is_other(&other))) {
            let own = format!("{}@", reference::repository(name));
            for pulled in image.repo_digests.iter().filter(|digest| !digest.starts_with(&own)) {
                self.engine.untag(pulled).await?;
            }
        }
        self.engine.untag(name).await
    }

    fn last_uses(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.last_uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> BaseName<'a> {
    const PULLED: &'static str = "trailer.invalid/base/pulled";
    const FOUND: &'static str = "trailer.invalid/base/found";

    /// Parses a name, `repository:tag`; returns `None` if it is no base image's.
    fn parse(name: &'a str) -> Option<Self> {
        let (repository, digest) = reference::parts(name);
        let origin = match repository {
            Self::PULLED => Origin::Pulled,
            Self::FOUND => Origin::Found,
            _ => return None,
        };
        Some(Self { origin, digest })
    }
}

impl fmt::Display for BaseName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let repository = match self.origin {
            Origin::Pulled => Self::PULLED,
            Origin::Found => Self::FOUND,
        };
        write!(f, "{repository}:{}", self.digest)
    }
}
