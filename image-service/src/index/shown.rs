//! Images as the transport shows them after a change: the same for all who stand the same to them, and made once for all watches.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::{configurations::CachedConfiguration, entry::VisibleImage};
use crate::{access::Standing, image::ImageId};

/// An image as some callers see it after a change.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) image: VisibleImage,
    /// The configuration, where it is shown in full.
    pub(crate) configuration: Option<Arc<CachedConfiguration>>,
    encoded: OnceLock<Encoded>,
}

/// The parts of its message, encoded.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) image: Bytes,
    /// The revision of the change.
    pub(crate) revision: String,
}

impl Shown {
    pub(crate) fn new(image: VisibleImage, configuration: Option<Arc<CachedConfiguration>>) -> Self {
        Self { image, configuration, encoded: OnceLock::new() }
    }

    pub(crate) fn id(&self) -> ImageId {
        self.image.entry.image.id
    }

    /// Returns what the transport makes of it, which it does once.
    pub(crate) fn encoded(&self, encode: impl FnOnce(&Self) -> Encoded) -> &Encoded {
        self.encoded.get_or_init(|| encode(self))
    }
}

/// An image as each standing shows it.
#[derive(Debug, Default)]
pub(crate) struct ByStanding([OnceLock<Arc<Shown>>; Standing::COUNT]);

impl ByStanding {
    pub(crate) fn show(&self, image: VisibleImage) -> Arc<Shown> {
        let standing = image.standing.index();
        Arc::clone(self.0[standing].get_or_init(|| Arc::new(Shown::new(image, None))))
    }
}
