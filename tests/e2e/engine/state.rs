//! What the fake engine remembers, for tests to look at.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::images::Images;
use super::progress::Progress;

/// Everything that the engine has seen and holds.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Every build that was asked for, oldest first.
    pub(crate) builds: Vec<RecordedBuild>,
    /// The image table.
    pub(crate) images: Images,
    /// The number of open Session streams.
    pub(crate) sessions: usize,
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

/// One Solve call, as it was asked for, and what became of it.
#[derive(Clone)]
pub(crate) struct RecordedBuild {
    /// The exporter's attribute `name`.
    pub(crate) tag: Option<String>,
    /// The id of the session.
    pub(crate) session: String,
    /// The ref.
    pub(crate) build_id: String,
    /// The labels of the image: the frontend's attributes `label:*`, or those of a configuration
    /// that the exporter was given.
    pub(crate) labels: BTreeMap<String, String>,
    /// The attributes of the frontend.
    pub(crate) attributes: BTreeMap<String, String>,
    /// The attributes of the exporter.
    pub(crate) exporter: BTreeMap<String, String>,
    /// The text of the Dockerfile in the context.
    pub(crate) dockerfile: String,
    /// Every file of the context by its path.
    pub(crate) files: BTreeMap<String, Bytes>,
    /// How it ended.
    pub(crate) ended: Ended,
    /// Cancelled when the Solve call is given up, whether or not the script cares.
    pub(super) cancel: CancellationToken,
}

impl RecordedBuild {
    /// Returns whether the Solve call was given up while its connection lived, even if the script
    /// ignores cancels.
    pub(crate) fn cancel_was_asked(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

impl fmt::Debug for RecordedBuild {
    /// Leaves the files' content out, so that a failed wait stays readable.
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

/// How a build ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It has not.
    Running,
    /// The script succeeded, and the image is in the table.
    Succeeded,
    /// The script failed.
    Failed,
    /// A cancel ended it while its connection lived.
    Cancelled,
    /// The connection was cut in the middle, by the client or by the script.
    Dropped,
}
