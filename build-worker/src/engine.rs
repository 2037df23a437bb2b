//! The parts of a Docker Engine that a worker needs.
//!
//! The real implementation is in `docker`; a simulation has its own.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use proto::dispatch::DistantBase;
use tokio::sync::mpsc;

pub(crate) use self::build_order::{BuildOrder, Dockerfile};
use crate::fault::Fault;
pub(crate) use crate::output::Progress;

mod build_order;

/// A Docker Engine with BuildKit.
#[tonic::async_trait]
pub(crate) trait Engine: fmt::Debug + Send + Sync {
    /// Returns the engine's description of itself, if the engine and its image store respond.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine or its image store is unavailable.
    async fn info(&self) -> Result<EngineInfo, EngineError>;

    /// Starts a build.
    ///
    /// # Errors
    ///
    /// Returns an error if the build cannot be started. Later errors come from [`RunningWork::next`].
    fn build(&self, order: BuildOrder) -> Result<Box<dyn RunningWork>, EngineError>;

    /// Starts a pull of a reference with a digest, which sets no tag. Its progress calls the image `name`.
    ///
    /// Pulls, pushes and lookups use the credentials that builds of the creator's images may use.
    ///
    /// # Errors
    ///
    /// Returns an error if the pull cannot be started. Later errors come from [`RunningWork::next`].
    fn pull(&self, name: &str, pinned: &str, creator: &str) -> Result<Box<dyn RunningWork>, EngineError>;

    /// Starts a push of the image with this name.
    ///
    /// # Errors
    ///
    /// Returns an error if the push cannot be started. Later errors come from [`RunningWork::next`].
    fn push(&self, reference: &str, creator: &str) -> Result<Box<dyn RunningWork>, EngineError>;

    /// Returns the digest that the registry has for a reference.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if the registry denies access or does not have the reference,
    /// [`EngineError::Unreachable`] if the registry cannot be reached or a source of credentials is
    /// unavailable, and [`EngineError::Broken`] if the engine does not work or reports no digest.
    async fn registry_digest(&self, reference: &str, creator: &str) -> Result<String, EngineError>;

    /// Returns the configuration of an image as builds get it, by a name that always stands for the image.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if there is no such image, and [`EngineError::Broken`] if the engine does
    /// not work.
    async fn configuration(&self, name: &str) -> Result<Configuration, EngineError>;

    /// Returns the manifest that an image with this name has for the engine's platform.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if the image has none, and [`EngineError::Broken`] if the engine does not
    /// work.
    async fn manifest(&self, image: &EngineImage, name: &str) -> Result<Manifest, EngineError>;

    /// Reports whether there are credentials for the repository of a reference, whoever may use them.
    fn has_credentials(&self, reference: &str) -> bool;

    /// Adds a name, `repository:tag`, to an image.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if there is no such image or the name is invalid, and
    /// [`EngineError::Broken`] if the engine does not work.
    async fn tag(&self, image: &str, name: &str) -> Result<(), EngineError>;

    /// Removes a name from its image, and the image itself if that was its last name.
    ///
    /// Succeeds if there is no such name.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if the engine keeps the image, for example because a container uses
    /// it, and [`EngineError::Broken`] if the engine does not work.
    async fn untag(&self, name: &str) -> Result<(), EngineError>;

    /// Returns the labels of a container, or `None` if there is no such container.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot inspect the container.
    async fn container_labels(&self, container: &str)
    -> Result<Option<HashMap<String, String>>, EngineError>;

    /// Commits a container to an image with this name and returns the image's ID.
    ///
    /// The image has these labels in addition to the container's. The container is paused meanwhile, and
    /// resumes even if the caller goes away.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Refused`] if there is no such container or the engine refuses to commit it, and
    /// [`EngineError::Broken`] if the engine does not work.
    async fn commit(
        &self,
        container: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<String, EngineError>;

    /// Returns the images that have all of these labels.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot list its images.
    async fn labelled(&self, labels: &[(&str, &str)]) -> Result<Vec<LabelledImage>, EngineError>;

    /// Returns the names, `repository:tag`, whose repositories match a pattern, in which `*` is anything but
    /// a slash.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot list its images.
    async fn names(&self, pattern: &str) -> Result<Vec<String>, EngineError>;

    /// Removes the image with this ID, including its name, and reports whether it is gone.
    ///
    /// An image with names in several repositories, or in use by a container, is kept.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine fails to remove the image for another reason.
    async fn remove(&self, id: &str) -> Result<bool, EngineError>;

    /// Returns the image with this name or ID.
    ///
    /// # Errors
    ///
    /// Returns an error if the engine cannot inspect the image.
    async fn image(&self, name: &str) -> Result<Option<EngineImage>, EngineError>;
}

/// A build, pull or push that the engine runs.
///
/// Dropping it closes its connections. That makes the engine stop, too, but unobserved.
#[tonic::async_trait]
pub(crate) trait RunningWork: fmt::Debug + Send {
    /// Returns the engine's next message, or `None` once the work has ended. Cancel safe.
    ///
    /// # Errors
    ///
    /// Returns the error that the work failed with, after which no more messages come.
    async fn next(&mut self) -> Option<Result<EngineEvent, EngineError>>;

    /// Reports whether its steps are processes on the engine's host.
    fn runs_processes(&self) -> bool;

    /// Makes the engine end the work, which has ended once [`Self::next`] returns `None`.
    fn cancel(&self);
}

/// The decisions about the sources of a build.
#[tonic::async_trait]
pub(crate) trait SourcePolicy: fmt::Debug + Send + Sync {
    /// Returns the decisions so far, by the canonical reference of each image.
    fn images(&self) -> BTreeMap<String, ImageDecision>;

    /// Returns patterns of the hosts that ADD may fetch from.
    fn hosts(&self) -> Vec<String>;

    /// Reports whether ADD may fetch a directory of a Git repository rather than all of it.
    fn allows_git_directories(&self) -> bool;

    /// Decides about the images that the Dockerfile shows before the build, as [`Self::decide`] does, and returns
    /// the name of the frontend to run; `None` for the engine's own.
    ///
    /// # Errors
    ///
    /// Returns an error if the frontend may not be run, or if a decision cannot be made now.
    async fn prepare(&self, events: &EventSender) -> Result<Option<String>, EngineError>;

    /// Decides about an image by its canonical reference, and has the engine pull it if necessary.
    ///
    /// The progress of pulls goes to `events`.
    ///
    /// # Errors
    ///
    /// Returns an error if the decision cannot be made now.
    async fn decide(&self, image: &str, events: &EventSender) -> Result<ImageDecision, EngineError>;
}

/// A decision about an image that a build names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ImageDecision {
    /// The engine has the image by this name, which may be another one than the build names.
    Usable {
        /// Canonical reference.
        name: String,
        /// ID of the image in the engine; engines may append it to the name as a digest.
        id: String,
    },
    /// No such image exists for the requester, for this reason.
    Missing(String),
    /// The operator does not allow the reference.
    Refused,
    /// Only another worker's engine holds the image.
    Elsewhere {
        holder: DistantBase,
        /// Set if the build may be handed back for that worker.
        may_build: bool,
    },
}

impl ImageDecision {
    /// Reports whether a build may use the image, or what replaces it.
    pub(crate) fn is_usable(&self) -> bool {
        match self {
            Self::Usable { .. } => true,
            Self::Missing(_) | Self::Refused | Self::Elsewhere { .. } => false,
        }
    }
}

/// The sender of the events of work that the engine runs.
pub(crate) type EventSender = mpsc::Sender<Result<EngineEvent, EngineError>>;

/// A message of the engine about its work.
#[derive(Debug)]
pub(crate) enum EngineEvent {
    /// Changes of steps, and their output.
    Progress(Vec<Progress>),
    /// The image that was built.
    Built(BuiltImage),
    /// A gap in the progress, with its reason.
    Gap(&'static str),
}

/// An image that a build has produced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BuiltImage {
    /// ID of the image in the engine.
    pub(crate) id: String,
    /// Digest of its configuration, the same on every engine; empty if the engine does not report it.
    pub(crate) config_digest: String,
}

/// An engine's description of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EngineInfo {
    /// ID of the engine, stable for as long as it keeps its data.
    pub(crate) id: String,
    /// Version of the engine, such as `26.1.5+dfsg1`.
    pub(crate) version: String,
    /// Data directory of the engine, on its host.
    pub(crate) root: String,
    /// Set if containerd stores the images, rather than a graph driver below `root`.
    pub(crate) has_containerd_store: bool,
    /// Process of the engine, if it is visible from here.
    pub(crate) pid: Option<i32>,
}

/// An image in the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EngineImage {
    /// ID of the image in the engine.
    pub(crate) id: String,
    /// Digest of its configuration; empty if the engine does not report it.
    pub(crate) config_digest: String,
    /// Size on the engine's disk, in bytes, including layers that it shares with other images.
    pub(crate) size_bytes: i64,
    /// Names in registries, `repository@sha256:…`, known from pulls and pushes.
    pub(crate) repo_digests: Vec<String>,
    /// Set if containerd stores the image; then it has such names even if no registry ever had it.
    pub(crate) is_in_containerd: bool,
    /// Digests of its layers, uncompressed, from the lowest to the highest.
    pub(crate) layers: Vec<String>,
    /// Names of the image, each `repository:tag`.
    pub(crate) names: Vec<String>,
    pub(crate) labels: HashMap<String, String>,
}

/// The manifest that an image has for the platform of its engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Manifest {
    /// The image is for a single platform.
    Only,
    /// The image is an index, which refers to a manifest with this digest.
    OfIndex(String),
    /// The engine does not report it, as Docker before 28 does not for what containerd stores.
    Unknown,
}

/// The configuration of an image, as far as it identifies the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Configuration {
    pub(crate) digest: String,
    /// Digests of the layers, uncompressed, from the lowest to the highest.
    pub(crate) layers: Vec<String>,
}

/// An image that was found by its labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LabelledImage {
    /// ID of the image in the engine.
    pub(crate) id: String,
    /// Names of the image, each `repository:tag`.
    pub(crate) names: Vec<String>,
    pub(crate) labels: HashMap<String, String>,
}

/// A failure of the engine to do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    /// A request that was refused or failed, while the engine works.
    #[error("{0}")]
    Refused(String),
    /// A request that failed because another system could not be reached, while the engine works.
    #[error("{0}")]
    Unreachable(String),
    /// A build that only another worker can run, whose engine alone holds an image.
    #[error("{image}: only the engine of worker {} has it", holder.worker)]
    BaseElsewhere { image: String, holder: DistantBase },
    /// An engine that does not work or cannot be reached.
    #[error("the Docker Engine: {0}")]
    Broken(String),
}

impl EngineError {
    /// Creates the error about an image that was there a moment ago.
    pub(crate) fn removed(image: &str) -> Self {
        Self::Unreachable(format!("{image}: somebody has removed it from the engine"))
    }

    pub(crate) fn new(fault: Fault, message: String) -> Self {
        match fault {
            Fault::User => Self::Refused(message),
            Fault::Remote => Self::Unreachable(message),
            Fault::Engine => Self::Broken(message),
        }
    }
}
