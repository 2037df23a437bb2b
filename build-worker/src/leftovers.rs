//! What a worker that was killed has left in its engine: the tags that its attempts built under.

use crate::{engine::Engine, labels::WORKER_LABEL};

/// Names what an attempt builds until that is published: `trailer-attempt/<build>:<number>`.
pub(crate) const ATTEMPTS: &str = "trailer-attempt/";

/// Removes the tags that attempts of this worker's name have left, each by its exact name. Only to be called while none is at
/// work. An engine may be shared: what others build is left alone.
pub(crate) async fn remove(engine: &dyn Engine, worker: &str) {
    let left = match engine.labelled(&[(WORKER_LABEL, worker)]).await {
        Ok(images) => images,
        Err(error) => {
            tracing::warn!(%error, "cannot look for what attempts have left in the engine");
            return;
        }
    };
    let names = left.iter().flat_map(|image| &image.names);
    for tag in names.filter(|tag| tag.starts_with(ATTEMPTS)) {
        match engine.untag(tag).await {
            Ok(()) => tracing::info!(tag, "removed what an attempt has left"),
            Err(error) => tracing::warn!(tag, %error, "cannot remove what an attempt has left"),
        }
    }
}
