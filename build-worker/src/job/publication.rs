//! Publication of an image under its reference, in the engine and, if requested, in its registry.

use super::{
    Job,
    outcome::{Artifact, Ended, Stop},
};
use crate::{
    engine::{BuiltImage, EngineError, EngineImage},
    output::Output,
    reference,
};

impl Job {
    /// Names an image, pushes it if requested, and checks that engine and registry have it.
    ///
    /// If the push fails, the reference goes back to the image that had it before.
    pub(super) async fn publish(
        &self,
        built: &BuiltImage,
        is_pushed: bool,
        output: &mut Output,
    ) -> Result<Artifact, Ended> {
        let before = self.engine.image(&self.assignment.reference).await?;
        let named = self.name_image(built, before.as_ref()).await?;
        if !is_pushed {
            return Ok(named);
        }
        match self.push(output).await {
            Ok(repo_digest) => Ok(Artifact { repo_digest, ..named }),
            Err(ended) => {
                self.take_back(before).await;
                Err(ended)
            }
        }
    }

    /// Gives an image its names, and checks that the engine has it under its reference.
    ///
    /// `before` is the image that may have had the name until now.
    pub(super) async fn name_image(
        &self,
        built: &BuiltImage,
        before: Option<&EngineImage>,
    ) -> Result<Artifact, Ended> {
        let reference = &self.assignment.reference;
        // The attempt may have been given up while the engine kept the job waiting.
        if self.control.is_given_up() {
            return Err(Ended::Stopped(Stop::Confirmed));
        }
        self.engine.tag(&built.id, &self.artifact_name().to_string()).await?;
        self.engine.tag(&built.id, reference).await?;
        match self.engine.image(reference).await? {
            Some(image) if image.id == built.id => Ok(Artifact {
                config_digest: self.config_digest(built, &image).await?,
                image_id: image.id,
                size_bytes: image.size_bytes,
                repo_digest: String::new(),
                replaced: before.map(|before| before.id.clone()),
            }),
            Some(image) => Err(Ended::by_broken_engine(format!(
                "{reference} should be {} and is {}",
                built.id, image.id
            ))),
            None => Err(Ended::by_broken_engine(format!("{reference} was tagged and is not there"))),
        }
    }

    /// Returns the digest of an artifact's configuration, by which the catalogue knows it in any registry.
    ///
    /// Docker before 28 does not report it for what was committed to containerd's store.
    async fn config_digest(&self, built: &BuiltImage, image: &EngineImage) -> Result<String, EngineError> {
        let reported = [&built.config_digest, &image.config_digest];
        if let Some(reported) = reported.into_iter().find(|digest| !digest.is_empty()) {
            return Ok(reported.clone());
        }
        Ok(self.engine.configuration(&self.artifact_name().to_string()).await?.digest)
    }

    /// Pushes the reference and returns the digest that both the engine and the registry have for it.
    async fn push(&self, output: &mut Output) -> Result<String, Ended> {
        let (reference, creator) = (&self.assignment.reference, &self.assignment.creator);
        let push = self.engine.push(reference, creator)?;
        self.relay_progress(push, output).await?;
        let refused = |error: EngineError| Ended::by_engine(&error, output.failed_step());
        let digest = tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped(Stop::Confirmed)),
            digest = self.engine.registry_digest(reference, creator) => digest.map_err(refused)?,
        };
        let (repository, _) = reference::parts(reference);
        let image = self.engine.image(reference).await?;
        let digests = image.map(|image| image.repo_digests).unwrap_or_default();
        if digests.iter().any(|known| known.strip_prefix(repository) == Some(&format!("@{digest}"))) {
            Ok(digest)
        } else {
            Err(Ended::by_infrastructure(format!(
                "{reference} was pushed, and its registry has {digest} instead"
            )))
        }
    }

    /// Gives the reference back to the image that had it before, and removes the name of the artifact.
    ///
    /// A fenced attempt leaves both alone, because they may belong to another attempt by now.
    async fn take_back(&self, before: Option<EngineImage>) {
        if self.control.is_fenced() {
            return;
        }
        let reference = &self.assignment.reference;
        let taken_back = match before {
            Some(image) => self.engine.tag(&image.id, reference).await,
            None => self.engine.untag(reference).await,
        };
        if let Err(error) = taken_back {
            tracing::warn!(reference, %error, "cannot restore a reference");
        }
        let artifact = self.artifact_name().to_string();
        if let Err(error) = self.engine.untag(&artifact).await {
            tracing::warn!(artifact, %error, "cannot remove the name of an artifact");
        }
    }
}
