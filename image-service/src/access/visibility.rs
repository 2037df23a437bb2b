//! Visibility: the images that a caller can see.

use std::collections::BTreeSet;

use super::{Grantee, Permissions, Standing};

/// The images that a caller can see; every query of the catalogue requires one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Visibility {
    Everything,
    /// The images that any of these grantees has created or was granted.
    Of(BTreeSet<Grantee>),
}

impl Visibility {
    /// Returns the standing of the caller to an image of `creator`, or `None` if it cannot see the image.
    ///
    /// `granted` returns the permissions that a grantee has on the image.
    pub(crate) fn standing(
        &self,
        creator: &str,
        granted: impl Fn(&Grantee) -> Permissions,
    ) -> Option<Standing> {
        let Self::Of(grantees) = self else {
            return Some(Standing::Owner);
        };
        if grantees.contains(&Grantee::Subject(creator.to_owned())) {
            return Some(Standing::Owner);
        }
        Standing::guest(grantees.iter().map(granted))
    }

    /// Returns the grantees whose creations and grants are in sight; `None` if everything is.
    pub(crate) fn grantees(&self) -> Option<&BTreeSet<Grantee>> {
        match self {
            Self::Everything => None,
            Self::Of(grantees) => Some(grantees),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_sees_what_was_not_granted() {
        let bob = Visibility::Of(BTreeSet::from([Grantee::Subject("bob".to_owned())]));
        let nothing = |_: &Grantee| Permissions::default();
        assert_eq!(bob.standing("alice", nothing), None);
        assert_eq!(bob.standing("bob", nothing), Some(Standing::Owner));
        assert_eq!(Visibility::Everything.standing("alice", nothing), Some(Standing::Owner));
        for permissions in [Permissions::new(false, true, false), Permissions::new(false, false, true)] {
            assert_eq!(bob.standing("alice", |_| permissions), Some(Standing::Guest(permissions)));
        }
    }
}
