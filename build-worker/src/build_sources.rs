//! Sources of one build: the images that it may use, by the catalogue's word and the operator's rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use proto::dispatch::{
    ArtifactSource, Attempt, DistantBase, MissingSource, ResolveSourcesRequest, source::Source,
};

use crate::{
    artifact_name::ArtifactName,
    base_images::{BaseImage, BaseImages, Origin},
    engine::{Engine, EngineError, EngineImage, EventSender, ImageDecision, Manifest, SourcePolicy},
    fault,
    labels::IMAGE_LABEL,
    locks::SharedLock,
    reference,
    service_client::ServiceClient,
    source_rules::{Pattern, SourceRules},
};

mod registry_images;

/// The sources of an attempt. What was decided stays decided until its end.
#[derive(Debug)]
pub(crate) struct BuildSources {
    pub(crate) attempt: Attempt,
    pub(crate) catalogue: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) service: Arc<dyn ServiceClient>,
    pub(crate) bases: Arc<BaseImages>,
    pub(crate) rules: Arc<SourceRules>,
    /// Creator of the image that is built.
    pub(crate) creator: String,
    /// Set if registries are asked for newer images.
    pub(crate) pull_base: bool,
    /// Set if the Dockerfile may name another platform than the engine's own.
    pub(crate) names_platform: bool,
    /// References to images that the Dockerfile shows before the build, in its words.
    pub(crate) references: BTreeSet<String>,
    /// Frontend that the Dockerfile names, in its words.
    pub(crate) frontend: Option<String>,
    /// Set if the engine has no known flaw about frontends that a Dockerfile names.
    pub(crate) allows_frontends: bool,
    /// Set if the engine has no known flaw about directories of Git repositories.
    pub(crate) allows_git_directories: bool,
    /// Decisions by canonical reference.
    pub(crate) decisions: Mutex<BTreeMap<String, ImageDecision>>,
    /// Locks that keep the base images in the engine.
    pub(crate) in_use: Mutex<Vec<SharedLock>>,
}

/// A pull that may begin.
#[derive(Debug)]
pub(crate) struct DecidedPull {
    /// Reference with the digest to pull.
    pub(crate) pinned: String,
    /// Set if the catalogue says that it is an artifact which the requester may see. Of any other image it has to be
    /// asked once it was pulled.
    pub(crate) is_artifact: bool,
}

impl BuildSources {
    /// Reason why an image is missing that the requester cannot see.
    const NOT_FOUND: &str = "not found";
    /// Maximum number of references in one request to the service.
    const MAX_REFERENCES: usize = 64;
    /// Maximum number of images that are pulled at the same time.
    const PULLS: usize = 4;

    /// Decides about a pull.
    ///
    /// # Errors
    ///
    /// Returns an error if the image may not be pulled or does not exist, or if that cannot be decided now.
    pub(crate) async fn decide_pull(&self, named: &str) -> Result<DecidedPull, EngineError> {
        let refused = |rule: &str| Err(EngineError::Refused(format!("{named}: {rule}")));
        let Some(image) = reference::canonical(named) else { return refused("is no reference to an image") };
        match self.resolve(vec![image.clone()]).await?.pop().flatten() {
            Some(Source::Artifact(artifact)) if !artifact.registry_reference.is_empty() => {
                return Ok(DecidedPull { pinned: artifact.registry_reference, is_artifact: true });
            }
            Some(Source::Foreign(_)) => {}
            Some(Source::Missing(MissingSource { is_elsewhere: true }))
                if !self.rules.allow_from_registry(&image) => {}
            Some(Source::Artifact(_) | Source::Missing(_)) | None => return refused(Self::NOT_FOUND),
        }
        if !self.rules.allow_from_registry(&image) {
            return refused("the operator of the worker allows no images from there (--allow-source)");
        }
        match self.pin(&image).await {
            Ok(Some(pinned)) => Ok(DecidedPull { pinned, is_artifact: false }),
            Ok(None) => refused(Self::NOT_FOUND),
            Err(EngineError::Refused(reason)) => refused(&words_of(&reason)),
            Err(error) => Err(error),
        }
    }

    /// Decides about images, and has the engine pull those that it needs.
    async fn decide_images(&self, images: &[String], events: &EventSender) -> Result<(), EngineError> {
        let sources = self.resolve(images.to_vec()).await?;
        let named = images.iter().cloned().zip(sources);
        let deciding = stream::iter(named).map(|(image, source)| self.decide_image(image, source, events));
        deciding.buffer_unordered(Self::PULLS).try_collect().await
    }

    async fn decide_image(
        &self,
        image: String,
        source: Option<Source>,
        events: &EventSender,
    ) -> Result<(), EngineError> {
        let decided = match source {
            Some(Source::Artifact(artifact)) => self.artifact(&image, artifact, events).await,
            Some(Source::Foreign(_)) => self.foreign(&image, events).await,
            Some(Source::Missing(MissingSource { is_elsewhere: true }))
                if !self.rules.allow_from_registry(&image) =>
            {
                Ok(ImageDecision::Refused)
            }
            // What the worker does not understand is not there, either.
            Some(Source::Missing(_)) | None => Ok(missing()),
        };
        let decision = match decided {
            Err(EngineError::Refused(reason)) => ImageDecision::Missing(words_of(&reason)),
            decided => decided?,
        };
        self.decisions().insert(image, decision);
        Ok(())
    }

    /// Decides about the frontend that the Dockerfile names, and returns its name in the engine; `None` for the
    /// engine's own.
    async fn decide_frontend(&self, events: &EventSender) -> Result<Option<String>, EngineError> {
        /// Repository of the frontend that the engine has built in.
        const OFFICIAL: &str = "docker.io/docker/dockerfile";
        let Some(named) = &self.frontend else { return Ok(None) };
        let refused = |rule: &str| Err(EngineError::Refused(format!("{named}: {rule}")));
        let Some(image) = reference::canonical(named) else { return refused("is no reference to an image") };
        if !self.rules.allow_frontend(&image) {
            return match reference::repository(&image) {
                OFFICIAL => Ok(None),
                _ => refused("the operator of the worker allows no such frontend (--allow-frontend)"),
            };
        }
        if !self.allows_frontends {
            return refused("frontends are not run, because of a flaw of the engine");
        }
        match self.decide(&image, events).await? {
            ImageDecision::Usable { name, .. } => Ok(Some(name)),
            ImageDecision::Missing(reason) => refused(&reason),
            ImageDecision::Elsewhere { holder, may_build: true } => {
                Err(EngineError::BaseElsewhere { image: named.clone(), holder })
            }
            ImageDecision::Elsewhere { .. } => refused("only another worker's engine has it"),
            ImageDecision::Refused => refused("comes from no allowed registry (--allow-source)"),
        }
    }

    /// Asks the service what references stand for, and returns its answers in their order.
    async fn resolve(&self, references: Vec<String>) -> Result<Vec<Option<Source>>, EngineError> {
        let mut sources = Vec::with_capacity(references.len());
        for references in references.chunks(Self::MAX_REFERENCES) {
            sources.extend(self.resolve_some(references.to_vec()).await?);
        }
        Ok(sources)
    }

    async fn resolve_some(&self, references: Vec<String>) -> Result<Vec<Option<Source>>, EngineError> {
        let count = references.len();
        let request = ResolveSourcesRequest { attempt: Some(self.attempt.clone()), references };
        let answer = self.service.resolve_sources(request).await.map_err(|error| {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            EngineError::Unreachable(format!(
                "the service does not say what the build may use: {error}{}",
                source.unwrap_or_default()
            ))
        })?;
        let mut sources: Vec<Option<Source>> =
            answer.sources.into_iter().map(|source| source.source).collect();
        sources.resize(count, None);
        Ok(sources)
    }

    /// Decides about an artifact of the catalogue, which this engine has, or else a registry.
    async fn artifact(
        &self,
        image: &str,
        artifact: ArtifactSource,
        events: &EventSender,
    ) -> Result<ImageDecision, EngineError> {
        let name = artifact.name.unwrap_or_default();
        let image_id = name.image_id.clone();
        let name = ArtifactName {
            catalogue: self.catalogue.clone(),
            image_id: name.image_id,
            build_id: name.build_id,
        };
        let name = name.to_string();
        if let Some(held) = self.engine.image(&name).await? {
            return match self.engine.manifest(&held, &name).await? {
                Manifest::OfIndex(_) | Manifest::Unknown if self.names_platform => Err(no_platforms(image)),
                Manifest::Only | Manifest::OfIndex(_) | Manifest::Unknown => {
                    Ok(ImageDecision::Usable { name, id: held.id })
                }
            };
        }
        match reference::canonical(&artifact.registry_reference) {
            Some(pinned) if !artifact.registry_reference.is_empty() => {
                Ok(self.usable(self.hold(image, &pinned, events).await?.base))
            }
            Some(_) | None => Ok(ImageDecision::Elsewhere {
                holder: DistantBase { image_id, worker: artifact.worker },
                may_build: artifact.worker_may_build,
            }),
        }
    }

    /// Decides about an image that is none of the catalogue's.
    ///
    /// One that the engine has must have come from a registry: what was loaded by hand or committed from a
    /// container is somebody's, unless the operator says otherwise.
    ///
    /// # Errors
    ///
    /// Returns an error if a registry refuses, or if that cannot be decided now.
    async fn foreign(&self, image: &str, events: &EventSender) -> Result<ImageDecision, EngineError> {
        if reference::is_ours(image) {
            return Ok(missing());
        }
        let held = self.engine.image(image).await?;
        if let Some(held) = held.as_ref().filter(|_| self.rules.allow_local(image)) {
            let base = self.bases.keep(held, &held.id, Origin::Found).await?;
            return Ok(base.map_or_else(missing, |base| self.usable(base)));
        }
        if !self.rules.allow_from_registry(image) {
            return Ok(ImageDecision::Refused);
        }
        let repository = reference::repository(image);
        let pinned = match held.filter(|_| !self.pull_base) {
            Some(held) if held.labels.contains_key(IMAGE_LABEL) => return Ok(missing()),
            Some(held) => {
                let Some(digest) = digest_of(repository, &held) else { return Ok(missing()) };
                let pinned = format!("{repository}@{digest}");
                // Containerd calls every image as if it came from a registry; and what the engine has may have
                // been pulled with credentials that this build may not use.
                if held.is_in_containerd || self.engine.has_credentials(image) {
                    self.pin(&pinned).await?
                } else {
                    (!self.is_hidden(&pinned, digest).await?).then_some(pinned)
                }
            }
            None => self.pin(image).await?,
        };
        let Some(pinned) = pinned else { return Ok(missing()) };
        let held = self.hold(image, &pinned, events).await?;
        Ok(if self.may_have(&pinned, &held).await? { self.usable(held.base) } else { missing() })
    }

    /// Returns the decision to use a base image, which is then kept until the end of the attempt.
    fn usable(&self, base: BaseImage) -> ImageDecision {
        let BaseImage { name, image, in_use } = base;
        self.in_use().push(in_use);
        ImageDecision::Usable { name, id: image.id }
    }

    fn in_use(&self) -> MutexGuard<'_, Vec<SharedLock>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn decisions(&self) -> MutexGuard<'_, BTreeMap<String, ImageDecision>> {
        self.decisions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl SourcePolicy for BuildSources {
    fn images(&self) -> BTreeMap<String, ImageDecision> {
        self.decisions().clone()
    }

    fn hosts(&self) -> Vec<String> {
        self.rules.hosts.iter().map(Pattern::text).map(str::to_owned).collect()
    }

    fn allows_git_directories(&self) -> bool {
        self.allows_git_directories
    }

    async fn prepare(&self, events: &EventSender) -> Result<Option<String>, EngineError> {
        let images = self.references.iter().filter_map(|reference| reference::canonical(reference));
        self.decide_images(&images.collect::<Vec<_>>(), events).await?;
        self.decide_frontend(events).await
    }

    async fn decide(&self, image: &str, events: &EventSender) -> Result<ImageDecision, EngineError> {
        self.decide_images(&[image.to_owned()], events).await?;
        Ok(self.decisions().get(image).cloned().unwrap_or_else(missing))
    }
}

/// Returns the error of a build that may name a platform, on an engine that does not tell platforms apart.
fn no_platforms(image: &str) -> EngineError {
    EngineError::Refused(format!(
        "{image}: with containerd's store, Dockerfiles that name a platform need Docker 28 or later"
    ))
}

fn missing() -> ImageDecision {
    ImageDecision::Missing(BuildSources::NOT_FOUND.to_owned())
}

/// Returns a registry's refusal in the words of this worker.
///
/// An image that does not exist is reported like one that the requester cannot see. The answer of a server
/// that is no registry is not passed on.
fn words_of(reason: &str) -> String {
    const NO_PLATFORM: [&str; 2] = ["no matching manifest for", "no match for platform"];
    if NO_PLATFORM.iter().any(|words| reason.contains(words)) {
        return "has no image for the platform of the engine".to_owned();
    }
    let is_missing = ["manifest unknown", "name unknown", "not found", "no such manifest"];
    if is_missing.iter().any(|words| reason.to_lowercase().contains(words)) {
        return BuildSources::NOT_FOUND.to_owned();
    }
    fault::without_answer(reason)
}

/// Returns the digest by which the engine knows an image in this repository of a registry.
fn digest_of<'a>(repository: &str, held: &'a EngineImage) -> Option<&'a str> {
    let repository = reference::familiar(repository);
    let digests = held.repo_digests.iter().filter_map(|digest| digest.split_once('@'));
    digests.filter(|(name, _)| *name == repository).map(|(_, digest)| digest).next()
}
