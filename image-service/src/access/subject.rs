//! Subjects: users, services and workers, by the `sub` of their tokens.

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
fn is_invisible(character: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator};
    matches!(character.general_category(), Control | Format | LineSeparator | ParagraphSeparator)
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
            "\n", "\u{7f}", "\u{85}", "\u{200b}", "\u{200d}", "\u{202e}", "\u{2066}", "\u{2028}", "\u{feff}",
            "\u{ad}",
        ] {
            assert!(!is_subject(&format!("alice{part}")), "{part:?}");
        }
        for text in ["", " ", "\u{3000}", &"x".repeat(256)] {
            assert!(!is_subject(text), "{text:?}");
        }
    }
}
