//! The history of a build: records numbered from 1 without gaps, across all attempts.

use serde::{Deserialize, Serialize};

use super::{Build, State};
use crate::timestamp::Timestamp;

/// A numbered entry of a build's history. The store keeps the serialised form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) sequence: i64,
    pub(crate) time: Timestamp,
    pub(crate) attempt: i32,
    pub(crate) event: RecordedEvent,
}

/// A part of a build's history, with the build as of its end.
#[derive(Debug)]
pub(crate) struct Excerpt {
    pub(crate) build: Build,
    pub(crate) records: Vec<Record>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RecordedEvent {
    /// A new state of the build, or a message about its present state.
    State {
        state: State,
        message: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cancel_requested: bool,
    },
    /// A change of a step of the present attempt.
    Step { step: i32, name: String, state: StepState, error: String },
    /// A line, or a piece of one, printed by a step, or by the engine if `step` is -1.
    Line {
        step: i32,
        stream: LogStream,
        text: String,
        #[serde(default, skip_serializing_if = "LineStart::is_new_line")]
        start: LineStart,
    },
    /// Lines that were left out; 0 if their number is unknown.
    Gap { lines: i64, message: String },
}

impl RecordedEvent {
    /// Returns the size of the texts, in bytes, with something for the rest.
    pub(crate) fn text_bytes(&self) -> usize {
        const FIXED: usize = 32;
        FIXED
            + match self {
                Self::State { message, .. } | Self::Gap { message, .. } => message.len(),
                Self::Step { name, error, .. } => name.len() + error.len(),
                Self::Line { text, .. } => text.len(),
            }
    }
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

/// The relation of a line to the line before it, of the same step and stream.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LineStart {
    #[default]
    NewLine,
    /// Text that is appended to the line before.
    Continuation,
    /// Text that replaces the line before, which was followed by a carriage return.
    Replacement,
}

impl LineStart {
    fn is_new_line(&self) -> bool {
        *self == Self::NewLine
    }
}
