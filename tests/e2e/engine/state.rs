//! What the fake engine remembers, for tests to look at.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::images::Images;

/// Everything that the engine has seen and holds.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Every build that was asked for, oldest first.
    pub(crate) builds: Vec<RecordedBuild>,
    /// The image table.
    pub(crate) images: Images,
    /// How many `/session` connections are open.
    pub(crate) sessions: usize,
    /// Requests that the engine does not know, as `METHOD path`.
    pub(crate) unexpected: Vec<String>,
}

impl State {
    /// How many builds have not ended.
    pub(crate) fn running(&self) -> usize {
        self.builds.iter().filter(|build| build.ended == Ended::Running).count()
    }
}

/// One `POST /build`, as it was asked for, and what became of it.
#[derive(Clone)]
pub(crate) struct RecordedBuild {
    /// The `t` parameter.
    pub(crate) tag: Option<String>,
    /// The `session` parameter.
    pub(crate) session: Option<String>,
    /// The `buildid` parameter.
    pub(crate) build_id: Option<String>,
    /// The `labels` parameter.
    pub(crate) labels: BTreeMap<String, String>,
    /// Every query parameter, decoded.
    pub(crate) query: BTreeMap<String, String>,
    /// The text of the Dockerfile in the context.
    pub(crate) dockerfile: String,
    /// Every file of the context by its path.
    pub(crate) files: BTreeMap<String, Bytes>,
    /// How it ended.
    pub(crate) ended: Ended,
    /// Cancelled by `POST /build/cancel`, whether or not the script cares.
    pub(super) cancel: CancellationToken,
}

impl RecordedBuild {
    /// A cancel named this build, even if its script ignores cancels.
    pub(crate) fn cancel_was_asked(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

impl fmt::Debug for RecordedBuild {
    /// Leaves the files' content out, so that a failed wait stays readable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordedBuild")
            .field("query", &self.query)
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
    /// The script failed, in a step or before the stream.
    Failed,
    /// A cancel ended it.
    Cancelled,
    /// The connection was cut in the middle, by the client or by the script.
    Dropped,
}
