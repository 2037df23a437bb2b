//! Giving an image the name that it was built for, in the engine and, where wanted, in its registry.

use super::{Ended, Job, Made, broken, failed, infrastructure};
use crate::{
    engine::{EngineError, EngineImage},
    output::Output,
    reference,
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
        if !is_pushed {
            return self.name_image(built).await;
        }
        let before = self.engine.image(reference).await.map_err(broken)?;
        let named = self.name_image(built).await?;
        match self.push(output).await {
            Ok(repo_digest) => Ok(Made { repo_digest, ..named }),
            Err(ended) => {
                self.take_back(before).await;
                Err(ended)
            }
        }
    }

    /// Gives an image its name and sees that the engine has it under it.
    pub(super) async fn name_image(&self, image_id: &str) -> Result<Made, Ended> {
        let reference = &self.assignment.reference;
        // The engine may have kept the job waiting until nobody wants it any more.
        if self.control.is_given_up() {
            return Err(Ended::Stopped { left: None });
        }
        self.engine.tag(image_id, reference).await.map_err(broken)?;
        match self.engine.image(reference).await.map_err(broken)? {
            Some(image) if image.id == image_id => {
                Ok(Made { image_id: image.id, size_bytes: image.size_bytes, repo_digest: String::new() })
            }
            Some(image) => {
                Err(infrastructure(format!("{reference} should be {image_id} and is {}", image.id)))
            }
            None => Err(infrastructure(format!("{reference} was tagged and is not there"))),
        }
    }

    /// Pushes the reference; the digest that both the engine and the registry know it by.
    async fn push(&self, output: &mut Output) -> Result<String, Ended> {
        let reference = &self.assignment.reference;
        let push = self.engine.push(reference).map_err(broken)?;
        self.follow(push, output).await?;
        let refused = |error: EngineError| Ended::Failed(failed(&error, output.failed_step()));
        let digest = tokio::select! {
            biased;
            () = self.control.stop.cancelled() => return Err(Ended::Stopped { left: None }),
            digest = self.engine.registry_digest(reference) => digest.map_err(refused)?,
        };
        let (repository, _) = reference::parts(reference);
        let image = self.engine.image(reference).await.map_err(broken)?;
        let digests = image.map(|image| image.repo_digests).unwrap_or_default();
        if digests.iter().any(|known| known.strip_prefix(repository) == Some(&format!("@{digest}"))) {
            Ok(digest)
        } else {
            Err(infrastructure(format!("{reference} was pushed, and its registry has {digest} instead")))
        }
    }

    /// Gives the name back to the image that had it. A fenced attempt leaves it alone: it may be another's by now.
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
            tracing::warn!(reference, %error, "cannot give a name back");
        }
    }
}
