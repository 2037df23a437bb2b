//! What happened in a build: records numbered from 1 without gaps, for all attempts together.

use serde::{Deserialize, Serialize};

use super::{Build, State};
use crate::timestamp::Timestamp;

/// One numbered thing that happened. Serialised, it is what the store keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) sequence: i64,
    pub(crate) time: Timestamp,
    pub(crate) attempt: i32,
    pub(crate) happening: Happening,
}

/// A piece of a build's history, and the build as it stood then.
#[derive(Debug)]
pub(crate) struct Excerpt {
    pub(crate) build: Build,
    pub(crate) records: Vec<Record>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Happening {
    /// The build came into a state, or something about its state is to be said.
    State { state: State, message: String },
    /// A step of the present attempt changed.
    Step { step: i32, name: String, state: StepState, error: String },
    /// A step, or with -1 the engine, printed a line.
    Line { step: i32, stream: LogStream, text: String },
    /// Lines were left out here; 0 when nobody counted them.
    Gap { lines: i64, message: String },
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepState {
    Pending,
    Started,
    Done,
    Cached,
    Failed,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogStream {
    Stdout,
    Stderr,
}
