//! Searchable texts and search terms.
//!
//! Both are folded, so that comparing characters matches what people regard as the same text.

use std::cmp::Ordering;

use icu_casemap::CaseMapper;
use icu_normalizer::ComposingNormalizer;

/// The separator of the values of a text. No value or term contains it, because normalization replaces it.
const SEPARATOR: char = '\u{2000}';

/// The searchable text of an image: its values, folded and separated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SearchText(String);

/// A search term, folded and never empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Term(String);

/// A part of an image that a text is made of.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Name,
    Description,
    Configuration,
}

impl Part {
    /// Returns the parts of a text that contain a term. The first value is the name, and the second the description.
    pub(crate) fn containing(term: &Term, text: &str) -> Vec<Self> {
        let mut values = text.split(SEPARATOR).map(|value| value.contains(term.as_str()));
        let (name, description) = (values.next() == Some(true), values.next() == Some(true));
        let found = [
            (Self::Name, name),
            (Self::Description, description),
            (Self::Configuration, values.any(|is_hit| is_hit)),
        ];
        found.into_iter().filter_map(|(part, is_hit)| is_hit.then_some(part)).collect()
    }
}

impl SearchText {
    pub(crate) fn new<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        let mut text = String::new();
        for value in values {
            text.push_str(&fold(value));
            text.push(SEPARATOR);
        }
        Self(text)
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Term {
    const MAX_CHARS: usize = 1_024;

    /// Parses a search term, in which every character stands for itself.
    ///
    /// Returns `None` for an empty term, with which everything matches.
    ///
    /// # Errors
    ///
    /// Returns a message if the term has more than 1,024 characters.
    pub(crate) fn parse(typed: &str) -> Result<Option<Self>, String> {
        let length = typed.chars().count();
        if length > Self::MAX_CHARS {
            return Err(format!("must have at most {} characters, has {length}", Self::MAX_CHARS));
        }
        Ok((!typed.is_empty()).then(|| Self(fold(typed))))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Compares two texts without regard to case.
pub(crate) fn compare_folded(a: &str, b: &str) -> Ordering {
    if a.is_ascii() && b.is_ascii() {
        let [a, b] = [a, b].map(|text| text.bytes().map(|byte| byte.to_ascii_lowercase()));
        a.cmp(b)
    } else {
        fold(a).cmp(&fold(b))
    }
}

/// Applies full, locale-independent case folding over NFC.
pub(crate) fn fold(text: &str) -> String {
    // Equivalent for ASCII, without tables.
    if text.is_ascii() { text.to_ascii_lowercase() } else { fold_unicode(text) }
}

fn fold_unicode(text: &str) -> String {
    let normalizer = ComposingNormalizer::new_nfc();
    // Folding can decompose characters, or leave sequences that compose.
    let folded = CaseMapper::new().fold_string(&normalizer.normalize(text)).into_owned();
    normalizer.normalize(&folded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finds(typed: &str, values: &[&str]) -> bool {
        let term = Term::parse(typed).expect("short enough").expect("not empty");
        SearchText::new(values.iter().copied()).as_str().contains(term.as_str())
    }

    #[test]
    fn case_does_not_matter_in_any_script() {
        for (typed, text) in [
            ("straße", "STRASSE"),
            ("STRASSE", "Straße"),
            ("ÇA", "ça"),
            ("c\u{327}a", "ÇA"),
            ("ΣΊΣΥΦΟΣ", "Σίσυφος"),
            ("ﬃ", "OFFICE FFI"),
            ("i\u{307}", "İ"),
        ] {
            assert!(finds(typed, &[text]), "{typed} in {text}");
        }
        for (typed, text) in [("ı", "i"), ("i", "ı"), ("é", "e"), ("a", "á")] {
            assert!(!finds(typed, &[text]), "{typed} in {text}");
        }
    }

    #[test]
    fn nothing_is_found_across_two_values() {
        assert!(finds("ab", &["xab", "c"]));
        for typed in ["abc", "b\u{1e}c", "b c", "bc", "b\u{2000}c", "b\u{2000}", "\u{2000}"] {
            assert!(!finds(typed, &["ab", "c"]), "{typed:?}");
        }
        assert!(finds("b\u{2000}c", &["ab\u{2000}c"]));
        assert!(!fold("\u{2000}").contains(SEPARATOR));
    }

    #[test]
    fn ascii_is_folded_as_all_other_text_is() {
        for character in (0..=127).map(char::from) {
            let text = character.to_string();
            assert_eq!(fold(&text), fold_unicode(&text), "{character:?}");
        }
    }

    #[test]
    fn the_parts_that_contain_a_term_are_known() {
        let text = SearchText::new(["Go tools", "Tools of the team", "FROM golang", "tools"]);
        for (typed, expected) in [
            ("go t", &[Part::Name][..]),
            ("TOOLS", &[Part::Name, Part::Description, Part::Configuration]),
            ("team", &[Part::Description]),
            ("golang", &[Part::Configuration]),
            ("rust", &[]),
        ] {
            let term = Term::parse(typed).expect("short enough").expect("not empty");
            assert_eq!(Part::containing(&term, text.as_str()), expected, "{typed}");
        }
    }

    #[test]
    fn names_are_compared_without_regard_to_case() {
        for (less, more) in [("apple", "Banana"), ("Apple", "banana"), ("a", "Ä"), ("STRASSE", "straßeb")] {
            assert_eq!(compare_folded(less, more), Ordering::Less, "{less} {more}");
        }
        assert_eq!(compare_folded("Straße", "STRASSE"), Ordering::Equal);
    }

    #[test]
    fn a_term_is_bounded_and_may_be_nothing() {
        assert_eq!(Term::parse(""), Ok(None));
        assert!(Term::parse(&"ß".repeat(1_024)).is_ok());
        assert!(Term::parse(&"ß".repeat(1_025)).is_err());
    }
}
