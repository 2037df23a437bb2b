//! Lines of one output stream of a step, which end, grow, or are replaced.

use std::time::{Duration, Instant};

use prost_types::Timestamp;
use proto::dispatch::LineStart;

use super::decoder::Utf8Decoder;

/// A line, or a piece of one, to report.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) start: LineStart,
    pub(super) text: String,
    /// Time of its last bytes, by the engine's clock.
    pub(super) at: Option<Timestamp>,
}

/// An output stream with the current line, of which a part may have been reported.
#[derive(Debug)]
pub(super) struct Stream {
    decoder: Utf8Decoder,
    /// Text of the current line that has not been reported.
    text: String,
    /// Relation of `text` to what has been reported of the line.
    start: LineStart,
    /// Set after a carriage return: text that follows replaces the line, unless the line ends first.
    has_returned: bool,
    at: Option<Timestamp>,
    /// Time at which `text` is reported even if the line has no end; `None` if `text` is empty.
    due: Option<Instant>,
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            decoder: Utf8Decoder::default(),
            text: String::new(),
            start: LineStart::NewLine,
            has_returned: false,
            at: None,
            due: None,
        }
    }
}

impl Stream {
    /// Maximum length of a piece, in bytes; the service truncates longer ones.
    pub(super) const MAX_PIECE: usize = 16 * 1024;
    /// Time after which text without a line end is reported, which also limits the rate of such reports.
    pub(super) const DELAY: Duration = Duration::from_millis(500);

    /// Takes in output, and appends the pieces to report at once to `pieces`.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        at: Option<Timestamp>,
        now: Instant,
        pieces: &mut Vec<Piece>,
    ) {
        self.at = at;
        self.take_bytes(bytes, pieces);
        self.due = if self.text.is_empty() { None } else { self.due.or(Some(now + Self::DELAY)) };
    }

    fn take_bytes(&mut self, bytes: &[u8], pieces: &mut Vec<Piece>) {
        let text = self.decoder.decode(bytes);
        for part in text.split_inclusive(['\n', '\r']) {
            let content = part.trim_end_matches(['\n', '\r']);
            self.append(content, pieces);
            match &part[content.len()..] {
                "\n" => self.end_line(pieces),
                "\r" => self.has_returned = self.start != LineStart::NewLine || !self.text.is_empty(),
                _ => {}
            }
        }
    }

    /// Returns the time at which [`Self::report`] has something to report.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Returns the unreported text of the current line, which may continue.
    pub(super) fn report(&mut self) -> Option<Piece> {
        self.due = None;
        (!self.text.is_empty()).then(|| self.piece())
    }

    /// Takes in the last bytes, and ends the current line, if there is one.
    pub(super) fn finish(&mut self, bytes: &[u8], pieces: &mut Vec<Piece>) {
        self.take_bytes(bytes, pieces);
        if let Some(replacement) = self.decoder.finish() {
            self.append(replacement.encode_utf8(&mut [0; 4]), pieces);
        }
        if !self.text.is_empty() || self.start != LineStart::NewLine {
            self.end_line(pieces);
        }
    }

    /// Appends text without line ends and carriage returns to the line.
    fn append(&mut self, content: &str, pieces: &mut Vec<Piece>) {
        if content.is_empty() {
            return;
        }
        if std::mem::take(&mut self.has_returned) {
            self.text.clear();
            if self.start != LineStart::NewLine {
                self.start = LineStart::Replacement;
            }
        }
        let mut rest = content;
        while self.text.len() + rest.len() > Self::MAX_PIECE {
            let end = rest.floor_char_boundary(Self::MAX_PIECE - self.text.len());
            self.text.push_str(&rest[..end]);
            rest = &rest[end..];
            pieces.push(self.piece());
        }
        self.text.push_str(rest);
    }

    fn end_line(&mut self, pieces: &mut Vec<Piece>) {
        if self.start == LineStart::NewLine || !self.text.is_empty() {
            pieces.push(self.piece());
        }
        self.start = LineStart::NewLine;
        self.has_returned = false;
        self.due = None;
    }

    /// Takes the unreported text out; what follows continues it.
    fn piece(&mut self) -> Piece {
        let start = std::mem::replace(&mut self.start, LineStart::Continuation);
        Piece { start, text: std::mem::take(&mut self.text), at: self.at }
    }
}
