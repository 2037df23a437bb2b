//! The labels of whatever a worker makes.

/// The record that it was made for.
pub(crate) const IMAGE_LABEL: &str = "trailer.image-id";
/// The worker that has made it.
pub(crate) const WORKER_LABEL: &str = "trailer.worker";
/// The reference that it was made to have.
pub(crate) const REFERENCE_LABEL: &str = "trailer.reference";
/// The catalogue that has the record.
pub(crate) const CATALOGUE_LABEL: &str = "trailer.catalogue";
