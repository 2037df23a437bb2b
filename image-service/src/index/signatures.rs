//! The blocks of slots that can hold a term: signatures of the trigrams of their texts.
//!
//! A signature has a fixed number of bits, whatever the texts are, so that nobody can make it large. Bits are only added: those of
//! texts that have gone stay until the block is made anew.

use std::sync::Arc;

use super::entry::Entry;

/// The number of slots that share a signature.
pub(super) const BLOCK: u32 = 64;

/// The number of bits of a signature. Trigrams are of bytes; those with the same hash share a bit.
const BITS: usize = 1 << 16;

/// The signatures of all blocks, 64 of them interleaved: a row of bits for each hash.
#[derive(Debug, Default)]
pub(super) struct Signatures {
    chunks: Vec<Box<[u64]>>,
    /// The number of texts of each block that have gone since it was made.
    stale: Vec<u8>,
}

/// The hashes of the trigrams of a text, each once.
#[derive(Clone, Debug, Default)]
pub(super) struct Trigrams(Vec<u16>);

impl Trigrams {
    /// Finds those of several texts together.
    pub(super) fn of(texts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Self {
        let mut hashes = Vec::new();
        // Beyond this it is cheaper to remember in bits which there are.
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
    /// The number of slots in a chunk.
    const CHUNK: usize = 64 * BLOCK as usize;

    pub(super) fn new(chunks: Vec<Box<[u64]>>) -> Self {
        Self { chunks, stale: Vec::new() }
    }

    /// Returns how many chunks so many slots have.
    pub(super) fn chunk_count(slots: usize) -> usize {
        slots.div_ceil(Self::CHUNK)
    }

    /// Makes a chunk of the signatures of the images that are in the slots of their places.
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

    /// From how many texts on that have gone a block is to be made anew.
    const MAX_STALE: u8 = 32;

    /// Adds a text to the block of a slot.
    pub(super) fn add(&mut self, slot: u32, trigrams: &Trigrams) {
        let (chunk, bit) = place(slot / BLOCK);
        while self.chunks.len() <= chunk {
            self.chunks.push(vec![0; BITS].into_boxed_slice());
        }
        for hash in &trigrams.0 {
            self.chunks[chunk][usize::from(*hash)] |= bit;
        }
    }

    /// Notes that the text of a slot has gone. Returns the block when it is to be [replaced](Self::replace).
    pub(super) fn remove(&mut self, slot: u32) -> Option<u32> {
        let block = slot / BLOCK;
        let at = block as usize;
        if self.stale.len() <= at {
            self.stale.resize(at + 1, 0);
        }
        self.stale[at] = self.stale[at].saturating_add(1);
        (self.stale[at] >= Self::MAX_STALE).then_some(block)
    }

    /// Makes the signature of a block anew, from the trigrams of the texts that its slots have.
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

    /// Returns which blocks can hold a term, a bit each; `None` for a term that has no trigram.
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

/// Tells whether a bit is set; none is beyond the end.
pub(super) fn is_set(bits: &[u64], at: u32) -> bool {
    bits.get(at as usize / 64).is_some_and(|word| word >> (at % 64) & 1 == 1)
}

/// Returns the chunk of a block, and its bit there.
fn place(block: u32) -> (usize, u64) {
    (block as usize / 64, 1 << (block % 64))
}

/// Spreads three bytes over [`BITS`].
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
            signatures.add(slot, &Trigrams::of([text]));
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
    fn a_block_that_is_made_anew_forgets_what_has_gone() {
        let mut signatures = Signatures::default();
        for slot in 0..BLOCK {
            signatures.add(slot, &Trigrams::of([format!("before{slot}")]));
        }
        let due: Vec<u32> = (0..BLOCK).filter_map(|slot| signatures.remove(slot)).collect();
        assert!(due.first() == Some(&0) && due.len() > 1, "{due:?}");
        signatures.replace(0, &Trigrams::of(["after1", "after2"]));
        let is_candidate = |term: &str| signatures.candidates(term).is_some_and(|blocks| is_set(&blocks, 0));
        assert!(is_candidate("after2") && !is_candidate("before"));
        assert_eq!(signatures.remove(1), None);
    }
}
