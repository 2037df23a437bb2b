//! Giving an image the name that it was built for, in the engine and, where wanted, in its registry.

use super::{Ended, Job, Made, StopReason, failed, infrastructure};
use crate::{
    engine::{EngineError, EngineImage},
    output::Output,
};

impl Job {
    /// Gives the image its name and sees that the engine, and its registry, have it under it. What cannot be pushed leaves the
    /// name with the image that had it before.
    pub(super) async fn publish(
        &self,
        built: &str,
        is_pushed: bool,
        output: &mut Output,
    ) -> Result<Made, Ended> {
        let reference = &self.assignment.reference;
        let (repository, tag) = reference
            .rsplit_once(':')
            .ok_or_else(|| infrastructure(format!("the reference {reference} has no tag")))?;
        let before = self.engine.image(reference).await.map_err(broken)?;
        let named = self.name_image(built).await?;
        if !is_pushed {
            return Ok(named);
        }
        match self.push(repository, output).await {
            Ok(repo_digest) => Ok(Made { repo_digest, ..named }),
            Err(ended) => {
                self.take_back(repository, tag, before).await;
                Err(ended)
            }
        }
    }

    /// Pushes the reference; the digest that both the engine and the registry know it by.
    async fn push(&self, repository: &str, output: &mut Output) -> Result<String, Ended> {
        let reference = &self.assignment.reference;
        let push = self.engine.push(reference).map_err(broken)?;
        self.follow(push, output).await?;
        let refused = |error: EngineError| Ended::Failed(failed(&error, output.failed_step()));
        let digest = tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped { left: None }),
            digest = self.engine.registry_digest(reference) => digest.map_err(refused)?,
        };
        let image = self.engine.image(reference).await.map_err(broken)?;
        let digests = image.map(|image| image.repo_digests).unwrap_or_default();
        if digests.iter().any(|known| known.strip_prefix(repository) == Some(&format!("@{digest}"))) {
            Ok(digest)
        } else {
            Err(infrastructure(format!("{reference} was pushed, and its registry has {digest} instead")))
        }
    }

    /// Gives the name back to the image that had it. A fenced attempt leaves it alone: it may be another's by now.
    async fn take_back(&self, repository: &str, tag: &str, before: Option<EngineImage>) {
        if self.control.reason.get() == Some(&StopReason::Fenced) {
            return;
        }
        let taken_back = match before {
            Some(image) => self.engine.tag(&image.id, repository, tag).await,
            None => self.engine.untag(&format!("{repository}:{tag}")).await,
        };
        if let Err(error) = taken_back {
            tracing::warn!(reference = self.assignment.reference, %error, "cannot give a name back");
        }
    }
}

fn broken(error: EngineError) -> Ended {
    infrastructure(error.to_string())
}
