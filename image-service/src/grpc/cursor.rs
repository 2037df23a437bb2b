//! Page tokens and resume revisions: places in an answer, bound to the query and the caller that they were given to.

use ring::digest::{SHA256, digest};
use uuid::Uuid;

use crate::{access::Principal, image::View};

/// What a place is bound to: the history of the database, the query, and the caller with its sight.
#[derive(Clone, Debug)]
pub(super) struct Binding(String);

impl Binding {
    pub(super) fn new(history: Uuid, query: &str, view: View, caller: &Principal) -> Self {
        let bound = format!("{history}/{query}/{view:?}/{:?}", caller.sight());
        let digest = digest(&SHA256, bound.as_bytes());
        Self(digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Gives a place to the caller.
    pub(super) fn seal(&self, place: impl std::fmt::Display) -> String {
        format!("{place}.{}", self.0)
    }

    /// Takes a place back; `None` when it is not one of this query and caller.
    pub(super) fn open<'a>(&self, sealed: &'a str) -> Option<&'a str> {
        let (place, binding) = sealed.rsplit_once('.')?;
        (binding == self.0).then_some(place)
    }
}
