//! Tail of a log that is over its limit.

use std::collections::{HashSet, VecDeque};

use prost_types::Timestamp;
use proto::dispatch::{Line, LineStart};

/// The last lines of a log over its limit, as many as fit, and the number of dropped lines.
#[derive(Debug, Default)]
pub(super) struct Tail {
    lines: VecDeque<(Option<Timestamp>, Line)>,
    bytes: usize,
    /// Number of dropped lines and pieces of lines.
    dropped: i64,
    /// Steps and streams of which something was dropped.
    cut: HashSet<(i32, bool)>,
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
            self.cut.insert((first.step, first.stderr));
        }
    }

    /// Returns the number of dropped lines, and the lines that were kept.
    ///
    /// A piece whose line has lost its beginning becomes a new line, so that it is not appended to an earlier
    /// one.
    pub(super) fn into_lines(self) -> (i64, impl Iterator<Item = (Option<Timestamp>, Line)>) {
        let mut cut = self.cut;
        let lines = self.lines.into_iter().map(move |(at, mut line)| {
            if cut.remove(&(line.step, line.stderr)) {
                line.set_start(LineStart::NewLine);
            }
            (at, line)
        });
        (self.dropped, lines)
    }
}

/// Returns the cost of a line: its bytes, and a fixed overhead.
pub(super) fn cost(line: &Line) -> usize {
    const LINE: usize = 32;
    LINE + line.text.len()
}
