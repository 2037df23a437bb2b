//! Images as the transport shows them after a change.
//!
//! They are the same for all callers with the same standing, and are built once for all watches.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::{configurations::CachedConfiguration, entry::VisibleImage};
use crate::{access::Standing, image::ImageId};

/// An image as some callers see it after a change.
#[derive(Debug)]
pub(crate) struct ChangeView {
    pub(crate) image: VisibleImage,
    /// The configuration, if it is shown in full.
    pub(crate) configuration: Option<Arc<CachedConfiguration>>,
    encoded: OnceLock<Encoded>,
}

/// The encoded parts of a message.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) image: Bytes,
    /// The revision of the change.
    pub(crate) revision: String,
}

impl ChangeView {
    pub(crate) fn new(image: VisibleImage, configuration: Option<Arc<CachedConfiguration>>) -> Self {
        Self { image, configuration, encoded: OnceLock::new() }
    }

    pub(crate) fn id(&self) -> ImageId {
        self.image.entry.image.id
    }

    /// Returns the encoding by the transport, which is computed on first use.
    pub(crate) fn encoded(&self, encode: impl FnOnce(&Self) -> Encoded) -> &Encoded {
        self.encoded.get_or_init(|| encode(self))
    }
}

/// An image as shown to each standing.
#[derive(Debug, Default)]
pub(crate) struct ByStanding([OnceLock<Arc<ChangeView>>; Standing::COUNT]);

impl ByStanding {
    pub(crate) fn show(&self, image: VisibleImage) -> Arc<ChangeView> {
        let standing = image.standing.index();
        Arc::clone(self.0[standing].get_or_init(|| Arc::new(ChangeView::new(image, None))))
    }
}
