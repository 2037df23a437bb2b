//! One image as the index holds it, and who asks for it.

use std::{borrow::Cow, sync::Arc};

use super::text::Text;
use crate::{
    access::{Action, Grantee, GranteeDigest, Permissions, Sight, Standing},
    error::Error,
    image::{CatalogueEntry, Image},
};

/// The grants of an image, in the order of the digests.
type Grants = Arc<[(GranteeDigest, Permissions)]>;

/// An image as of its last change. It never changes itself: another takes its place.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) image: Image,
    pub(super) creator: GranteeDigest,
    pub(super) grants: Grants,
    pub(super) text: Text,
}

/// An image, and what the caller is to it.
#[derive(Clone, Debug)]
pub(crate) struct VisibleImage {
    pub(crate) entry: Arc<Entry>,
    pub(crate) standing: Standing,
}

/// The callers whose creations and grants count; nobody's when everything is in sight. It is a [`Sight`] by digests, which are
/// compared a million times a second.
#[derive(Clone, Debug)]
pub(crate) struct Viewer(Option<Box<[GranteeDigest]>>);

impl Entry {
    /// Makes the entry of an image that has changed from the one that it takes the place of: what was not read is as it was.
    pub(super) fn new(read: CatalogueEntry, before: Option<&Self>) -> Self {
        let CatalogueEntry { image, grants, text } = read;
        let grants = match (grants, before) {
            (Some(grants), _) => grants.into(),
            (None, Some(before)) => Arc::clone(&before.grants),
            (None, None) => Arc::default(),
        };
        let text = match (text, before) {
            (Some(text), _) => Text::new(&text),
            (None, Some(before)) => before.text.clone(),
            (None, None) => Text::Plain(Arc::default()),
        };
        let creator = GranteeDigest::of_subject(&image.creator);
        Self { image, creator, grants, text }
    }

    /// Returns the folded text that the image can be found by.
    pub(crate) fn text(&self) -> Cow<'_, [u8]> {
        self.text.bytes()
    }

    /// Returns how many bytes the text has.
    pub(super) fn text_len(&self) -> usize {
        self.text.len()
    }

    /// Returns what a grantee was granted.
    pub(crate) fn granted(&self, grantee: &Grantee) -> Permissions {
        self.granted_to(GranteeDigest::of(grantee))
    }

    /// Returns how many grants there are.
    pub(crate) fn grant_count(&self) -> usize {
        self.grants.len()
    }

    fn granted_to(&self, grantee: GranteeDigest) -> Permissions {
        let found = self.grants.binary_search_by_key(&grantee, |(digest, _)| *digest);
        found.map_or_else(|_| Permissions::default(), |at| self.grants[at].1)
    }

    /// Tells whether two hold the same, whatever was made of them.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.image == other.image && self.grants == other.grants && self.text.bytes() == other.text.bytes()
    }

    /// Returns about how many bytes it takes, with its places in the index.
    pub(super) fn size(&self) -> usize {
        self.image.index_bytes(self.text.size()) + Image::GRANT_BYTES as usize * self.grants.len()
    }
}

impl VisibleImage {
    /// Returns what the caller may do now.
    pub(crate) fn actions(&self) -> Vec<Action> {
        self.entry.image.allowed_actions(self.standing)
    }

    /// Fails unless the caller may do this, and it can be done.
    ///
    /// # Errors
    ///
    /// Those of [`Image::require`].
    pub(crate) fn require(&self, action: Action) -> Result<(), Error> {
        self.entry.image.require(self.standing, action)
    }
}

impl Viewer {
    pub(crate) fn new(sight: &Sight) -> Self {
        Self(sight.grantees().map(|grantees| grantees.iter().map(GranteeDigest::of).collect()))
    }

    /// Returns what the viewer is to an image, if it sees it.
    pub(crate) fn standing(&self, entry: &Entry) -> Option<Standing> {
        match &self.0 {
            None => Some(Standing::Owner),
            Some(grantees) if grantees.contains(&entry.creator) => Some(Standing::Owner),
            Some(grantees) => Standing::guest(grantees.iter().map(|grantee| entry.granted_to(*grantee))),
        }
    }

    /// Returns the grantees that it is; `None` when everything is in sight.
    pub(crate) fn grantees(&self) -> Option<&[GranteeDigest]> {
        self.0.as_deref()
    }
}
