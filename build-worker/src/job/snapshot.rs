//! Committing a running container into an image.

use proto::dispatch::{Failed, FailureKind, Snapshot};

use super::{Ended, Job, Made, failed};
use crate::{engine::EngineError, labels::IMAGE_LABEL};

impl Job {
    /// Commits the container, which the engine pauses meanwhile and always lets go on, and names the image. A commit cannot be
    /// ended: whoever wants it stopped waits for it, and the image then gets no name.
    pub(super) async fn snapshot(&self, order: &Snapshot) -> Result<Made, Ended> {
        let Snapshot { container, source_image_id } = order;
        let refused = |error: EngineError| Ended::Failed(failed(&error, None));
        let labels = self.engine.container_labels(container).await.map_err(refused)?;
        let labels = labels.ok_or_else(|| unusable(format!("there is no container {container}")))?;
        if labels.get(IMAGE_LABEL) != Some(source_image_id) {
            let label = IMAGE_LABEL;
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
}

fn unusable(message: String) -> Ended {
    Ended::Failed(Failed { kind: FailureKind::User.into(), message, ..Failed::default() })
}
