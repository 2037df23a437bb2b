//! Hints that processes with a shared store send to each other when there is something new to read.

use std::fmt;

use uuid::Uuid;

use crate::build::BuildId;

/// A part of the store with something new to read.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hint {
    /// New entries in the change log.
    Changed,
    /// A build that was queued, or that has left a slot.
    QueueChanged,
    /// New records in the history of a build.
    Recorded(BuildId),
    /// Possibly anything, because the connection was lost for a while.
    Anything,
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed => f.write_str("changed"),
            Self::QueueChanged => f.write_str("queue"),
            Self::Recorded(build) => build.fmt(f),
            Self::Anything => f.write_str("anything"),
        }
    }
}

impl Hint {
    /// Parses a displayed hint. Unknown ones, which a later version may send, become [`Hint::Anything`].
    pub(crate) fn parse(text: &str) -> Self {
        match (text, Uuid::try_parse(text)) {
            ("changed", _) => Self::Changed,
            ("queue", _) => Self::QueueChanged,
            (_, Ok(build)) => Self::Recorded(BuildId(build)),
            (_, Err(_)) => Self::Anything,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hint_reads_back() {
        for hint in [Hint::Changed, Hint::QueueChanged, Hint::Recorded(BuildId::new()), Hint::Anything] {
            assert_eq!(Hint::parse(&hint.to_string()), hint);
        }
    }
}
