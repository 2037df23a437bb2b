//! How a caller wants something written.

use crate::access::Principal;

/// A write: who asks, and how.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) caller: Principal,
    /// Makes a repetition of the request answer as the first one did.
    pub(crate) id: Option<RequestId>,
    /// Whether only to say what would happen.
    pub(crate) validate_only: bool,
    /// The W3C `traceparent` of the call.
    pub(crate) trace: Option<String>,
}

/// What a caller calls its request, and what the request was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestId {
    text: String,
    /// Tells the call and its content.
    digest: String,
}

impl RequestId {
    const MAX_CHARS: usize = 128;

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
