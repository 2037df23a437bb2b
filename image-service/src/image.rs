//! The image record: what the catalogue owns.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    access::{Action, GranteeDigest, Permissions},
    build::{Build, BuildId, Job, Kind, State},
    search::SearchText,
    timestamp::Timestamp,
};

pub(crate) use self::{
    actions::BatchAction,
    configuration::{
        Capability, Configuration, ConfigurationDraft, Dockerfile, File, Generate, Pull, Requirements,
        Service, Source,
    },
    creation::{Creation, NewImage, SnapshotOrder, WantedReference},
    draft::ImageDraft,
    edit::EditDraft,
    generating::Written,
    query::{Direction, Key, KeyValue, Order, Place, Query},
    quotas::{Quotas, Usage, UsageChange},
    reference::{PulledReference, Reference, RepositoryPrefixes},
};

mod actions;
mod cloning;
mod configuration;
mod creation;
mod draft;
mod edit;
mod generating;
mod query;
mod quotas;
mod reference;

/// Identifies an image: a UUID of version 7, made by the service.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct ImageId(pub(crate) Uuid);

/// What an engine holds for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldImage {
    pub(crate) image: ImageId,
    /// The engine's identifier of it.
    pub(crate) engine_id: String,
    pub(crate) names: Vec<String>,
    /// The reference that it was made to have.
    pub(crate) reference: String,
}

impl HeldImage {
    /// What attempts name their images by until they are published.
    const ATTEMPTS: &str = "trailer-attempt/";

    /// Whether it has names, and all are those of a build: its own reference, or that of an attempt.
    pub(crate) fn is_named_by_builds(&self) -> bool {
        let of_build = |name: &String| *name == self.reference || name.starts_with(Self::ATTEMPTS);
        !self.names.is_empty() && self.names.iter().all(of_build)
    }
}

/// A record of the catalogue, without its configuration, which is stored by revision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) id: ImageId,
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) creator: String,
    pub(crate) template: bool,
    pub(crate) snapshot: bool,
    /// None for a template.
    pub(crate) status: Option<Status>,
    pub(crate) status_message: String,
    pub(crate) reference: Reference,
    /// Whether the reference was set by a client, rather than derived from the name.
    pub(crate) reference_given: bool,
    pub(crate) enabled: bool,
    pub(crate) pulled: bool,
    pub(crate) configuration_revision: i64,
    /// Boxed: many have none, and a million images are in memory.
    pub(crate) artifact: Option<Box<Artifact>>,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) revision: i64,
    pub(crate) etag: Etag,
    /// None for a template.
    pub(crate) latest_build: Option<BuildId>,
}

/// Changes with every change that a client makes to a record: the revision of the last one.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Etag(pub(crate) i64);

/// An image as a caller sees it: what it may do with it, and the configuration where it asked for that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ImageInView {
    pub(crate) image: Image,
    pub(crate) configuration: Option<Configuration>,
    pub(crate) actions: Vec<Action>,
}

/// An image with what decides who finds it: as the index holds it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CatalogueEntry {
    pub(crate) image: Image,
    /// In the order of the digests; `None` when they were not read, because no change was one of them.
    pub(crate) grants: Option<Vec<(GranteeDigest, Permissions)>>,
    /// `None` when it was not read, because no change was one of it.
    pub(crate) text: Option<SearchText>,
}

/// How much of an image to read.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum View {
    Basic,
    Full,
}

/// Where an image stands: a function of its latest build.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// What was written or pulled.
    #[serde(default)]
    pub(crate) reference: Option<Reference>,
    /// Whether it was pulled, so that nothing was written.
    #[serde(default)]
    pub(crate) pulled: bool,
    /// The registry's digest; none for what no registry holds.
    #[serde(default)]
    pub(crate) repo_digest: Option<String>,
    /// The digest of the image's configuration, by which images of different engines compare; none when the engine did not report it.
    #[serde(default)]
    pub(crate) config_digest: Option<String>,
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

impl fmt::Display for Etag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl Image {
    /// Returns about how many bytes it takes in the memory of the index, with a folded text of so many bytes, but for its grants.
    pub(crate) fn index_bytes(&self, text: usize) -> usize {
        /// The record, an artifact, its keys in the columns, its places in the sets, its part of a signature.
        const FIXED: usize = 1_400;
        FIXED + self.name.len() + self.description.len() + self.creator.len() + text
    }

    /// Returns what it takes in the memory of the index with this configuration, but for its grants. Bytes.
    pub(crate) fn index_bytes_with(&self, configuration: &Configuration) -> i64 {
        let text = search_text(&self.name, &self.description, configuration);
        i64::try_from(self.index_bytes(text.as_str().len())).unwrap_or(i64::MAX)
    }

    /// The memory that a grant takes in the index at most: beside the image, and in a set of what its grantee sees. Bytes.
    pub(crate) const GRANT_BYTES: u32 = 120;

    /// Whether the configuration has changed since the artifact was built.
    pub(crate) fn is_stale(&self) -> bool {
        self.artifact
            .as_ref()
            .is_some_and(|artifact| artifact.configuration_revision != self.configuration_revision)
    }

    /// Whether builds of it write its reference.
    pub(crate) fn writes_reference(&self) -> bool {
        !self.template && !self.pulled
    }

    /// Returns its next build, in the queue, with the configuration that it has.
    pub(crate) fn next_build(
        &self,
        number: i64,
        configuration: &Configuration,
        requested_by: String,
        now: Timestamp,
    ) -> Build {
        let requirements = configuration.requirements();
        let cached_on = self.artifact.as_ref().map(|artifact| artifact.worker.clone());
        let job = Job {
            kind: self.build_kind(),
            configuration_revision: self.configuration_revision,
            reference: self.reference.clone(),
            preferred_worker: cached_on.filter(|_| requirements.worker.is_empty()),
            requirements,
            workspace: None,
        };
        Build::queued(self.id, number, requested_by, job, now)
    }

    /// Returns of which kind its next build is.
    pub(crate) fn build_kind(&self) -> Kind {
        if self.pulled { Kind::Pull } else { Kind::Build }
    }
}

impl ImageInView {
    /// Leaves out the long texts: a thousand images have to fit one message.
    pub(crate) fn without_long_texts(mut self) -> Self {
        self.image.description.clear();
        self.image.status_message.clear();
        self
    }
}

/// Everything that an image can be found by.
pub(crate) fn search_text(name: &str, description: &str, configuration: &Configuration) -> SearchText {
    let ports: Vec<String> = configuration.services.iter().flat_map(Service::port_texts).collect();
    let texts = configuration.texts();
    SearchText::of([name, description].into_iter().chain(texts).chain(ports.iter().map(String::as_str)))
}

impl Status {
    /// In the order of their ranks.
    pub(crate) const ALL: [Self; 6] = [
        Self::BuildPending,
        Self::Building,
        Self::BuildFinished,
        Self::BuildCancelled,
        Self::Snapshotting,
        Self::Error,
    ];

    /// Its place among the statuses when images are ordered by them; what has no status comes before all, with 0.
    pub(crate) fn rank(self) -> i64 {
        match self {
            Self::BuildPending => 1,
            Self::Building => 2,
            Self::BuildFinished => 3,
            Self::BuildCancelled => 4,
            Self::Snapshotting => 5,
            Self::Error => 6,
        }
    }

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

    /// What a copy of something of this name is called.
    fn of_copy(name: &str) -> String {
        format!("Copy of {name}").chars().take(Self::MAX_CHARS).collect::<String>().trim_end().to_owned()
    }

    /// Whether a reference derived from another name would be the same.
    fn has_slug_of(&self, other: &str) -> bool {
        reference::slug(&self.0) == reference::slug(other)
    }

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
