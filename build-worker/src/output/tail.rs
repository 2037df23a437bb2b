//! Tail of a log that is over its limit.

use std::collections::VecDeque;

use prost_types::Timestamp;
use proto::dispatch::Line;

/// The last lines of a log over its limit, as many as fit, and the number of dropped lines.
#[derive(Debug, Default)]
pub(super) struct Tail {
    pub(super) lines: VecDeque<(Option<Timestamp>, Line)>,
    bytes: usize,
    pub(super) dropped: i64,
}

impl Tail {
    pub(super) const BYTES: usize = 64 * 1024;

    pub(super) fn push(&mut self, at: Option<Timestamp>, line: Line) {
        self.bytes += cost(&line);
        self.lines.push_back((at, line));
        while self.bytes > Self::BYTES {
            let Some((_, first)) = self.lines.pop_front() else {
                return;
            };
            self.bytes -= cost(&first);
            self.dropped += 1;
        }
    }
}

/// Returns the cost of a line: its bytes, and a fixed overhead.
pub(super) fn cost(line: &Line) -> usize {
    const LINE: usize = 32;
    LINE + line.text.len()
}
