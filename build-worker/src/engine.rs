//! What a worker needs of a Docker Engine. `docker` is the real one; a simulation brings its own.

use std::{collections::HashMap, fmt, sync::Arc};

pub(crate) use crate::output::Progress;
use crate::{context::Context, fault::Fault};

/// A Docker Engine with BuildKit.
#[tonic::async_trait]
pub(crate) trait Engine: fmt::Debug + Send + Sync {
    /// Returns the engine's description of itself. It answers, and so does its image store.
    ///
    /// # Errors
    ///
    /// The engine or its image store is away.
    async fn info(&self) -> Result<EngineInfo, EngineError>;

    /// Starts a build.
    fn build(&self, order: BuildOrder) -> Result<Box<dyn RunningWork>, EngineError>;

    /// Starts a pull.
    fn pull(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError>;

    /// Starts a push of what has that name.
    fn push(&self, reference: &str) -> Result<Box<dyn RunningWork>, EngineError>;

    /// The digest that the registry of a reference has for it.
    async fn registry_digest(&self, reference: &str) -> Result<String, EngineError>;

    /// Gives an image another name, `repository:tag`.
    async fn tag(&self, image: &str, name: &str) -> Result<(), EngineError>;

    /// Takes a name from its image; the image goes, too, if that was its last one. Fine when there is no such name.
    async fn untag(&self, name: &str) -> Result<(), EngineError>;

    /// The labels of a container; `None` when there is no such container.
    async fn container_labels(&self, container: &str)
    -> Result<Option<HashMap<String, String>>, EngineError>;

    /// Commits a container into an image of that name, with these labels beside its own, and answers the image's id. The
    /// container is paused meanwhile, and goes on whatever becomes of the caller.
    async fn commit(
        &self,
        container: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<String, EngineError>;

    /// The images that have all of these labels.
    async fn labelled(&self, labels: &[(&str, &str)]) -> Result<Vec<LabelledImage>, EngineError>;

    /// Removes an image of that id, with its name; whether it is gone. What has names in several repositories, or is used by a
    /// container, stays.
    async fn remove(&self, id: &str) -> Result<bool, EngineError>;

    /// Returns the image of that name or id.
    async fn image(&self, name: &str) -> Result<Option<EngineImage>, EngineError>;
}

/// A build, a pull or a push that the engine runs. Dropping it closes its connections, which makes the engine stop, too, but
/// nobody sees it.
#[tonic::async_trait]
pub(crate) trait RunningWork: fmt::Debug + Send {
    /// Returns what the engine says next; `None` when it has ended. May be dropped and called again: nothing is lost.
    async fn next(&mut self) -> Option<Result<Told, EngineError>>;

    /// Returns whether its steps are processes on the engine's host.
    fn runs_processes(&self) -> bool;

    /// Makes the engine end it. It has ended when [`Self::next`] says so.
    fn cancel(&self);
}

/// What the engine shall build.
#[derive(Debug)]
pub(crate) struct BuildOrder {
    /// Unique to the attempt: names the build to the engine.
    pub(crate) name: String,
    /// The tag that the image gets, `repository:tag`.
    pub(crate) tag: String,
    /// The context, the Dockerfile included.
    pub(crate) context: Arc<Context>,
    /// Where the Dockerfile lies in it.
    pub(crate) dockerfile: String,
    /// The names of the Dockerfile's stages in their order, as the engine calls them; empty when they are not known.
    pub(crate) stages: Vec<String>,
    /// The labels of the image.
    pub(crate) labels: HashMap<String, String>,
    /// The values of ARG instructions.
    pub(crate) build_args: HashMap<String, String>,
    /// The stage to build; the last one when empty.
    pub(crate) target: String,
    /// Whether registries are asked for newer base images.
    pub(crate) pull_base: bool,
    /// Whether nothing is taken from the cache.
    pub(crate) no_cache: bool,
    /// Whether the layers are squashed into one.
    pub(crate) squash: bool,
    /// The control group below which the processes of its steps are.
    pub(crate) cgroup_parent: String,
    /// The compression of layers, where the engine's image store compresses them; the engine's choice when empty.
    pub(crate) compression: String,
}

/// What the engine says of its work.
#[derive(Debug)]
pub(crate) enum Told {
    /// Steps and what they print.
    Progress(Vec<Progress>),
    /// The image is built.
    Built(BuiltImage),
    /// Some of the progress could not be had, for this reason.
    Gap(&'static str),
}

/// An image that a build has made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BuiltImage {
    /// The engine's identifier of it.
    pub(crate) id: String,
    /// The digest of its configuration, the same on every engine; empty when the engine does not tell it.
    pub(crate) config_digest: String,
}

/// An engine's description of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EngineInfo {
    /// Identifies the engine, for as long as it keeps its data.
    pub(crate) id: String,
    /// Its version, such as `26.1.5+dfsg1`.
    pub(crate) version: String,
    /// The directory that it keeps its data in, on its host.
    pub(crate) root: String,
    /// Whether containerd stores its images, rather than a graph driver below `root`.
    pub(crate) has_containerd_store: bool,
    /// Its process, when that can be seen from here.
    pub(crate) pid: Option<i32>,
}

/// An image in the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EngineImage {
    /// The engine's identifier of it.
    pub(crate) id: String,
    /// The digest of its configuration; empty when the engine does not tell it.
    pub(crate) config_digest: String,
    /// The bytes that it takes on the engine's disk, layers that it shares with others included.
    pub(crate) size_bytes: i64,
    /// The names that registries have for it, `repository@sha256:…`, as far as it was pulled or pushed.
    pub(crate) repo_digests: Vec<String>,
    /// Its names, each `repository:tag`.
    pub(crate) names: Vec<String>,
    pub(crate) labels: HashMap<String, String>,
}

/// An image that was found by its labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LabelledImage {
    /// The engine's identifier of it.
    pub(crate) id: String,
    /// Its names, each `repository:tag`.
    pub(crate) names: Vec<String>,
    pub(crate) labels: HashMap<String, String>,
}

/// What the engine could not do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    /// The engine works, and refuses or has failed what it was asked for.
    #[error("{0}")]
    Refused(String),
    /// The engine works, and could not reach something that it needed for it.
    #[error("{0}")]
    Unreachable(String),
    /// The engine does not work, or cannot be reached.
    #[error("the Docker Engine: {0}")]
    Broken(String),
}

impl EngineError {
    pub(crate) fn new(fault: Fault, message: String) -> Self {
        match fault {
            Fault::User => Self::Refused(message),
            Fault::Remote => Self::Unreachable(message),
            Fault::Engine => Self::Broken(message),
        }
    }
}
