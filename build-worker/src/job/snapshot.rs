//! Committing a running container into an image.

use std::collections::HashMap;

use proto::dispatch::{Failed, FailureKind, Snapshot};

use super::{Ended, Job, Made, failed, infrastructure};
use crate::engine::EngineError;

impl Job {
    /// Commits the container, which the engine pauses meanwhile and always lets go on, and names the image. A commit cannot be
    /// ended: whoever wants it stopped waits for it, and the image then gets no name.
    pub(super) async fn snapshot(&self, order: &Snapshot) -> Result<Made, Ended> {
        let Snapshot { container, source_image_id } = order;
        let refused = |error: EngineError| Ended::Failed(failed(&error, None));
        let labels = self.engine.container_labels(container).await.map_err(refused)?;
        let labels = labels.ok_or_else(|| unusable(format!("there is no container {container}")))?;
        if labels.get(Self::IMAGE_LABEL) != Some(source_image_id) {
            let label = Self::IMAGE_LABEL;
            return Err(unusable(format!(
                "the container {container} does not carry the label {label}={source_image_id}"
            )));
        }
        let committed = self.engine.commit(container, &self.attempt_tag(), self.labels()).await;
        let image_id = committed.map_err(refused)?;
        if self.control.stop.is_cancelled() {
            return Err(Ended::Stopped { left: None });
        }
        self.name_image(&image_id).await
    }

    /// The labels of what is made.
    pub(super) fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (Self::IMAGE_LABEL.to_owned(), self.assignment.image_id.clone()),
            (crate::leftovers::WORKER_LABEL.to_owned(), self.worker.clone()),
        ])
    }

    /// Gives an image its name and sees that the engine has it under it.
    pub(super) async fn name_image(&self, image_id: &str) -> Result<Made, Ended> {
        let reference = &self.assignment.reference;
        let broken = |error: EngineError| infrastructure(error.to_string());
        let (repository, tag) = reference
            .rsplit_once(':')
            .ok_or_else(|| infrastructure(format!("the reference {reference} has no tag")))?;
        self.engine.tag(image_id, repository, tag).await.map_err(broken)?;
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
}

fn unusable(message: String) -> Ended {
    Ended::Failed(Failed { kind: FailureKind::User.into(), message, ..Failed::default() })
}
