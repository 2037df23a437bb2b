//! Labels of the images that a worker makes.

/// Label with the ID of the record that the image was made for.
pub(crate) const IMAGE_LABEL: &str = "trailer.image-id";
/// Label with the name of the worker that made the image.
pub(crate) const WORKER_LABEL: &str = "trailer.worker";
/// Label with the reference that the image was made for.
pub(crate) const REFERENCE_LABEL: &str = "trailer.reference";
/// Label with the ID of the catalogue that has the record.
pub(crate) const CATALOGUE_LABEL: &str = "trailer.catalogue";
