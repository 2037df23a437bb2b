//! Authorisation: callers, their roles, and the table of permissions.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{error::Error, timestamp::Timestamp};

pub(crate) use self::{
    grantee::{Grantee, GranteeDigest},
    groups::Groups,
    pools::Pools,
    subject::is_subject,
    visibility::Visibility,
    worker_claims::WorkerClaims,
};

mod grantee;
mod groups;
mod pools;
mod subject;
mod visibility;
mod worker_claims;

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Principal {
    identity: Identity,
    /// Claims that count if the caller is a worker.
    worker_claims: WorkerClaims,
    expires_at: Timestamp,
}

/// The subject, roles, groups and pools of a caller, without its token. A build keeps the identity of its
/// requester as of when it was queued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) subject: String,
    pub(crate) roles: Vec<Role>,
    pub(crate) groups: Groups,
    pub(crate) pools: Pools,
    /// Set for a caller without a token.
    is_anonymous: bool,
}

/// A role of a token's bearer, which permits more than access to its own images.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Full access to every image.
    Admin,
    /// Permission to create and to build images, and to change what is built.
    Builder,
    /// Permission to act for a platform service, which takes snapshots.
    Service,
    /// Access to the dispatch API, and to nothing else.
    Worker,
}

/// An action on an image, in the order in which actions are listed for callers.
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

/// The permissions that a subject is granted on an image. Modify and delete imply view.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Permissions {
    view: bool,
    modify: bool,
    delete: bool,
}

/// The relation of a caller to an image that it can see, and whether the caller may build at all.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) relation: Relation,
    /// Set if the caller has the role [`Role::Builder`].
    pub(crate) is_builder: bool,
}

/// The relation of a caller to an image that it can see.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// An admin, or the creator of the image.
    Owner,
    /// A caller that was granted permissions by an owner.
    Guest(Permissions),
}

impl Principal {
    pub(crate) fn new(subject: String, roles: Vec<Role>, expires_at: Timestamp) -> Self {
        Self { identity: Identity::new(subject, roles), worker_claims: WorkerClaims::default(), expires_at }
    }

    /// Creates a caller without a token, who is not among everybody.
    pub(crate) fn anonymous(subject: String, roles: Vec<Role>, expires_at: Timestamp) -> Self {
        let identity = Identity { is_anonymous: true, ..Identity::new(subject, roles) };
        Self { identity, ..Self::new(String::new(), Vec::new(), expires_at) }
    }

    pub(crate) fn with_claims(mut self, groups: Groups, pools: Pools, worker_claims: WorkerClaims) -> Self {
        self.identity.groups = groups;
        self.identity.pools = pools;
        self.worker_claims = worker_claims;
        self
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn worker_claims(&self) -> &WorkerClaims {
        &self.worker_claims
    }

    pub(crate) fn subject(&self) -> &str {
        &self.identity.subject
    }

    pub(crate) fn expires_at(&self) -> Timestamp {
        self.expires_at
    }

    pub(crate) fn roles(&self) -> impl Iterator<Item = Role> {
        self.identity.roles.iter().copied()
    }

    pub(crate) fn has(&self, role: Role) -> bool {
        self.identity.roles.contains(&role)
    }

    pub(crate) fn is_admin(&self) -> bool {
        self.has(Role::Admin)
    }

    /// Reports whether the caller may build and change what is built, given the permission on the image.
    pub(crate) fn is_builder(&self) -> bool {
        self.identity.acts_as(Role::Builder)
    }

    /// Reports whether the caller may use the dispatch API only.
    pub(crate) fn is_worker(&self) -> bool {
        self.has(Role::Worker)
    }

    /// Checks that the caller has a role. Admins have every role except that of a worker.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] if the caller does not have the role.
    pub(crate) fn require(&self, role: Role) -> Result<(), Error> {
        if self.identity.acts_as(role) { Ok(()) } else { Err(Error::RoleMissing(role)) }
    }

    pub(crate) fn visibility(&self) -> Visibility {
        self.identity.visibility()
    }

    /// Returns the standing of the caller to an image of `creator` without any grants.
    pub(crate) fn standing_to_new(&self, creator: &str) -> Standing {
        let nothing = Permissions::default();
        let stranger =
            Standing { relation: Relation::Guest(nothing), is_builder: self.identity.acts_as(Role::Builder) };
        self.visibility().standing(creator, |_| nothing).unwrap_or(stranger)
    }
}

impl Identity {
    pub(crate) fn new(subject: String, roles: Vec<Role>) -> Self {
        Self { subject, roles, groups: Groups::default(), pools: Pools::default(), is_anonymous: false }
    }

    fn acts_as(&self, role: Role) -> bool {
        let has = |role| self.roles.contains(&role);
        has(role) || (has(Role::Admin) && role != Role::Worker)
    }

    /// Returns the images that a caller of this identity can see.
    pub(crate) fn visibility(&self) -> Visibility {
        if self.roles.contains(&Role::Admin) {
            Visibility::everything()
        } else {
            let groups = self.groups.names().map(|group| Grantee::Group(group.to_owned()));
            let everybody = (!self.is_anonymous).then_some(Grantee::Everybody);
            let grantees = groups.chain(everybody).chain([Grantee::Subject(self.subject.clone())]).collect();
            Visibility::new(grantees, self.acts_as(Role::Builder))
        }
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
    /// Number of distinct standings.
    pub(crate) const COUNT: usize = 18;

    /// Returns the index of the standing, below [`Self::COUNT`].
    pub(crate) fn index(self) -> usize {
        let relation = match self.relation {
            Relation::Owner => 0,
            Relation::Guest(Permissions { view, modify, delete }) => {
                1 + usize::from(view) + 2 * usize::from(modify) + 4 * usize::from(delete)
            }
        };
        2 * relation + usize::from(self.is_builder)
    }

    /// Checks that an action is permitted.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Forbidden`] if the relation to the image does not permit it, and
    /// [`Error::RoleMissing`] if only the role is missing.
    pub(crate) fn permit(self, action: Action) -> Result<(), Error> {
        if !self.relation.permits(action) {
            return Err(Error::Forbidden(action));
        }
        if action == Action::Build { self.require_builder() } else { Ok(()) }
    }

    /// Reports whether the caller may change the reference of the image.
    ///
    /// Only owners may: references are unique among all images of the creator, so that others would learn which
    /// exist.
    pub(crate) fn may_change_reference(self) -> bool {
        self.is_builder && self.relation == Relation::Owner
    }

    /// Checks that the caller may change what is built.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] if it may not.
    pub(crate) fn require_builder(self) -> Result<(), Error> {
        if self.is_builder { Ok(()) } else { Err(Error::RoleMissing(Role::Builder)) }
    }
}

impl Relation {
    /// Returns the relation of a caller that is not an owner and has these grants, taken together.
    ///
    /// Returns `None` if they do not include permission to view the image.
    pub(crate) fn guest(granted: impl IntoIterator<Item = Permissions>) -> Option<Self> {
        let all = granted.into_iter().fold(Permissions::default(), Permissions::union);
        all.view.then_some(Self::Guest(all))
    }

    /// Reports whether an action is permitted. This is the table of permissions.
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
mod tests;
