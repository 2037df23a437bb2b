//! The folded text of an image, compressed if that saves enough memory.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, PoisonError},
};

use crate::search::SearchText;

/// The text by which an image is searched. Large texts are compressed.
#[derive(Clone, Debug)]
pub(super) enum Text {
    Plain(Arc<str>),
    /// LZ4 block, prefixed with the uncompressed length.
    Compressed(Arc<[u8]>),
}

impl Text {
    /// Size above which a text is compressed, in bytes.
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

    /// Returns the bytes of the text, decompressed if necessary.
    pub(super) fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Plain(text) => Cow::Borrowed(text.as_bytes()),
            // This process compressed the text. If it is damaged all the same, no search finds it.
            Self::Compressed(bytes) => {
                Cow::Owned(lz4_flex::decompress_size_prepended(bytes).unwrap_or_default())
            }
        }
    }

    /// Reads one byte of each of the first cache lines, to load them into the CPU's cache.
    pub(super) fn touch(&self) -> u8 {
        const LINES: usize = 8;
        const LINE: usize = 64;
        let bytes = match self {
            Self::Plain(text) => text.as_bytes(),
            Self::Compressed(bytes) => bytes,
        };
        bytes.iter().step_by(LINE).take(LINES).fold(0, |all, byte| all ^ byte)
    }

    /// Returns the memory of the text, in bytes.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Compressed(bytes) => bytes.len(),
        }
    }

    /// Returns the uncompressed length of the text, in bytes.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Compressed(bytes) => {
                lz4_flex::block::uncompressed_size(bytes).map_or(0, |(length, _)| length)
            }
        }
    }
}

/// A cache of the compressed text read last, because many watches read the text of one change.
#[derive(Debug, Default)]
pub(super) struct LastText(Mutex<Option<ReadText>>);

/// A compressed text and its uncompressed bytes.
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
            let text = SearchText::new([value]);
            let kept = Text::new(&text);
            assert_eq!(kept.bytes(), text.as_str().as_bytes());
            assert_eq!(kept.size() < value.len() / 2, is_compressed);
        }
    }
}
