//! Commits of running containers to images.

use proto::dispatch::Snapshot;

use super::{
    Job,
    outcome::{Artifact, Ended, Stop},
};
use crate::{engine::BuiltImage, labels::IMAGE_LABEL};

impl Job {
    /// Commits the container and names the resulting image.
    ///
    /// The engine pauses the container meanwhile, and always resumes it. A commit cannot be aborted: a stop
    /// waits for its end, and the image then gets no name.
    pub(super) async fn snapshot(&self, order: &Snapshot) -> Result<Artifact, Ended> {
        let Snapshot { container, source_image_id } = order;
        let labels = self.engine.container_labels(container).await?;
        let labels = labels.ok_or_else(|| Ended::by_user(format!("there is no container {container}")))?;
        if labels.get(IMAGE_LABEL) != Some(source_image_id) {
            let label = IMAGE_LABEL;
            return Err(Ended::by_user(format!(
                "the container {container} does not carry the label {label}={source_image_id}"
            )));
        }
        let committed = self.engine.commit(container, &self.attempt_tag(), self.labels()).await;
        let image_id = committed?;
        if self.control.stop.is_cancelled() {
            return Err(Ended::Stopped(Stop::Confirmed));
        }
        let before = self.engine.image(&self.assignment.reference).await?;
        let committed = BuiltImage { id: image_id, config_digest: String::new() };
        self.name_image(&committed, before.as_ref()).await
    }
}
