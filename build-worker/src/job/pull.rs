//! Pulls of images from their registries.

use super::{
    Job,
    outcome::{Artifact, Ended, Stop},
};
use crate::{
    engine::Platforms,
    output::{FailedStep, Output},
};

impl Job {
    /// Pulls an image that its requester may use, gives it the name of the artifact, and checks that the
    /// engine has it.
    pub(super) async fn pull(&self, reference: &str, output: &mut Output) -> Result<Artifact, Ended> {
        let sources = self.sources(false, Platforms::Own);
        let pinned = tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped(Stop::Confirmed)),
            pinned = sources.decide_pull(reference) => pinned,
        };
        let pinned = pinned.map_err(|error| {
            let step = FailedStep { name: format!("pull {reference}"), ..FailedStep::default() };
            Ended::by_engine(&error, Some(step))
        })?;
        let pull = self.engine.pull(reference, &pinned, &self.assignment.creator)?;
        let pulled = self.relay_progress(pull, output).await?;
        let missing = || Ended::by_broken_engine(format!("{reference} was pulled and is not there"));
        let pulled = pulled.ok_or_else(missing)?;
        let name = self.artifact_name().to_string();
        self.engine.tag(&pulled.id, &name).await?;
        let image = self.engine.image(&name).await?.filter(|image| image.id == pulled.id);
        let image = image.ok_or_else(missing)?;
        Ok(Artifact {
            repo_digest: pulled.repo_digest.unwrap_or_default(),
            image_id: image.id,
            config_digest: pulled.config_digest,
            size_bytes: image.size_bytes,
            replaced: None,
        })
    }
}
