//! Images as callers see them: the same for all who stand the same to them, and made once for all watches.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::{
    access::Standing,
    image::{Image, ImageId, ImageInView},
};

/// An image as some callers see it after a change.
#[derive(Debug)]
pub(crate) struct Shown {
    image: ImageInView,
    encoded: OnceLock<Encoded>,
}

/// What the transport makes of it.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) image: Bytes,
    /// The revision of the change.
    pub(crate) revision: String,
}

impl Shown {
    pub(super) fn new(image: ImageInView) -> Self {
        Self { image, encoded: OnceLock::new() }
    }

    pub(super) fn id(&self) -> ImageId {
        self.image.image.id
    }

    /// What the transport makes of it, which it does once.
    pub(crate) fn encoded(&self, encode: impl FnOnce(&ImageInView) -> Encoded) -> &Encoded {
        self.encoded.get_or_init(|| encode(&self.image))
    }
}

/// An image as each standing shows it.
#[derive(Debug, Default)]
pub(super) struct ByStanding([OnceLock<Arc<Shown>>; Standing::COUNT]);

impl ByStanding {
    pub(super) fn show(&self, image: &Image, standing: Standing) -> Arc<Shown> {
        let show = || {
            let (image, actions) = (image.clone(), image.allowed_actions(standing));
            Arc::new(Shown::new(ImageInView { image, actions, configuration: None }))
        };
        Arc::clone(self.0[standing.index()].get_or_init(show))
    }
}
