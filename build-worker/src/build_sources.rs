//! Sources of one build: the images that it may use, by the catalogue's word and the operator's rules.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use proto::dispatch::{ArtifactSource, Attempt, ResolveSourcesRequest, source::Source};

use crate::{
    artifact_name::ArtifactName,
    engine::{Engine, EngineError, EngineImage, ImageDecision, SourcePolicy},
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
    /// Set if registries are asked for newer images.
    pub(crate) pull_base: bool,
    /// Decisions by canonical reference.
    pub(crate) decided: Mutex<BTreeMap<String, ImageDecision>>,
}

impl BuildSources {
    /// Reason why an image is missing that the requester cannot see.
    const NOT_FOUND: &str = "not found";
    /// Maximum number of references in one request to the service.
    const ASKED_AT_ONCE: usize = 64;

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
        for images in images.chunks(Self::ASKED_AT_ONCE) {
            self.ask(images).await?;
        }
        Ok(())
    }

    async fn ask(&self, images: &[String]) -> Result<(), EngineError> {
        let request =
            ResolveSourcesRequest { attempt: Some(self.attempt.clone()), references: images.to_vec() };
        let answer = self.service.resolve_sources(request).await.map_err(|error| {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            EngineError::Unreachable(format!(
                "the service does not tell what the build may use: {error}{}",
                source.unwrap_or_default()
            ))
        })?;
        for (image, source) in images.iter().zip(answer.sources) {
            let decision = match source.source {
                Some(Source::Artifact(artifact)) => self.artifact(artifact).await?,
                Some(Source::Foreign(_)) => self.foreign(image).await?,
                // What the worker does not understand is not there, either.
                Some(Source::Missing(_)) | None => ImageDecision::Missing(Self::NOT_FOUND.to_owned()),
            };
            self.decisions().insert(image.clone(), decision);
        }
        Ok(())
    }

    /// Decides about an artifact of the catalogue: its name in this engine, or else its digest in a registry.
    async fn artifact(&self, artifact: ArtifactSource) -> Result<ImageDecision, EngineError> {
        let name = artifact.name.unwrap_or_default();
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
            Some(_) | None => ImageDecision::Elsewhere(artifact.worker),
        })
    }

    /// Decides about an image that is none of the catalogue's.
    ///
    /// One that the engine has must have come from a registry: what was loaded by hand or committed from a container is
    /// somebody's, unless the operator says otherwise.
    async fn foreign(&self, image: &str) -> Result<ImageDecision, EngineError> {
        let name = image.to_owned();
        let held = self.engine.image(image).await?;
        if let Some(held) = held.as_ref().filter(|_| self.rules.allow_local(image)) {
            return Ok(ImageDecision::Usable { name, id: Some(held.id.clone()) });
        }
        if !self.rules.allow_from_registry(image) {
            return Ok(ImageDecision::Refused);
        }
        let repository = reference::repository(image);
        let (asked, usable) = match held.filter(|_| !self.pull_base) {
            Some(held) if held.labels.contains_key(IMAGE_LABEL) || !may_be_of_registry(repository, &held) => {
                return Ok(ImageDecision::Missing(Self::NOT_FOUND.to_owned()));
            }
            Some(held) if !held.is_in_containerd => {
                return Ok(ImageDecision::Usable { name, id: Some(held.id) });
            }
            // Containerd calls every image as if it came from a registry.
            Some(held) => {
                (format!("{repository}@{}", held.id), Some(ImageDecision::Usable { name, id: Some(held.id) }))
            }
            None => (name, None),
        };
        match self.engine.registry_digest(&asked).await {
            // Pinned, so that the engine takes what was decided about.
            Ok(digest) => Ok(usable.unwrap_or_else(|| ImageDecision::Usable {
                name: format!("{repository}@{digest}"),
                id: None,
            })),
            Err(EngineError::Refused(reason)) => Ok(ImageDecision::Missing(reason)),
            Err(error) => Err(error),
        }
    }

    fn decisions(&self) -> MutexGuard<'_, BTreeMap<String, ImageDecision>> {
        self.decided.lock().unwrap_or_else(PoisonError::into_inner)
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

    async fn decide(&self, image: &str) -> Result<Option<ImageDecision>, EngineError> {
        if self.decisions().contains_key(image) {
            return Ok(None);
        }
        self.ask(&[image.to_owned()]).await?;
        Ok(self.decisions().get(image).cloned())
    }
}

/// Reports whether the engine knows an image by a digest of this repository in a registry.
fn may_be_of_registry(repository: &str, held: &EngineImage) -> bool {
    let repository = reference::familiar(repository);
    let is_of_repository =
        |digest: &String| digest.split_once('@').is_some_and(|(name, _)| name == repository);
    held.repo_digests.iter().any(is_of_repository)
}
