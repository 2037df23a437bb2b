//! What the index has of an image, and what a term has in it.

use std::fmt::{self, Write as _};

use crate::{
    search::{self, Term},
    store::entity::image,
};

/// An image whose text has more different characters in a row has all of them, as far as the index knows: to write so many
/// would take longer than to read the text.
const MOST_GRAMS: usize = 16_384;
/// How many words of a term are looked up: each is a list to be read, and few images have these and not the term.
const MOST_LOOKED_UP: usize = 6;
/// What an image of too many words has instead.
const EVERYTHING: &str = "everything";

/// Everything that an image can be found by.
pub(super) fn words_of<'a>(
    row: &image::Model,
    text: &str,
    viewers: impl Iterator<Item = &'a String>,
) -> String {
    let mut words = vec![
        word('v', &row.creator),
        word('c', &row.creator),
        status_word(row.status),
        flag('t', row.template),
        flag('e', row.enabled),
        flag('p', row.pulled),
    ];
    words.extend(viewers.map(|subject| word('v', subject)));
    let mut grams: Vec<u64> = search::grams(text).map(gram_hash).collect();
    grams.sort_unstable();
    grams.dedup();
    let mut words = words.join(" ");
    if grams.len() > MOST_GRAMS {
        words.push(' ');
        words.push_str(EVERYTHING);
    } else {
        words.reserve(grams.len() * 11);
        for gram in grams {
            let _ = write!(words, " {}", Word('g', gram));
        }
    }
    words
}

/// What every image has whose text holds a term.
pub(super) fn term_words(term: &Term) -> String {
    let grams = search::grams_within(term);
    let step = grams.len().div_ceil(MOST_LOOKED_UP).max(1);
    let words: Vec<String> =
        grams.into_iter().step_by(step).map(|gram| Word('g', gram_hash(gram)).to_string()).collect();
    format!("(({}) OR {EVERYTHING})", words.join(" AND "))
}

pub(super) fn status_word(code: i32) -> String {
    format!("s{code}")
}

pub(super) fn flag(which: char, is_set: bool) -> String {
    format!("{which}{}", u8::from(is_set))
}

/// A word that FTS5 takes as one, of a kind and a hash: two texts may have the same, which costs a look at the rows.
struct Word(char, u64);

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:x}", self.0, self.1)
    }
}

pub(super) fn word(kind: char, text: &str) -> String {
    Word(kind, hash(text)).to_string()
}

/// Of grams there are few, and their words are most of the index.
fn gram_hash(gram: &str) -> u64 {
    let hash = hash(gram);
    (hash ^ (hash >> 32)) & 0x7_ffff_ffff
}

/// FNV-1a: the index is kept, so the words have to be the same in every build.
fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
