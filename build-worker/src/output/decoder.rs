//! Decoding of UTF-8 that arrives in chunks.

use std::str;

/// A decoder that keeps a character which lies across the end of a chunk.
#[derive(Debug, Default)]
pub(super) struct Utf8Decoder {
    /// Beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Decoder {
    /// Decodes a chunk; the text is that of [`String::from_utf8_lossy`], however the bytes are cut into
    /// chunks.
    ///
    /// NUL is replaced, too: not every database can store it.
    pub(super) fn decode(&mut self, bytes: &[u8]) -> String {
        let joined;
        let input = if self.pending.is_empty() {
            bytes
        } else {
            joined = [std::mem::take(&mut self.pending).as_slice(), bytes].concat();
            &joined
        };
        let mut text = String::with_capacity(input.len());
        let mut chunks = input.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && is_beginning(invalid) {
                self.pending = invalid.to_vec();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
    }

    /// Ends the input; returns the replacement of a character that was not completed.
    pub(super) fn finish(&mut self) -> Option<char> {
        let pending = std::mem::take(&mut self.pending);
        (!pending.is_empty()).then_some(char::REPLACEMENT_CHARACTER)
    }
}

/// Reports whether further bytes can complete a character.
fn is_beginning(bytes: &[u8]) -> bool {
    str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
