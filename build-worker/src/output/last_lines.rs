//! Last lines of a step, for the report of its failure.

use std::collections::VecDeque;

use proto::dispatch::LineStart;

use super::stream::Stream;

/// The last lines that a step printed, put together from their pieces.
#[derive(Debug, Default)]
pub(super) struct LastLines(VecDeque<LastLine>);

#[derive(Debug)]
struct LastLine {
    stderr: bool,
    text: String,
}

impl LastLines {
    const MAX: usize = 20;

    /// Takes in a piece of a line; a piece that would make its line longer than a piece counts as a line.
    pub(super) fn take(&mut self, stderr: bool, start: LineStart, text: &str) {
        let before = self.0.iter_mut().rev().find(|line| line.stderr == stderr);
        match (start, before) {
            (LineStart::Continuation, Some(line)) if line.text.len() + text.len() <= Stream::MAX_PIECE => {
                line.text.push_str(text);
            }
            (LineStart::Replacement, Some(line)) => text.clone_into(&mut line.text),
            (
                LineStart::Unspecified
                | LineStart::NewLine
                | LineStart::Continuation
                | LineStart::Replacement,
                _,
            ) => {
                if self.0.len() == Self::MAX {
                    self.0.pop_front();
                }
                self.0.push_back(LastLine { stderr, text: text.to_owned() });
            }
        }
    }

    pub(super) fn to_vec(&self) -> Vec<String> {
        self.0.iter().map(|line| line.text.clone()).collect()
    }
}
