//! Who may do what: callers, their roles, and the one table of permissions.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{error::Error, image::Image, timestamp::Timestamp};

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

/// What can be done with an image.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Build,
    CancelBuild,
    Delete,
}

/// The images that a caller can see; no query of the catalogue can be begun without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Everything,
    CreatedBy(String),
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
        if self.is_admin() { Sight::Everything } else { Sight::CreatedBy(self.subject.clone()) }
    }

    /// Fails unless the caller may do this with an image that it can see.
    pub(crate) fn require_action(&self, action: Action, image: &Image) -> Result<(), Error> {
        if self.is_admin() || image.creator == self.subject { Ok(()) } else { Err(Error::Forbidden(action)) }
    }
}

impl Sight {
    /// Whether an image of this creator is in sight.
    pub(crate) fn includes(&self, creator: &str) -> bool {
        match self {
            Self::Everything => true,
            Self::CreatedBy(subject) => subject == creator,
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
            Self::Build => "build",
            Self::CancelBuild => "cancel a build of",
            Self::Delete => "delete",
        })
    }
}
