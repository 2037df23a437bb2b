//! State of the fake engine, for tests to inspect.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::images::Images;
use super::progress::Progress;

/// Everything that the engine has received and holds.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Every build that was requested, oldest first.
    pub(crate) builds: Vec<RecordedBuild>,
    /// The image table.
    pub(crate) images: Images,
    /// Number of open Session streams.
    pub(crate) sessions: usize,
    /// The `X-Registry-Auth` of every request that concerns a registry, empty where there was none.
    pub(crate) registry_auths: Vec<String>,
    /// Requests that the engine does not know, as `METHOD path` or `Control.Method`.
    pub(crate) unexpected: Vec<String>,
    /// The progress of every Solve call by its ref, for Status calls.
    pub(super) progress: BTreeMap<String, Progress>,
}

impl State {
    /// Returns the number of builds that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.builds.iter().filter(|build| build.ended == Ended::Running).count()
    }
}

/// A Solve call, with its request and its outcome.
#[derive(Clone)]
pub(crate) struct RecordedBuild {
    /// The exporter's attribute `name`.
    pub(crate) tag: Option<String>,
    /// The id of the session.
    pub(crate) session: String,
    /// The ref.
    pub(crate) build_id: String,
    /// The labels of the image.
    ///
    /// They are the frontend's attributes `label:*`, or come from a configuration given to the
    /// exporter.
    pub(crate) labels: BTreeMap<String, String>,
    /// The attributes of the frontend.
    pub(crate) attributes: BTreeMap<String, String>,
    /// The attributes of the exporter.
    pub(crate) exporter: BTreeMap<String, String>,
    /// The text of the Dockerfile in the context.
    pub(crate) dockerfile: String,
    /// Every file of the context by its path.
    pub(crate) files: BTreeMap<String, Bytes>,
    /// The outcome so far.
    pub(crate) ended: Ended,
    /// Cancelled when the client drops the Solve call, even if the script ignores cancels.
    pub(super) cancel: CancellationToken,
}

impl RecordedBuild {
    /// Returns whether the Solve call was dropped while its connection lived.
    ///
    /// This does not depend on whether the script ignores cancels.
    pub(crate) fn cancel_was_asked(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

impl fmt::Debug for RecordedBuild {
    /// Omits the content of files, so that a failed wait stays readable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedBuild")
            .field("build_id", &self.build_id)
            .field("attributes", &self.attributes)
            .field("exporter", &self.exporter)
            .field("dockerfile", &self.dockerfile)
            .field("files", &self.files.keys())
            .field("ended", &self.ended)
            .field("cancel_was_asked", &self.cancel_was_asked())
            .finish_non_exhaustive()
    }
}

/// The outcome of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The build has not ended.
    Running,
    /// The script succeeded, and the image is in the table.
    Succeeded,
    /// The script failed.
    Failed,
    /// The build was cancelled while its connection lived.
    Cancelled,
    /// The connection was cut during the build, by the client or by the script.
    Dropped,
}
