//! The image record: what the catalogue owns.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    build::{BuildId, Kind, State},
    timestamp::Timestamp,
};

pub(crate) use self::{
    configuration::{Configuration, ContextFile, DockerfileSource},
    draft::{ImageDraft, SourceDraft},
    reference::{Reference, RepositoryPrefixes},
};

mod configuration;
mod draft;
mod reference;

/// Identifies an image: a UUID of version 7, made by the service.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct ImageId(pub(crate) Uuid);

/// What a caller gives to create an image; every part has been checked.
#[derive(Clone, Debug)]
pub(crate) struct NewImage {
    pub(crate) name: Name,
    pub(crate) description: Description,
    pub(crate) reference: WantedReference,
    pub(crate) configuration: Configuration,
}

/// The reference that a new image shall write.
#[derive(Clone, Debug)]
pub(crate) enum WantedReference {
    /// This one, or none.
    Given(Reference),
    /// This one, derived from the name, or a variation of it that is free.
    Derived(Reference),
}

/// A record of the catalogue, without its configuration, which is stored by revision.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Image {
    pub(crate) id: ImageId,
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) creator: String,
    pub(crate) status: Status,
    pub(crate) status_message: String,
    pub(crate) reference: Reference,
    pub(crate) configuration_revision: i64,
    pub(crate) artifact: Option<Artifact>,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) revision: i64,
    pub(crate) latest_build: BuildId,
}

/// An image with its configuration where the caller asked for it.
#[derive(Clone, Debug)]
pub(crate) struct ImageInView {
    pub(crate) image: Image,
    pub(crate) configuration: Option<Configuration>,
}

/// Where a page of images ends: the sort key of its last one.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageKey {
    pub(crate) updated_at: Timestamp,
    pub(crate) id: ImageId,
}

/// How much of an image to read.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum View {
    Basic,
    Full,
}

/// Where an image stands: a function of its latest build.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    BuildPending,
    Building,
    BuildFinished,
    BuildCancelled,
    Snapshotting,
    Error,
}

/// What the last successful build left in an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Artifact {
    pub(crate) image_id: String,
    pub(crate) size_bytes: i64,
    pub(crate) worker: String,
    pub(crate) finished_at: Timestamp,
    pub(crate) configuration_revision: i64,
    pub(crate) build: BuildId,
}

/// 1 to 120 characters after trimming, no control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name(String);

/// At most 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Description(String);

impl ImageId {
    pub(crate) fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Image {
    pub(crate) fn key(&self) -> ImageKey {
        ImageKey { updated_at: self.updated_at, id: self.id }
    }
}

impl Status {
    /// The status of an image whose latest build is of this kind and in this state.
    pub(crate) fn of(kind: Kind, state: State) -> Self {
        match (kind, state) {
            (Kind::Build | Kind::Pull, State::Queued | State::Claimed) => Self::BuildPending,
            (Kind::Build | Kind::Pull, State::Running | State::Publishing) => Self::Building,
            (Kind::Snapshot, State::Queued | State::Claimed | State::Running | State::Publishing) => {
                Self::Snapshotting
            }
            (_, State::Succeeded) => Self::BuildFinished,
            (Kind::Build | Kind::Pull, State::Cancelled) => Self::BuildCancelled,
            (Kind::Snapshot, State::Cancelled) | (_, State::Failed) => Self::Error,
        }
    }
}

impl Name {
    const MAX_CHARS: usize = 120;

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let name = text.trim();
        match name.chars().count() {
            0 => Err("must not be empty".to_owned()),
            1..=Self::MAX_CHARS if name.chars().any(char::is_control) => {
                Err("must not contain control characters".to_owned())
            }
            1..=Self::MAX_CHARS => Ok(Self(name.to_owned())),
            length => Err(format!("must have at most {} characters, has {length}", Self::MAX_CHARS)),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Description {
    const MAX_BYTES: usize = 4 * 1024;

    pub(crate) fn parse(text: String) -> Result<Self, String> {
        if text.len() > Self::MAX_BYTES {
            return Err(format!("must have at most {} bytes, has {}", Self::MAX_BYTES, text.len()));
        }
        if text.contains('\0') {
            return Err("must not contain NUL".to_owned());
        }
        Ok(Self(text))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_trimmed_and_bounded() {
        assert_eq!(Name::parse("  tools ").as_ref().map(Name::as_str), Ok("tools"));
        assert!(Name::parse(&"ä".repeat(120)).is_ok());
        assert!(Name::parse(&"ä".repeat(121)).is_err());
        assert!(Name::parse(" \n ").is_err());
        assert!(Name::parse("a\u{7}b").is_err());
    }

    #[test]
    fn the_status_follows_from_the_latest_build() {
        use State::{Cancelled, Claimed, Failed, Publishing, Queued, Running, Succeeded};
        let states = [Queued, Claimed, Running, Publishing, Succeeded, Failed, Cancelled];
        let statuses = |kind| states.map(|state| Status::of(kind, state));
        let built = [
            Status::BuildPending,
            Status::BuildPending,
            Status::Building,
            Status::Building,
            Status::BuildFinished,
            Status::Error,
            Status::BuildCancelled,
        ];
        let snapshot = [
            Status::Snapshotting,
            Status::Snapshotting,
            Status::Snapshotting,
            Status::Snapshotting,
            Status::BuildFinished,
            Status::Error,
            Status::Error,
        ];
        assert_eq!(statuses(Kind::Build), built);
        assert_eq!(statuses(Kind::Pull), built);
        assert_eq!(statuses(Kind::Snapshot), snapshot);
    }
}
