//! The folded text of an image, in as little memory as is worth it.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
};

use crate::search::SearchText;

/// The text that an image can be found by. Large ones are compressed.
#[derive(Clone, Debug)]
pub(super) enum Text {
    Plain(Arc<str>),
    /// With the length of the text before.
    Compressed(Arc<[u8]>),
}

impl Text {
    /// From how many bytes on a text is compressed.
    const LARGE: usize = 16 * 1024;

    pub(super) fn new(text: &SearchText) -> Self {
        let text = text.as_str();
        if text.len() > Self::LARGE {
            let compressed = lz4_flex::compress_prepend_size(text.as_bytes());
            if compressed.len() < text.len() / 4 * 3 {
                return Self::Compressed(compressed.into());
            }
        }
        Self::Plain(text.into())
    }

    /// Returns the bytes of the text.
    pub(super) fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Plain(text) => Cow::Borrowed(text.as_bytes()),
            // It was compressed here, and is found by nothing if it is damaged.
            Self::Compressed(bytes) => {
                Cow::Owned(lz4_flex::decompress_size_prepended(bytes).unwrap_or_default())
            }
        }
    }

    /// Reads a byte of each of the first cache lines, so that they are at hand.
    pub(super) fn touch(&self) -> u8 {
        const LINES: usize = 8;
        const LINE: usize = 64;
        let bytes = match self {
            Self::Plain(text) => text.as_bytes(),
            Self::Compressed(bytes) => bytes,
        };
        bytes.iter().step_by(LINE).take(LINES).fold(0, |all, byte| all ^ byte)
    }

    /// Returns how many bytes of memory it takes.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Compressed(bytes) => bytes.len(),
        }
    }

    /// Returns how many bytes the text has.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Compressed(bytes) => {
                lz4_flex::block::uncompressed_size(bytes).map_or(0, |(length, _)| length)
            }
        }
    }
}

/// The compressed text that was read last: many watches read the text of the same change.
#[derive(Debug, Default)]
pub(super) struct LastText(Mutex<Option<ReadText>>);

/// A compressed text, and its bytes.
type ReadText = (Arc<[u8]>, Arc<[u8]>);

impl LastText {
    /// Calls `read` with the bytes of a text.
    pub(super) fn read<T>(&self, text: &Text, read: impl FnOnce(&[u8]) -> T) -> T {
        let compressed = match text {
            Text::Plain(plain) => return read(plain.as_bytes()),
            Text::Compressed(compressed) => compressed,
        };
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let bytes = match last.filter(|(last, _)| Arc::ptr_eq(last, compressed)) {
            Some((_, bytes)) => bytes,
            None => {
                let bytes: Arc<[u8]> = text.bytes().into();
                let last = Some((Arc::clone(compressed), Arc::clone(&bytes)));
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = last;
                bytes
            }
        };
        read(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_reads_back_whether_it_is_compressed_or_not() {
        let mut random = fastrand::Rng::with_seed(1);
        let noise: String = std::iter::repeat_with(|| random.alphanumeric()).take(40_000).collect();
        for (value, is_compressed) in
            [("short", false), ("long ".repeat(10_000).as_str(), true), (noise.as_str(), false)]
        {
            let text = SearchText::of([value]);
            let kept = Text::new(&text);
            assert_eq!(kept.bytes(), text.as_str().as_bytes());
            assert_eq!(kept.size() < value.len() / 2, is_compressed);
        }
    }
}
