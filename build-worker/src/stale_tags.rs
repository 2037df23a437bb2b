//! Cleanup of the tags that a killed worker's attempts have left in the engine.

use crate::{engine::Engine, labels::WORKER_LABEL};

/// Prefix of an attempt's tag, `trailer.invalid/attempt/<build>:<number>`, which lasts until publication.
pub(crate) const ATTEMPTS: &str = "trailer.invalid/attempt/";

/// Removes the tags that attempts of this worker's name have left, each by its exact name.
///
/// Must only be called while no attempt is at work. The engine may be shared: images of other workers are
/// left alone.
pub(crate) async fn remove(engine: &dyn Engine, worker: &str) {
    let left = match engine.labelled(&[(WORKER_LABEL, worker)]).await {
        Ok(images) => images,
        Err(error) => {
            tracing::warn!(%error, "cannot look for stale tags of attempts");
            return;
        }
    };
    let names = left.iter().flat_map(|image| &image.names);
    for tag in names.filter(|tag| tag.starts_with(ATTEMPTS)) {
        match engine.untag(tag).await {
            Ok(()) => tracing::info!(tag, "removed a stale tag of an attempt"),
            Err(error) => tracing::warn!(tag, %error, "cannot remove a stale tag of an attempt"),
        }
    }
}
