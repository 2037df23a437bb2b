//! Sources of one build: the images that it may use, by the catalogue's word and the operator's rules.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto::dispatch::{
    ArtifactSource, Attempt, DistantBase, MissingSource, ResolveSourcesRequest, source::Source,
};

use crate::{
    artifact_name::ArtifactName,
    engine::{Engine, EngineError, EngineImage, ImageDecision, Platforms, SourcePolicy},
    fault,
    labels::IMAGE_LABEL,
    reference,
    service_client::ServiceClient,
    source_rules::{Pattern, SourceRules},
};

/// The sources of an attempt. What was decided stays decided until its end.
#[derive(Debug)]
pub(crate) struct BuildSources {
    pub(crate) attempt: Attempt,
    pub(crate) catalogue: String,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) service: Arc<dyn ServiceClient>,
    pub(crate) rules: Arc<SourceRules>,
    /// Creator of the image that is built.
    pub(crate) creator: String,
    /// Set if registries are asked for newer images.
    pub(crate) pull_base: bool,
    /// Platforms that may be wanted of images.
    pub(crate) platforms: Platforms,
    /// Set if the engine has no known flaw about frontends that a Dockerfile names.
    pub(crate) allows_frontends: bool,
    /// Set if the engine has no known flaw about directories of Git repositories.
    pub(crate) allows_git_directories: bool,
    /// Decisions by canonical reference.
    pub(crate) decisions: Mutex<BTreeMap<String, ImageDecision>>,
}

impl BuildSources {
    /// Reason why an image is missing that the requester cannot see.
    const NOT_FOUND: &str = "not found";
    /// Maximum number of references in one request to the service.
    const MAX_REFERENCES: usize = 64;

    /// Decides about the images that a Dockerfile names; references that are none are left to the engine.
    ///
    /// # Errors
    ///
    /// Returns an error if the service or the engine does not answer.
    pub(crate) async fn decide_all(
        &self,
        references: impl IntoIterator<Item = String>,
    ) -> Result<(), EngineError> {
        let images: Vec<String> =
            references.into_iter().filter_map(|reference| reference::canonical(&reference)).collect();
        self.decide_images(&images).await
    }

    /// Decides about the frontend that a Dockerfile names, and returns its name in the engine; `None` for the
    /// engine's own.
    ///
    /// # Errors
    ///
    /// Returns an error if the frontend may not be run or does not exist, or if that cannot be decided now.
    pub(crate) async fn decide_frontend(&self, named: Option<&str>) -> Result<Option<String>, EngineError> {
        /// Repository of the frontend that the engine has built in.
        const OFFICIAL: &str = "docker.io/docker/dockerfile";
        let Some(named) = named else { return Ok(None) };
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
        self.decide_images(std::slice::from_ref(&image)).await?;
        match self.decisions().get(&image) {
            Some(ImageDecision::Usable { name, .. }) => Ok(Some(name.clone())),
            Some(ImageDecision::Missing(reason)) => refused(reason),
            Some(ImageDecision::Elsewhere { holder, may_build: true }) => {
                Err(EngineError::BaseElsewhere { image: named.to_owned(), holder: holder.clone() })
            }
            Some(ImageDecision::Elsewhere { .. }) => refused("only another worker's engine has it"),
            Some(ImageDecision::Refused) => refused("comes from no allowed registry (--allow-source)"),
            None => refused(Self::NOT_FOUND),
        }
    }

    /// Decides about a pull, and returns the reference with the digest to pull.
    ///
    /// # Errors
    ///
    /// Returns an error if the image may not be pulled or does not exist, or if that cannot be decided now.
    pub(crate) async fn decide_pull(&self, named: &str) -> Result<String, EngineError> {
        let refused = |rule: &str| Err(EngineError::Refused(format!("{named}: {rule}")));
        let Some(image) = reference::canonical(named) else { return refused("is no reference to an image") };
        match self.resolve(vec![image.clone()]).await?.pop().flatten() {
            Some(Source::Artifact(artifact)) if !artifact.registry_reference.is_empty() => {
                return Ok(artifact.registry_reference);
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
            Ok(Some(pinned)) => Ok(pinned),
            Ok(None) => refused(Self::NOT_FOUND),
            Err(EngineError::Refused(reason)) => refused(&words_of(&reason)),
            Err(error) => Err(error),
        }
    }

    async fn decide_images(&self, images: &[String]) -> Result<(), EngineError> {
        for (image, source) in images.iter().zip(self.resolve(images.to_vec()).await?) {
            let decision = match source {
                Some(Source::Artifact(artifact)) => self.artifact(artifact).await?,
                Some(Source::Foreign(_)) => match self.foreign(image).await {
                    Err(EngineError::Refused(reason)) => ImageDecision::Missing(words_of(&reason)),
                    decision => decision?,
                },
                Some(Source::Missing(MissingSource { is_elsewhere: true }))
                    if !self.rules.allow_from_registry(image) =>
                {
                    ImageDecision::Refused
                }
                // What the worker does not understand is not there, either.
                Some(Source::Missing(_)) | None => ImageDecision::Missing(Self::NOT_FOUND.to_owned()),
            };
            self.decisions().insert(image.clone(), decision);
        }
        Ok(())
    }

    /// Returns a reference with the digest that the registry has for it, so that the engine takes what was decided
    /// about; `None` if that is an image which the requester cannot see.
    ///
    /// # Errors
    ///
    /// Returns an error if the registry refuses or does not have all of the image, or if that cannot be decided
    /// now.
    async fn pin(&self, image: &str) -> Result<Option<String>, EngineError> {
        let digest = self.engine.registry_digest(image, &self.creator).await?;
        let pinned = format!("{}@{digest}", reference::repository(image));
        let configs = self.engine.config_digests(&pinned, self.platforms, &self.creator).await?;
        Ok((!self.is_hidden(&pinned, configs).await?).then_some(pinned))
    }

    /// Reports whether an image of a registry, with these digests of its configurations, is one that the requester
    /// cannot see.
    ///
    /// A registry can answer with any digest, and an index can refer to any image.
    async fn is_hidden(&self, pinned: &str, configs: Vec<String>) -> Result<bool, EngineError> {
        let repository = reference::repository(pinned);
        let configs = configs.into_iter().map(|config| format!("{repository}@{config}"));
        let sources = self.resolve([pinned.to_owned()].into_iter().chain(configs).collect()).await?;
        Ok(sources.iter().any(|source| match source {
            Some(Source::Artifact(_) | Source::Foreign(_)) => false,
            Some(Source::Missing(_)) | None => true,
        }))
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

    /// Decides about an artifact of the catalogue: its name in this engine, or else its digest in a registry.
    async fn artifact(&self, artifact: ArtifactSource) -> Result<ImageDecision, EngineError> {
        let name = artifact.name.unwrap_or_default();
        let image_id = name.image_id.clone();
        let name = ArtifactName {
            catalogue: self.catalogue.clone(),
            image_id: name.image_id,
            build_id: name.build_id,
        };
        let name = name.to_string();
        if let Some(held) = self.engine.image(&name).await? {
            return Ok(ImageDecision::Usable { name, id: Some(held.id) });
        }
        Ok(match reference::canonical(&artifact.registry_reference) {
            Some(name) if !artifact.registry_reference.is_empty() => ImageDecision::Usable { name, id: None },
            Some(_) | None => ImageDecision::Elsewhere {
                holder: DistantBase { image_id, worker: artifact.worker },
                may_build: artifact.worker_may_build,
            },
        })
    }

    /// Decides about an image that is none of the catalogue's.
    ///
    /// One that the engine has must have come from a registry: what was loaded by hand or committed from a
    /// container is somebody's, unless the operator says otherwise.
    ///
    /// # Errors
    ///
    /// Returns an error if a registry refuses, or if that cannot be decided now.
    async fn foreign(&self, image: &str) -> Result<ImageDecision, EngineError> {
        let missing = || ImageDecision::Missing(Self::NOT_FOUND.to_owned());
        let name = image.to_owned();
        let held = self.engine.image(image).await?;
        if let Some(held) = held.as_ref().filter(|_| self.rules.allow_local(image)) {
            return Ok(ImageDecision::Usable { name, id: Some(held.id.clone()) });
        }
        if !self.rules.allow_from_registry(image) {
            return Ok(ImageDecision::Refused);
        }
        let repository = reference::repository(image);
        let (queried, usable) = match held.filter(|_| !self.pull_base) {
            Some(held) if held.labels.contains_key(IMAGE_LABEL) => return Ok(missing()),
            Some(held) => {
                let Some(digest) = digest_of(repository, &held) else { return Ok(missing()) };
                let pinned = format!("{repository}@{digest}");
                let usable = ImageDecision::Usable { name, id: Some(held.id.clone()) };
                if !held.is_in_containerd && !self.engine.has_credentials(image) {
                    let is_hidden = self.is_hidden(&pinned, vec![held.config_digest]).await?;
                    return Ok(if is_hidden { missing() } else { usable });
                }
                // Containerd calls every image as if it came from a registry; and what the engine has may
                // have been pulled with credentials that this build may not use.
                (pinned, Some(usable))
            }
            None => (name, None),
        };
        let Some(name) = self.pin(&queried).await? else { return Ok(missing()) };
        Ok(usable.unwrap_or(ImageDecision::Usable { name, id: None }))
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

    fn creator(&self) -> &str {
        &self.creator
    }

    fn hosts(&self) -> Vec<String> {
        self.rules.hosts.iter().map(Pattern::text).map(str::to_owned).collect()
    }

    fn allows_git_directories(&self) -> bool {
        self.allows_git_directories
    }

    async fn decide(&self, image: &str) -> Result<Option<ImageDecision>, EngineError> {
        if self.decisions().contains_key(image) {
            return Ok(None);
        }
        self.decide_images(&[image.to_owned()]).await?;
        Ok(self.decisions().get(image).cloned())
    }
}

/// Returns a registry's refusal in the words of this worker.
///
/// An image that does not exist is reported like one that the requester cannot see. The answer of a server
/// that is no registry is not passed on.
fn words_of(reason: &str) -> String {
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
