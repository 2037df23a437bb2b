//! Trigram signatures, which identify the blocks of slots that can contain a term.
//!
//! A signature has a fixed number of bits regardless of the texts, so that no caller can inflate it. Bits are
//! only added: those of removed texts remain until the block's signature is rebuilt.

use std::sync::Arc;

use super::entry::Entry;

/// Number of slots that share a signature.
pub(super) const BLOCK: u32 = 64;

/// Number of bits in a signature. Trigrams consist of bytes; those with the same hash share a bit.
const BITS: usize = 1 << 16;

/// The signatures of all blocks, 64 of them interleaved: one row of bits per hash.
#[derive(Debug, Default)]
pub(super) struct Signatures {
    chunks: Vec<Box<[u64]>>,
    /// Number of texts removed from each block since its signature was built.
    stale: Vec<u8>,
}

/// The hashes of the trigrams of a text.
#[derive(Clone, Debug, Default)]
pub(super) struct Trigrams(Vec<u16>);

impl Trigrams {
    /// Hashes the trigrams of several texts together.
    pub(super) fn new(texts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        let mut hashes = Vec::new();
        // Beyond this size a bit set is cheaper than a list.
        let mut seen: Option<Box<[u64]>> = None;
        for text in texts {
            for three in text.as_ref().windows(3) {
                let hash = hash(three);
                match &mut seen {
                    Some(seen) => seen[usize::from(hash) / 64] |= 1 << (hash % 64),
                    None => hashes.push(hash),
                }
            }
            if seen.is_none() && hashes.len() > BITS / 8 {
                let mut bits = vec![0; BITS / 64].into_boxed_slice();
                for hash in hashes.drain(..) {
                    bits[usize::from(hash) / 64] |= 1 << (hash % 64);
                }
                seen = Some(bits);
            }
        }
        match seen {
            Some(bits) => Self((0..=u16::MAX).filter(|hash| is_set(&bits, u32::from(*hash))).collect()),
            None => Self(hashes),
        }
    }
}

impl Signatures {
    /// Number of slots in a chunk.
    const CHUNK: usize = 64 * BLOCK as usize;

    pub(super) fn new(chunks: Vec<Box<[u64]>>) -> Self {
        Self { chunks, stale: Vec::new() }
    }

    /// Returns the number of chunks for a number of slots.
    pub(super) fn chunk_count(slots: usize) -> usize {
        slots.div_ceil(Self::CHUNK)
    }

    /// Builds one chunk of the signatures of images whose slots are their indices.
    pub(super) fn chunk(entries: &[Arc<Entry>], chunk: usize) -> Box<[u64]> {
        let mut rows = vec![0; BITS].into_boxed_slice();
        let first = chunk * Self::CHUNK;
        let end = entries.len().min(first + Self::CHUNK);
        for (at, entry) in entries[first..end].iter().enumerate() {
            let bit = 1_u64 << (at / BLOCK as usize);
            for three in entry.text().windows(3) {
                rows[usize::from(hash(three))] |= bit;
            }
        }
        rows
    }

    /// Number of removed texts at which the signature of a block is due to be rebuilt.
    const MAX_STALE: u8 = 32;

    /// Adds a text to the signature of a slot's block.
    pub(super) fn add(&mut self, slot: u32, trigrams: &Trigrams) {
        let (chunk, bit) = place(slot / BLOCK);
        while self.chunks.len() <= chunk {
            self.chunks.push(vec![0; BITS].into_boxed_slice());
        }
        for hash in &trigrams.0 {
            self.chunks[chunk][usize::from(*hash)] |= bit;
        }
    }

    /// Records that the text of a slot was removed. Returns the block if it is due to be
    /// [replaced](Self::replace).
    pub(super) fn remove(&mut self, slot: u32) -> Option<u32> {
        let block = slot / BLOCK;
        let at = block as usize;
        if self.stale.len() <= at {
            self.stale.resize(at + 1, 0);
        }
        self.stale[at] = self.stale[at].saturating_add(1);
        (self.stale[at] >= Self::MAX_STALE).then_some(block)
    }

    /// Rebuilds the signature of a block from the trigrams of its current texts.
    pub(super) fn replace(&mut self, block: u32, trigrams: &Trigrams) {
        let (chunk, bit) = place(block);
        if let Some(rows) = self.chunks.get_mut(chunk) {
            rows.iter_mut().for_each(|row| *row &= !bit);
        }
        if let Some(stale) = self.stale.get_mut(block as usize) {
            *stale = 0;
        }
        self.add(block * BLOCK, trigrams);
    }

    /// Returns the blocks that can contain a term, as a bit set; `None` for a term without trigrams.
    pub(super) fn candidates(&self, term: &str) -> Option<Box<[u64]>> {
        let mut hashes: Vec<u16> = term.as_bytes().windows(3).map(hash).collect();
        if hashes.is_empty() {
            return None;
        }
        hashes.sort_unstable();
        hashes.dedup();
        let of_chunk = |rows: &[u64]| {
            let mut all = u64::MAX;
            for hash in &hashes {
                all &= rows[usize::from(*hash)];
                if all == 0 {
                    break;
                }
            }
            all
        };
        Some(self.chunks.iter().map(|rows| of_chunk(rows)).collect())
    }

    pub(super) fn bytes(&self) -> usize {
        self.chunks.len() * BITS * size_of::<u64>()
    }
}

/// Reports whether a bit is set; bits beyond the end are not.
pub(super) fn is_set(bits: &[u64], at: u32) -> bool {
    bits.get(at as usize / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
}

/// Returns the chunk of a block, and the bit of the block in it.
fn place(block: u32) -> (usize, u64) {
    (block as usize / 64, 1 << (block % 64))
}

/// Hashes three bytes to one of [`BITS`] values.
fn hash(three: &[u8]) -> u16 {
    let packed = u32::from(three[0]) << 16 | u32::from(three[1]) << 8 | u32::from(three[2]);
    (packed.wrapping_mul(0x9E37_79B1) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_holds_a_term_is_always_a_candidate() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut text = |length: usize| -> String {
            std::iter::repeat_with(|| random.char('a'..'\u{180}')).take(length).collect()
        };
        let mut signatures = Signatures::default();
        let texts: Vec<String> =
            (0..5_000).map(|slot| text(if slot % 500 == 0 { 20_000 } else { 40 })).collect();
        for (slot, text) in (0..).zip(&texts) {
            signatures.add(slot, &Trigrams::new([text]));
        }
        for (slot, text) in (0_u32..).zip(&texts) {
            let term: String = text.chars().skip(7).take(5).collect();
            let blocks = signatures.candidates(&term).expect("five characters have a trigram");
            assert!(is_set(&blocks, slot / BLOCK), "{term} of {slot}");
        }
        let absent = signatures.candidates("nowhere").expect("it has trigrams");
        assert_eq!(absent.iter().map(|word| word.count_ones()).sum::<u32>(), 0);
        assert_eq!(signatures.candidates("é"), None);
    }

    #[test]
    fn a_rebuilt_block_drops_what_was_removed() {
        let mut signatures = Signatures::default();
        for slot in 0..BLOCK {
            signatures.add(slot, &Trigrams::new([format!("before{slot}")]));
        }
        let due: Vec<u32> = (0..BLOCK).filter_map(|slot| signatures.remove(slot)).collect();
        assert!(due.first() == Some(&0) && due.len() > 1, "{due:?}");
        signatures.replace(0, &Trigrams::new(["after1", "after2"]));
        let is_candidate = |term: &str| signatures.candidates(term).is_some_and(|blocks| is_set(&blocks, 0));
        assert!(is_candidate("after2") && !is_candidate("before"));
        assert_eq!(signatures.remove(1), None);
    }
}
