//! An image as the index holds it, and the viewer that asks for it.

use std::{borrow::Cow, collections::BTreeSet, sync::Arc};

use super::text::Text;
use crate::{
    access::{Action, Grantee, GranteeDigest, Permissions, Relation, Standing, Visibility},
    error::Error,
    image::{CatalogueEntry, Image},
};

/// The grants of an image, sorted by digest.
type Grants = Arc<[(GranteeDigest, Permissions)]>;

/// An image as of its last change. Entries are immutable: a change replaces the entry.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) image: Image,
    pub(super) creator: GranteeDigest,
    pub(super) grants: Grants,
    pub(super) text: Text,
}

/// An image, and the caller's standing toward it.
#[derive(Clone, Debug)]
pub(crate) struct VisibleImage {
    pub(crate) entry: Arc<Entry>,
    pub(crate) standing: Standing,
}

/// A [`Visibility`] in digests, because grantees are compared a million times per second.
#[derive(Clone, Debug)]
pub(crate) struct Viewer {
    /// Grantees whose creations and grants are visible; `None` if everything is.
    grantees: Option<Box<[GranteeDigest]>>,
    is_builder: bool,
}

impl Entry {
    /// Creates the entry of an image; parts that were not read are taken from its previous entry.
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
        let creator = GranteeDigest::from_subject(&image.creator);
        Self { image, creator, grants, text }
    }

    /// Returns the folded text by which the image is searched.
    pub(crate) fn text(&self) -> Cow<'_, [u8]> {
        self.text.bytes()
    }

    /// Returns the length of the text, in bytes.
    pub(super) fn text_len(&self) -> usize {
        self.text.len()
    }

    /// Returns the permissions that a grantee was granted.
    pub(crate) fn granted(&self, grantee: &Grantee) -> Permissions {
        self.granted_to(GranteeDigest::new(grantee))
    }

    /// Returns the number of grants.
    pub(crate) fn grant_count(&self) -> usize {
        self.grants.len()
    }

    fn granted_to(&self, grantee: GranteeDigest) -> Permissions {
        let found = self.grants.binary_search_by_key(&grantee, |(digest, _)| *digest);
        found.map_or_else(|_| Permissions::default(), |at| self.grants[at].1)
    }

    /// Reports whether two entries hold the same data, in whatever representation.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.image == other.image && self.grants == other.grants && self.text.bytes() == other.text.bytes()
    }

    /// Returns the approximate memory of the entry and its places in the index, in bytes.
    pub(super) fn size(&self) -> usize {
        self.image.index_bytes(self.text.size()) + Image::GRANT_BYTES as usize * self.grants.len()
    }
}

impl VisibleImage {
    /// Returns the actions that the caller may perform now.
    pub(crate) fn actions(&self) -> Vec<Action> {
        self.entry.image.allowed_actions(self.standing)
    }

    /// Checks that the caller may perform the action and that the image's state allows it.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Image::require`].
    pub(crate) fn require(&self, action: Action) -> Result<(), Error> {
        self.entry.image.require(self.standing, action)
    }
}

impl Viewer {
    pub(crate) fn new(visibility: &Visibility) -> Self {
        let digests = |grantees: &BTreeSet<Grantee>| grantees.iter().map(GranteeDigest::new).collect();
        Self { grantees: visibility.grantees().map(digests), is_builder: visibility.is_builder() }
    }

    /// Returns the viewer's standing toward an image; `None` if the image is not visible.
    pub(crate) fn standing(&self, entry: &Entry) -> Option<Standing> {
        let relation = match &self.grantees {
            None => Relation::Owner,
            Some(grantees) if grantees.contains(&entry.creator) => Relation::Owner,
            Some(grantees) => Relation::guest(grantees.iter().map(|grantee| entry.granted_to(*grantee)))?,
        };
        Some(Standing { relation, is_builder: self.is_builder })
    }

    /// Returns the grantees of the viewer; `None` if everything is visible.
    pub(crate) fn grantees(&self) -> Option<&[GranteeDigest]> {
        self.grantees.as_deref()
    }
}
