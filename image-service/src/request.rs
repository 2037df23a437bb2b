//! The caller of a write and its options.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{access::Principal, image::ImageId};

/// A write request: its caller and its options.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) caller: Principal,
    /// Idempotency key: a repetition of the request gets the response of the first one.
    pub(crate) id: Option<RequestId>,
    /// Set if the write is to be validated only, and not applied.
    pub(crate) validate_only: bool,
    /// W3C `traceparent` of the call.
    pub(crate) trace: Option<String>,
    pub(crate) created: Created,
}

/// The image that a request creates, once it is chosen. A call may be abandoned before it learns which that was.
#[derive(Clone, Debug, Default)]
pub(crate) struct Created(Arc<Mutex<Option<ImageId>>>);

impl Created {
    pub(crate) fn set(&self, image: ImageId) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
    }

    pub(crate) fn get(&self) -> Option<ImageId> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An idempotency key, with a digest of the request that it was used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestId {
    text: String,
    /// Digest of the call and its content.
    digest: String,
}

#[cfg(test)]
impl Request {
    /// Creates a request without options.
    pub(crate) fn plain(caller: Principal) -> Self {
        Self { caller, id: None, validate_only: false, trace: None, created: Created::default() }
    }
}

impl RequestId {
    const MAX_CHARS: usize = 128;

    /// Parses a request id. `digest` identifies the call and its content.
    ///
    /// # Errors
    ///
    /// Returns the violated rule if the text is too long or has characters other than printable ASCII.
    pub(crate) fn parse(text: String, digest: String) -> Result<Self, String> {
        if text.len() > Self::MAX_CHARS || !text.chars().all(|c| c.is_ascii_graphic()) {
            return Err(format!("must be at most {} characters, each of `!` to `~`", Self::MAX_CHARS));
        }
        Ok(Self { text, digest })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }
}
