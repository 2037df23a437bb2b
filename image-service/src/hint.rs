//! Hints that somebody may want to read on, as processes that share a store send them to each other.

use std::fmt;

use uuid::Uuid;

use crate::build::BuildId;

/// A part of the store that somebody may want to read on.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hint {
    /// The change log has grown.
    Changed,
    /// A build is in the queue, or has left a slot.
    QueueMoved,
    /// The history of a build has grown.
    Recorded(BuildId),
    /// Anything may have happened: the connection was lost for a while.
    Anything,
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed => f.write_str("changed"),
            Self::QueueMoved => f.write_str("queue"),
            Self::Recorded(build) => build.fmt(f),
            Self::Anything => f.write_str("anything"),
        }
    }
}

impl Hint {
    /// Reads back what a hint is displayed as. What a later version may send is [`Hint::Anything`].
    pub(crate) fn parse(text: &str) -> Self {
        match (text, Uuid::try_parse(text)) {
            ("changed", _) => Self::Changed,
            ("queue", _) => Self::QueueMoved,
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
        for hint in [Hint::Changed, Hint::QueueMoved, Hint::Recorded(BuildId::new()), Hint::Anything] {
            assert_eq!(Hint::parse(&hint.to_string()), hint);
        }
    }
}
