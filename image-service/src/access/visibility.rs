//! Visibility: the images that a caller can see.

use std::collections::BTreeSet;

use super::{Grantee, Permissions, Relation, Standing};

/// The images that a caller can see, and whether it may build them; every query of the catalogue requires
/// one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Visibility {
    /// Grantees whose creations and grants are visible; `None` if everything is.
    grantees: Option<BTreeSet<Grantee>>,
    is_builder: bool,
}

impl Visibility {
    /// Returns the visibility of an admin.
    pub(crate) fn everything() -> Self {
        Self { grantees: None, is_builder: true }
    }

    /// Returns the visibility of a caller that sees the images which any of these grantees has created or was
    /// granted.
    pub(crate) fn new(grantees: BTreeSet<Grantee>, is_builder: bool) -> Self {
        Self { grantees: Some(grantees), is_builder }
    }

    /// Returns the standing of the caller to an image of `creator`, or `None` if it cannot see the image.
    ///
    /// `granted` returns the permissions that a grantee has on the image.
    pub(crate) fn standing(
        &self,
        creator: &str,
        granted: impl Fn(&Grantee) -> Permissions,
    ) -> Option<Standing> {
        let relation = match &self.grantees {
            None => Relation::Owner,
            Some(grantees) if grantees.contains(&Grantee::Subject(creator.to_owned())) => Relation::Owner,
            Some(grantees) => Relation::guest(grantees.iter().map(granted))?,
        };
        Some(Standing { relation, is_builder: self.is_builder })
    }

    /// Returns the grantees whose creations and grants are in sight; `None` if everything is.
    pub(crate) fn grantees(&self) -> Option<&BTreeSet<Grantee>> {
        self.grantees.as_ref()
    }

    pub(crate) fn is_builder(&self) -> bool {
        self.is_builder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ungranted_images_are_invisible() {
        let bob = Visibility::new(BTreeSet::from([Grantee::Subject("bob".to_owned())]), true);
        let nothing = |_: &Grantee| Permissions::default();
        let standing = |relation| Some(Standing { relation, is_builder: true });
        assert_eq!(bob.standing("alice", nothing), None);
        assert_eq!(bob.standing("bob", nothing), standing(Relation::Owner));
        assert_eq!(Visibility::everything().standing("alice", nothing), standing(Relation::Owner));
        for permissions in [Permissions::new(false, true, false), Permissions::new(false, false, true)] {
            assert_eq!(bob.standing("alice", |_| permissions), standing(Relation::Guest(permissions)));
        }
    }
}
