//! Pulls of images from their registries.

use super::{
    Job,
    outcome::{Artifact, Ended, Stop},
};
use crate::{
    base_images::Origin,
    build_sources::DecidedPull,
    output::{FailedStep, Output},
    reference,
};

impl Job {
    /// Pulls an image that its requester may use, gives it the name of the artifact, and checks that the
    /// engine has it.
    pub(super) async fn pull(&self, reference: &str, output: &mut Output) -> Result<Artifact, Ended> {
        let sources = self.sources();
        let decided = tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped(Stop::Confirmed)),
            decided = sources.decide_pull(reference) => decided,
        };
        let DecidedPull { pinned, is_artifact } = decided.map_err(|error| {
            let step = FailedStep { name: format!("pull {reference}"), ..FailedStep::default() };
            Ended::by_engine(&error, Some(step))
        })?;
        let was_there = self.engine.image(&pinned).await?.is_some();
        let pull = self.engine.pull(reference, &pinned, &self.assignment.creator)?;
        self.relay_progress(pull, output).await?;
        let missing = || Ended::by_broken_engine(format!("{reference} was pulled and is not there"));
        let image = self.engine.image(&pinned).await?.ok_or_else(missing)?;
        let origin = if was_there { Origin::Found } else { Origin::Pulled };
        let held = sources.keep(&pinned, image, origin).await?;
        if !is_artifact && !sources.may_have(&pinned, &held).await? {
            return Err(Ended::by_user(format!("{reference}: not found")));
        }
        let name = self.artifact_name().to_string();
        self.engine.tag(&held.image.id, &name).await?;
        let named = self.engine.image(&name).await?.filter(|named| named.id == held.image.id);
        let named = named.ok_or_else(missing)?;
        Ok(Artifact {
            repo_digest: reference::parts(&pinned).1.to_owned(),
            image_id: named.id,
            config_digest: held.config_digest,
            size_bytes: named.size_bytes,
            replaced: None,
        })
    }
}
