//! Patterns of `.dockerignore` files, as moby's `patternmatcher` has them.
//!
//! A pattern has to be valid for Go's `filepath.Match`, and matches as a regular expression, to which it is
//! translated character by character; `**` at one end of a pattern without other wildcards compares text
//! instead.

use std::{fmt::Write, iter::Peekable, str::Chars};

use regex::Regex;

/// The paths that a pattern matches.
#[derive(Debug)]
pub(super) enum Paths {
    /// This one.
    Exact(String),
    /// Those with this beginning.
    Prefix(String),
    /// Those with this end; its slash may be missing from a whole path.
    Suffix(String),
    Regex(Regex),
    Nothing,
}

/// Reports whether `filepath.Match` takes a pattern for well-formed.
pub(super) fn is_valid(pattern: &str) -> bool {
    let mut rest = pattern.chars().peekable();
    while let Some(character) = rest.next() {
        let is_whole = match character {
            '\\' => rest.next().is_some(),
            '[' => end_of_class(&mut rest).is_some(),
            _ => true,
        };
        if !is_whole {
            return false;
        }
    }
    true
}

/// Skips the ranges of a class, of which there is at least one, and its end.
fn end_of_class(rest: &mut Peekable<Chars<'_>>) -> Option<()> {
    fn bound(rest: &mut Peekable<Chars<'_>>) -> Option<()> {
        match rest.next()? {
            '\\' => rest.next().map(|_| ()),
            ']' | '-' => None,
            _ => Some(()),
        }
    }
    rest.next_if_eq(&'^');
    loop {
        bound(rest)?;
        if rest.next_if_eq(&'-').is_some() {
            bound(rest)?;
        }
        if rest.next_if_eq(&']').is_some() {
            return Some(());
        }
    }
}

impl Paths {
    /// Parses a valid pattern; returns `None` if it makes no regular expression.
    pub(super) fn parse(pattern: &str) -> Option<Self> {
        enum Kind {
            Exact,
            Prefix,
            Suffix,
            Regex,
        }
        /// Characters that stand for themselves only if they are escaped. Moby means to escape `|{}`, too, but
        /// does not.
        const ESCAPED: &str = ".+()$";
        let mut kind = Kind::Exact;
        // In Go's syntax.
        let mut regex = String::from("^");
        let mut rest = pattern.chars().peekable();
        while let Some(character) = rest.next() {
            match character {
                '*' if rest.next_if_eq(&'*').is_some() => {
                    rest.next_if_eq(&'/');
                    let is_last = rest.peek().is_none();
                    kind = match kind {
                        _ if regex == "^" => Kind::Suffix,
                        Kind::Exact if is_last => Kind::Prefix,
                        Kind::Exact | Kind::Prefix | Kind::Suffix | Kind::Regex => Kind::Regex,
                    };
                    regex.push_str(if is_last { ".*" } else { "(.*/)?" });
                    continue;
                }
                '*' => regex.push_str("[^/]*"),
                '?' => regex.push_str("[^/]"),
                '\\' => regex.extend(['\\', rest.next()?]),
                '[' | ']' => regex.push(character),
                _ if ESCAPED.contains(character) => {
                    regex.extend(['\\', character]);
                    continue;
                }
                _ => {
                    regex.push(character);
                    continue;
                }
            }
            kind = Kind::Regex;
        }
        Some(match kind {
            Kind::Exact => Self::Exact(pattern.to_owned()),
            Kind::Prefix => Self::Prefix(pattern.strip_suffix("**")?.to_owned()),
            Kind::Suffix => Self::Suffix(pattern.strip_prefix("**")?.to_owned()),
            Kind::Regex => Self::Regex(Regex::new(&translated(&format!("{regex}$"))?).ok()?),
        })
    }

    /// Reports whether a path is one of them.
    pub(super) fn contain(&self, path: &str) -> bool {
        match self {
            Self::Exact(whole) => path == whole,
            Self::Prefix(prefix) => path.starts_with(prefix),
            Self::Suffix(suffix) => path.ends_with(suffix) || suffix.strip_prefix('/') == Some(path),
            Self::Regex(regex) => regex.is_match(path),
            Self::Nothing => false,
        }
    }
}

/// Names of classes within brackets.
const CLASSES: [&str; 14] = [
    "alnum", "alpha", "ascii", "blank", "cntrl", "digit", "graph", "lower", "print", "punct", "space",
    "upper", "word", "xdigit",
];

/// Translates a regular expression of Go; returns `None` if it is malformed.
///
/// The syntax differs within brackets: Go knows neither nested brackets nor operators there.
fn translated(regex: &str) -> Option<String> {
    let mut translated = String::new();
    let mut rest = regex.chars().peekable();
    while let Some(character) = rest.next() {
        match character {
            '\\' => push_escape(&mut translated, rest.next()?)?,
            '[' => push_class(&mut translated, &mut rest)?,
            '{' if is_repetition(rest.clone()) => {
                // Go refuses to repeat a repetition.
                if translated.ends_with(['*', '?', '}', '^', '|']) {
                    return None;
                }
                translated.push('{');
            }
            '{' => push_literal(&mut translated, '{'),
            character => translated.push(character),
        }
    }
    Some(translated)
}

/// Reports whether what follows a brace makes it a repetition, such as `2}` or `1,3}`.
fn is_repetition(rest: Peekable<Chars<'_>>) -> bool {
    let inner: String = rest.take_while(|&c| c != '}').collect();
    let (least, most) = inner.split_once(',').unwrap_or((&inner, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number(least) && (most.is_empty() || is_number(most))
}

/// Translates a class up to its end.
fn push_class(regex: &mut String, rest: &mut Peekable<Chars<'_>>) -> Option<()> {
    regex.push('[');
    if rest.next_if_eq(&'^').is_some() {
        regex.push('^');
    }
    let mut is_first = true;
    loop {
        match rest.next()? {
            ']' if !is_first => {
                regex.push(']');
                return Some(());
            }
            '-' => regex.push('-'),
            '\\' => push_escape(regex, rest.next()?)?,
            '[' if rest.peek() == Some(&':') => {
                let after: String = rest.clone().collect();
                match after.split_once(":]") {
                    Some((name, _)) if CLASSES.contains(&name.trim_start_matches([':', '^'])) => {
                        let _ = write!(regex, "[{name}:]");
                        rest.nth(name.len() + 1);
                    }
                    Some(_) => return None,
                    None => push_literal(regex, '['),
                }
            }
            character => push_literal(regex, character),
        }
        is_first = false;
    }
}

/// Writes an escaped character, which is an expression if it is a letter or a digit, and must be ASCII.
fn push_escape(regex: &mut String, character: char) -> Option<()> {
    // Classes of Go have ASCII only.
    let class = match character {
        'd' => "[0-9]",
        'D' => "[^0-9]",
        's' => r"[\t\n\x0c\r ]",
        'S' => r"[^\t\n\x0c\r ]",
        'w' => "[0-9A-Za-z_]",
        'W' => "[^0-9A-Za-z_]",
        _ => "",
    };
    if !class.is_empty() {
        regex.push_str(class);
    } else if character.is_ascii_alphanumeric() {
        regex.push('\\');
        regex.push(character);
    } else if character.is_ascii() {
        push_literal(regex, character);
    } else {
        return None;
    }
    Some(())
}

/// Writes a character that stands for itself, also within a class.
fn push_literal(regex: &mut String, character: char) {
    // Writing to a String cannot fail.
    let _ = write!(regex, "\\x{{{:x}}}", u32::from(character));
}
