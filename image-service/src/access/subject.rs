//! Subjects: users, services and workers, by the `sub` of their tokens.

use std::ops::RangeInclusive;

use unicode_properties::{GeneralCategory, UnicodeGeneralCategory as _};

/// Reports whether a text is a valid subject.
///
/// Subjects also serve as creators, names of workers, and grantees.
pub(crate) fn is_subject(text: &str) -> bool {
    const MAX_BYTES: usize = 255;
    !text.trim().is_empty() && text.len() <= MAX_BYTES && !text.chars().any(is_invisible)
}

/// Reports whether a character is not shown, or changes how others are: controls, line separators, and format
/// characters, among which are those of zero width and those that turn the direction of a text.
pub(crate) fn is_invisible(character: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator};
    /// Others that Unicode has no picture for: joiners, fillers and variants of the character before.
    const IGNORED: [RangeInclusive<char>; 9] = [
        '\u{34f}'..='\u{34f}',
        '\u{115f}'..='\u{1160}',
        '\u{17b4}'..='\u{17b5}',
        '\u{180b}'..='\u{180f}',
        '\u{2065}'..='\u{2065}',
        '\u{3164}'..='\u{3164}',
        '\u{fe00}'..='\u{fe0f}',
        '\u{ffa0}'..='\u{ffa0}',
        '\u{e0000}'..='\u{e0fff}',
    ];
    matches!(character.general_category(), Control | Format | LineSeparator | ParagraphSeparator)
        || IGNORED.iter().any(|range| range.contains(&character))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_shown_as_it_is() {
        for text in ["alice", "a b", "Zoë", "日本語", "sha256:ab|x@example.org", &"x".repeat(255)] {
            assert!(is_subject(text), "{text:?}");
        }
        // Control characters, zero width, directions, separators of lines, a byte order mark, a soft hyphen.
        for part in [
            "\n",
            "\u{7f}",
            "\u{85}",
            "\u{200b}",
            "\u{200d}",
            "\u{202e}",
            "\u{2066}",
            "\u{2028}",
            "\u{feff}",
            "\u{ad}",
            "\u{34f}",
            "\u{115f}",
            "\u{3164}",
            "\u{fe0f}",
            "\u{e0100}",
        ] {
            assert!(!is_subject(&format!("alice{part}")), "{part:?}");
        }
        for text in ["", " ", "\u{3000}", &"x".repeat(256)] {
            assert!(!is_subject(text), "{text:?}");
        }
    }
}
