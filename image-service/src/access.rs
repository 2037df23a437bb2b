//! Who may do what: callers, their roles, and the one table of permissions.

use std::{fmt, str::FromStr};

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

/// The images that a caller can see; no query of the catalogue can be begun without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Everything,
    /// What this subject has created or was granted.
    Of(String),
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
        if self.is_admin() { Sight::Everything } else { Sight::Of(self.subject.clone()) }
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
}

impl Standing {
    /// How many there are.
    pub(crate) const COUNT: usize = 9;

    /// Which of them it is, below [`Self::COUNT`].
    pub(crate) fn index(self) -> usize {
        match self {
            Self::Owner => 0,
            Self::Guest(Permissions { view, modify, delete }) => {
                1 + usize::from(view) + 2 * usize::from(modify) + 4 * usize::from(delete)
            }
        }
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
    /// What the caller is to an image of this creator, of which it was granted this much; `None` when it cannot see it.
    pub(crate) fn standing(&self, creator: &str, granted: Permissions) -> Option<Standing> {
        match self {
            Self::Everything => Some(Standing::Owner),
            Self::Of(subject) if subject == creator => Some(Standing::Owner),
            Self::Of(_) => granted.view.then_some(Standing::Guest(granted)),
        }
    }

    /// Whose grants count; nobody's when everything is in sight.
    pub(crate) fn subject(&self) -> Option<&str> {
        match self {
            Self::Everything => None,
            Self::Of(subject) => Some(subject),
        }
    }
}

/// A subject as it is looked up among very many, a million times a second: 128 bits of its SHA-256, in which no two agree.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SubjectDigest([u8; 16]);

impl SubjectDigest {
    pub(crate) fn of(subject: &str) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, subject.as_bytes());
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
        let none = Permissions::default();
        let bob = Sight::Of("bob".to_owned());
        assert_eq!(bob.standing("alice", none), None);
        assert_eq!(bob.standing("bob", none), Some(Standing::Owner));
        assert_eq!(Sight::Everything.standing("alice", none), Some(Standing::Owner));
        for permissions in [Permissions::new(false, true, false), Permissions::new(false, false, true)] {
            assert_eq!(bob.standing("alice", permissions), Some(Standing::Guest(permissions)));
        }
    }
}
