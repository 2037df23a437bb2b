//! Base images: what builds use of registries, or of the images that were loaded into the engine.
//!
//! BuildKit does not verify that the layers of an image are those that its configuration names, so a registry
//! could have others take their place, in everybody's builds. A pull does verify them. So the engine pulls
//! what a build may use, and the build gets it under a name that no registry can answer for; nor does the
//! engine fetch it for another platform then.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ring::digest::{SHA256, digest};
use tokio::time::Instant;

use crate::{
    engine::{Engine, EngineError, EngineImage},
    locks::{Locks, SharedLock},
    reference,
};

/// The base images that the engine keeps for the builds of a worker.
#[derive(Debug)]
pub(crate) struct BaseImages {
    engine: Arc<dyn Engine>,
    /// Beginning of the names, `trailer.invalid/base/<16 hexadecimal digits for the worker>/`: what one worker does not
    /// use, another one on the same engine may.
    prefix: String,
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

/// The way in which an image came to the engine.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Pulled for a build, and removed once no build needs it.
    Pulled,
    /// Already there, and left there.
    Found,
}

impl BaseImages {
    pub(crate) fn new(engine: Arc<dyn Engine>, worker: &str, kept: Duration) -> Self {
        let worker = hex::encode(&digest(&SHA256, worker.as_bytes()).as_ref()[..8]);
        let prefix = format!("trailer.invalid/base/{worker}/");
        Self { engine, prefix, kept, in_use: Locks::default(), last_uses: Mutex::default() }
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
        let name = |origin: Origin| format!("{}{}:{digest}", self.prefix, origin.repository());
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
        let names = self.engine.names(&format!("{}*", self.prefix)).await?;
        let now = Instant::now();
        self.last_uses().retain(|name, _| names.contains(name));
        for name in names {
            let last_use = *self.last_uses().entry(name.clone()).or_insert(now);
            let (repository, digest) = reference::parts(&name);
            let origin = repository.strip_prefix(&self.prefix).and_then(Origin::of_repository);
            let Some(origin) = origin else { continue };
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

impl Origin {
    /// Returns the last part of the repository of a base image.
    fn repository(self) -> &'static str {
        match self {
            Self::Pulled => "pulled",
            Self::Found => "found",
        }
    }

    fn of_repository(name: &str) -> Option<Self> {
        [Self::Pulled, Self::Found].into_iter().find(|origin| origin.repository() == name)
    }
}
