//! Who may do what: callers, their roles, and the one table of permissions.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{error::Error, timestamp::Timestamp};

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Principal {
    subject: String,
    roles: Vec<Role>,
    expires_at: Timestamp,
}

/// What a token's bearer may do beyond its own images.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything, with every image.
    Admin,
    /// Create images.
    Builder,
    /// Act for a platform service: snapshots.
    Service,
    /// The dispatch API, and nothing else.
    Worker,
}

/// What can be done with an image, in the order in which callers are told of it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    CreateWorkspace,
    Build,
    CancelBuild,
    Enable,
    Disable,
    Clone,
    Edit,
    Share,
    Delete,
}

/// What may be granted to one subject for one image. Modify and delete imply view.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Permissions {
    view: bool,
    modify: bool,
    delete: bool,
}

/// What a caller is to an image that it can see.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// An admin, or its creator.
    Owner,
    /// Somebody whom the owner has let in.
    Guest(Permissions),
}

/// A subject or group that images can be granted to. The creator of an image is one, too.
///
/// Stored and serialised as a kind and a name, `subject:alice`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) enum Grantee {
    /// The subject of a token.
    Subject(String),
}

/// The images that a caller can see; no query of the catalogue can be begun without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Everything,
    /// The images that any of these has created or was granted.
    Of(BTreeSet<Grantee>),
}

impl Principal {
    pub(crate) fn new(subject: String, roles: Vec<Role>, expires_at: Timestamp) -> Self {
        Self { subject, roles, expires_at }
    }

    pub(crate) fn subject(&self) -> &str {
        &self.subject
    }

    pub(crate) fn expires_at(&self) -> Timestamp {
        self.expires_at
    }

    pub(crate) fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    pub(crate) fn is_admin(&self) -> bool {
        self.has(Role::Admin)
    }

    /// Whether only the dispatch API is open to this caller.
    pub(crate) fn is_worker(&self) -> bool {
        self.has(Role::Worker)
    }

    /// Fails without the role; admins have every role but that of a worker.
    pub(crate) fn require(&self, role: Role) -> Result<(), Error> {
        if self.has(role) || (self.is_admin() && role != Role::Worker) {
            Ok(())
        } else {
            Err(Error::RoleMissing(role))
        }
    }

    pub(crate) fn sight(&self) -> Sight {
        if self.is_admin() {
            Sight::Everything
        } else {
            Sight::Of(BTreeSet::from([Grantee::Subject(self.subject.clone())]))
        }
    }

    /// Returns what the caller is to an image of this creator of which nothing was granted yet.
    pub(crate) fn standing_to_new(&self, creator: &str) -> Standing {
        let nothing = Permissions::default();
        self.sight().standing(creator, |_| nothing).unwrap_or(Standing::Guest(nothing))
    }
}

impl Action {
    pub(crate) const ALL: [Self; 9] = [
        Self::CreateWorkspace,
        Self::Build,
        Self::CancelBuild,
        Self::Enable,
        Self::Disable,
        Self::Clone,
        Self::Edit,
        Self::Share,
        Self::Delete,
    ];
}

impl Permissions {
    pub(crate) fn new(view: bool, modify: bool, delete: bool) -> Self {
        Self { view: view || modify || delete, modify, delete }
    }

    pub(crate) fn can_view(self) -> bool {
        self.view
    }

    pub(crate) fn can_modify(self) -> bool {
        self.modify
    }

    pub(crate) fn can_delete(self) -> bool {
        self.delete
    }

    fn union(self, other: Self) -> Self {
        Self::new(self.view || other.view, self.modify || other.modify, self.delete || other.delete)
    }
}

impl Standing {
    /// How many there are.
    pub(crate) const COUNT: usize = 9;

    /// Returns which of them it is, below [`Self::COUNT`].
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Owner => 0,
            Self::Guest(Permissions { view, modify, delete }) => {
                1 + usize::from(view) + 2 * usize::from(modify) + 4 * usize::from(delete)
            }
        }
    }

    /// Returns the standing of somebody who is none of an image's owners and was granted all of this together; `None` when that
    /// is not even to see it.
    pub(crate) fn guest(granted: impl IntoIterator<Item = Permissions>) -> Option<Self> {
        let all = granted.into_iter().fold(Permissions::default(), Permissions::union);
        all.view.then_some(Self::Guest(all))
    }

    /// The table of permissions.
    pub(crate) fn permits(self, action: Action) -> bool {
        match self {
            Self::Owner => true,
            Self::Guest(permissions) => match action {
                Action::CreateWorkspace | Action::Clone => permissions.view,
                Action::Build | Action::CancelBuild | Action::Enable | Action::Disable | Action::Edit => {
                    permissions.modify
                }
                Action::Delete => permissions.delete,
                Action::Share => false,
            },
        }
    }
}

impl Sight {
    /// Returns what the caller is to an image of this creator; `None` when it cannot see it. `granted` is what a grantee was
    /// granted of it.
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

    /// Returns whose creations and grants are in sight; `None` when everything is.
    pub(crate) fn grantees(&self) -> Option<&BTreeSet<Grantee>> {
        match self {
            Self::Everything => None,
            Self::Of(grantees) => Some(grantees),
        }
    }
}

impl Grantee {
    const SUBJECT: &str = "subject:";
}

impl fmt::Display for Grantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Subject(subject) => write!(f, "{}{subject}", Self::SUBJECT),
        }
    }
}

impl From<Grantee> for String {
    fn from(grantee: Grantee) -> Self {
        grantee.to_string()
    }
}

impl TryFrom<String> for Grantee {
    type Error = String;

    fn try_from(stored: String) -> Result<Self, String> {
        match stored.strip_prefix(Self::SUBJECT) {
            Some(subject) => Ok(Self::Subject(subject.to_owned())),
            None => Err(format!("{stored:?} is no grantee")),
        }
    }
}

/// Identifies a grantee among very many: 128 bits of the SHA-256 of its stored form.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GranteeDigest([u8; 16]);

impl GranteeDigest {
    pub(crate) fn of(grantee: &Grantee) -> Self {
        Self::of_stored(&grantee.to_string())
    }

    /// Returns that of a subject.
    pub(crate) fn of_subject(subject: &str) -> Self {
        Self::of(&Grantee::Subject(subject.to_owned()))
    }

    /// Returns that of the grantee with this stored form.
    pub(crate) fn of_stored(stored: &str) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, stored.as_bytes());
        let mut first = [0; 16];
        first.copy_from_slice(&digest.as_ref()[..16]);
        Self(first)
    }
}

/// Whether this can be a subject: it becomes a creator, the name of a worker, and whom something is granted to.
pub(crate) fn is_subject(text: &str) -> bool {
    const MAX_BYTES: usize = 255;
    !text.trim().is_empty() && text.len() <= MAX_BYTES && !text.chars().any(char::is_control)
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "admin" => Ok(Self::Admin),
            "builder" => Ok(Self::Builder),
            "service" => Ok(Self::Service),
            "worker" => Ok(Self::Worker),
            _ => Err("must be admin, builder, service or worker".to_owned()),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Admin => "admin",
            Self::Builder => "builder",
            Self::Service => "service",
            Self::Worker => "worker",
        })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CreateWorkspace => "create a workspace from",
            Self::Build => "build",
            Self::CancelBuild => "cancel a build of",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Clone => "clone",
            Self::Edit => "edit",
            Self::Share => "read or change the grants of",
            Self::Delete => "delete",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_standing_permits_what_the_contract_says() {
        // One letter an action, in the order of `Action::ALL`: Workspace, Build, Cancel, Enable, Disable, cLone, eDit, Share,
        // delete.
        let row = |standing: Standing| -> String {
            Action::ALL.map(|action| if standing.permits(action) { 'y' } else { 'n' }).iter().collect()
        };
        let guest = |view, modify, delete| Standing::Guest(Permissions::new(view, modify, delete));
        assert_eq!(row(Standing::Owner), "yyyyyyyyy");
        assert_eq!(row(guest(true, false, false)), "ynnnnynnn");
        assert_eq!(row(guest(false, false, true)), "ynnnnynny");
        assert_eq!(row(guest(true, false, true)), "ynnnnynny");
        assert_eq!(row(guest(false, true, false)), "yyyyyyynn");
        assert_eq!(row(guest(true, true, false)), "yyyyyyynn");
        assert_eq!(row(guest(false, true, true)), "yyyyyyyny");
        assert_eq!(row(guest(true, true, true)), "yyyyyyyny");
    }

    #[test]
    fn nobody_sees_what_was_not_granted() {
        let bob = Sight::Of(BTreeSet::from([Grantee::Subject("bob".to_owned())]));
        let nothing = |_: &Grantee| Permissions::default();
        assert_eq!(bob.standing("alice", nothing), None);
        assert_eq!(bob.standing("bob", nothing), Some(Standing::Owner));
        assert_eq!(Sight::Everything.standing("alice", nothing), Some(Standing::Owner));
        for permissions in [Permissions::new(false, true, false), Permissions::new(false, false, true)] {
            assert_eq!(bob.standing("alice", |_| permissions), Some(Standing::Guest(permissions)));
        }
    }

    #[test]
    fn grants_to_several_grantees_of_a_caller_add_up() {
        let granted = [Permissions::new(false, true, false), Permissions::new(false, false, true)];
        assert_eq!(Standing::guest(granted), Some(Standing::Guest(Permissions::new(true, true, true))));
        assert_eq!(Standing::guest([]), None);
    }

    #[test]
    fn a_grantee_reads_back_from_its_stored_form() {
        let alice = Grantee::Subject("alice:bob".to_owned());
        assert_eq!(Grantee::try_from(alice.to_string()), Ok(alice));
        assert!(Grantee::try_from("alice".to_owned()).is_err());
    }
}
