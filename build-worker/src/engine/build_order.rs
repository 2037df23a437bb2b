//! Orders for builds.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

use super::SourcePolicy;
use crate::{context::Context, secrets::BuildSecrets};

/// A build for the engine to run.
#[derive(Debug)]
pub(crate) struct BuildOrder {
    /// Name of the build in the engine, unique to the attempt.
    pub(crate) name: String,
    /// Tag of the resulting image, `repository:tag`.
    pub(crate) tag: String,
    pub(crate) context: Arc<Context>,
    pub(crate) dockerfile: Dockerfile,
    /// Names of the Dockerfile's stages in order, as the engine shows them; empty if unknown.
    pub(crate) stages: Vec<String>,
    /// Labels of the image.
    pub(crate) labels: HashMap<String, String>,
    /// Values of `ARG` instructions.
    pub(crate) build_args: HashMap<String, String>,
    /// Stage to build; the last one if empty.
    pub(crate) target: String,
    /// Set if the cache is not used.
    pub(crate) no_cache: bool,
    /// Set if the layers are squashed into one.
    pub(crate) squash: bool,
    /// Images and hosts that the build may use.
    pub(crate) sources: Arc<dyn SourcePolicy>,
    /// Parent control group of the processes of its steps.
    pub(crate) cgroup_parent: String,
    /// Secrets and SSH agents that steps may mount.
    pub(crate) secrets: Arc<BuildSecrets>,
    /// Compression of layers, if the engine's image store compresses them; the engine's default if empty.
    pub(crate) compression: String,
}

/// The place of a build's Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dockerfile {
    /// A file of the context, with this path.
    InContext(String),
    /// A file beside the context, which may exclude it.
    Beside {
        /// File name, which errors quote.
        name: String,
        content: Bytes,
    },
}

impl Dockerfile {
    /// Returns a Dockerfile beside the context, named as the file at `path`.
    pub(crate) fn beside(path: &str, content: Bytes) -> Self {
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        Self::Beside { name, content }
    }

    /// Reports whether a build whose call broke off for this reason failed because of its Dockerfile.
    ///
    /// An engine cannot send an error that quotes what is not UTF-8; it resets the stream.
    pub(crate) fn breaks_engines(&self, reason: &str) -> bool {
        let is_text = match self {
            Self::InContext(_) => true,
            Self::Beside { content, .. } => std::str::from_utf8(content).is_ok(),
        };
        !is_text && reason.contains("stream error received")
    }
}
