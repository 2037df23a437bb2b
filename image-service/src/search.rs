//! What is found: texts and terms, folded so that a plain comparison of characters is what people mean by the same text.

use std::collections::BTreeSet;

use icu_casemap::CaseMapper;
use icu_normalizer::ComposingNormalizer;

/// How many characters of a text are looked up at once.
const GRAM: usize = 3;

/// Stands between the values of a text. It is in none of them, and in no term: normalising makes another character of it.
const SEPARATOR: char = '\u{2000}';

/// Everything that can be found of an image: its values, folded, with separators between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SearchText(String);

/// What somebody looks for, folded; never empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Term(String);

impl SearchText {
    pub(crate) fn of<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
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

    /// Takes what was typed, every character for itself; `None` when that is nothing, so that everything matches.
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

    /// No text of the catalogue holds NUL, and databases do not like it.
    pub(crate) fn is_possible(&self) -> bool {
        !self.0.contains('\0')
    }
}

/// Every one, two and three characters that follow one another in a text, as often as they do, but for what no term can hold.
pub(crate) fn grams(text: &str) -> impl Iterator<Item = &str> {
    text.split(SEPARATOR).flat_map(|value| {
        value.char_indices().flat_map(move |(at, _)| {
            let ends = value[at..].char_indices().skip(1).map(move |(length, _)| at + length);
            ends.chain([value.len()]).take(GRAM).map(move |end| &value[at..end])
        })
    })
}

/// Every three characters that follow one another in a term, or the whole of one that has fewer: [`grams`] of every text that
/// holds the term.
pub(crate) fn grams_within(term: &Term) -> BTreeSet<&str> {
    let text = term.as_str();
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let length = GRAM.min(ends.len() - 1);
    ends.windows(length + 1).map(|ends| &text[ends[0]..ends[length]]).collect()
}

/// Full, locale-free case folding over NFC.
fn fold(text: &str) -> String {
    let normalizer = ComposingNormalizer::new_nfc();
    // Folding can take characters apart, or leave what composes.
    let folded = CaseMapper::new().fold_string(&normalizer.normalize(text)).into_owned();
    normalizer.normalize(&folded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finds(typed: &str, values: &[&str]) -> bool {
        let term = Term::parse(typed).expect("short enough").expect("not empty");
        SearchText::of(values.iter().copied()).as_str().contains(term.as_str())
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
    fn whatever_holds_a_term_has_its_grams() -> Result<(), String> {
        let text = SearchText::of(["aé日本語x", "b"]);
        let grams: BTreeSet<&str> = grams(text.as_str()).collect();
        for typed in ["a", "é", "日本", "aé日", "é日本語", "aé日本語x", "b"] {
            let term = Term::parse(typed)?.ok_or("not empty")?;
            assert!(grams_within(&term).is_subset(&grams), "{typed}");
        }
        for typed in ["c", "ab", "xb", "語a"] {
            let term = Term::parse(typed)?.ok_or("not empty")?;
            assert!(!grams_within(&term).is_subset(&grams), "{typed}");
        }
        Ok(())
    }

    #[test]
    fn a_term_is_bounded_and_may_be_nothing() {
        assert_eq!(Term::parse(""), Ok(None));
        assert!(Term::parse(&"ß".repeat(1_024)).is_ok());
        assert!(Term::parse(&"ß".repeat(1_025)).is_err());
    }
}
