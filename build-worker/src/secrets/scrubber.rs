//! Hides values of secrets in what steps print and engines report.
//!
//! A value is hidden as a whole and line by line, as it is, in base64 at any offset, and URL-encoded. The
//! passwords in URLs and netrc entries are hidden by themselves, too.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use aho_corasick::{AhoCorasick, MatchKind};
use base64::{
    Engine,
    prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use super::Netrc;

/// The texts to hide. `Debug` does not show them.
#[derive(Default)]
pub(crate) struct Scrubber {
    automaton: Option<AhoCorasick>,
    /// Texts in order, by which the begin of one is found.
    texts: Vec<Vec<u8>>,
    /// What replaces each text.
    replacements: Vec<String>,
    /// Length of the longest text.
    longest: usize,
}

/// Characters that URLs need not encode.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// Those that programs leave as they are, too.
const SETS: [&AsciiSet; 4] = [
    UNRESERVED,
    &UNRESERVED.remove(b'/'),
    &UNRESERVED.remove(b'!').remove(b'\'').remove(b'(').remove(b')').remove(b'*'),
    NON_ALPHANUMERIC,
];

impl Scrubber {
    /// Minimum length of a text that is hidden, in bytes: shorter ones are in every log.
    const SHORTEST: usize = 4;
    /// Maximum length of a text that is hidden in one piece, in bytes.
    const LONGEST: usize = 4096;
    /// Length of the lines of base64 that programs write.
    const BASE64_LINES: [usize; 2] = [76, 64];

    /// Creates a scrubber of secrets, each with its name.
    pub(crate) fn new<'a>(secrets: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut named = BTreeMap::new();
        for (name, value) in secrets {
            let mut texts = BTreeSet::new();
            for part in parts(value) {
                encodings(&part, &mut texts);
            }
            for text in texts.into_iter().filter(|text| text.len() >= Self::SHORTEST) {
                named.entry(text).or_insert_with(|| format!("[secret {name}]"));
            }
        }
        if named.is_empty() {
            return Self::default();
        }
        let (texts, replacements): (Vec<_>, Vec<_>) = named.into_iter().unzip();
        let automaton = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts);
        let longest = texts.iter().map(Vec::len).max().unwrap_or_default();
        Self {
            automaton: Some(automaton.expect("secrets are far smaller than an automaton may be")),
            texts,
            replacements,
            longest,
        }
    }

    /// Takes in the next bytes of a stream, and returns what may be shown.
    ///
    /// The end of the stream that may be the begin of a secret is held back in `held`.
    pub(crate) fn take<'a>(&self, held: &mut Vec<u8>, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let Some(automaton) = &self.automaton else { return Cow::Borrowed(bytes) };
        held.extend_from_slice(bytes);
        let undecided = self.undecided(held, 0);
        let mut shown = Vec::with_capacity(held.len());
        let mut end = 0;
        for found in automaton.find_iter(held.as_slice()).take_while(|found| found.start() < undecided) {
            shown.extend_from_slice(&held[end..found.start()]);
            shown.extend_from_slice(self.replacements[found.pattern()].as_bytes());
            end = found.end();
        }
        // What was undecided may have been the end of what was found.
        let undecided = if end > undecided { self.undecided(held, end) } else { undecided };
        shown.extend_from_slice(&held[end..undecided]);
        held.drain(..undecided);
        Cow::Owned(shown)
    }

    /// Returns what was held back at the end of a stream, with its secrets hidden.
    pub(crate) fn finish(&self, held: &mut Vec<u8>) -> Vec<u8> {
        let held = std::mem::take(held);
        match &self.automaton {
            Some(automaton) => automaton.replace_all_bytes(&held, &self.replacements),
            None => held,
        }
    }

    /// Hides the secrets in a text.
    pub(crate) fn text(&self, text: String) -> String {
        let Some(automaton) = &self.automaton else { return text };
        if automaton.is_match(&text) { automaton.replace_all(&text, &self.replacements) } else { text }
    }

    /// Returns the position from `from` on at which a secret may begin whose end is still to come.
    fn undecided(&self, bytes: &[u8], from: usize) -> usize {
        let earliest = from.max(bytes.len().saturating_sub(self.longest.saturating_sub(1)));
        let is_begin = |position: &usize| {
            let rest = &bytes[*position..];
            let next = self.texts.partition_point(|text| text.as_slice() <= rest);
            self.texts.get(next).is_some_and(|text| text.starts_with(rest))
        };
        (earliest..bytes.len()).find(is_begin).unwrap_or(bytes.len())
    }
}

/// Returns the parts of a value that are hidden by themselves.
fn parts(value: &[u8]) -> Vec<Cow<'_, [u8]>> {
    let mut parts = vec![Cow::Borrowed(value.trim_ascii())];
    parts.extend(value.split(|byte| *byte == b'\n').map(|line| Cow::Borrowed(line.trim_ascii())));
    if let Some(netrc) = Netrc::parse(value) {
        parts.extend(netrc.entries().map(|(_, _, password)| Cow::Owned(password.as_bytes().to_vec())));
    }
    let text = String::from_utf8_lossy(value);
    for rest in text.split("://").skip(1) {
        let end = rest.find(|c: char| c.is_whitespace() || c == '/').unwrap_or(rest.len());
        let Some((user, _)) = rest[..end].rsplit_once('@') else { continue };
        let password = user.split_once(':').map_or(user, |(_, password)| password);
        let decoded: Vec<u8> = percent_encoding::percent_decode_str(password).collect();
        parts.extend([Cow::Owned(password.as_bytes().to_vec()), Cow::Owned(decoded)]);
    }
    let whole = |part: &Cow<'_, [u8]>| part.len() >= Scrubber::SHORTEST;
    parts.into_iter().filter(whole).flat_map(pieces).collect()
}

/// Cuts a part that is too long to be hidden in one piece.
fn pieces(part: Cow<'_, [u8]>) -> Vec<Cow<'_, [u8]>> {
    if part.len() <= Scrubber::LONGEST {
        return vec![part];
    }
    part.chunks(Scrubber::LONGEST).map(|piece| Cow::Owned(piece.to_vec())).collect()
}

/// Adds a text in all its forms.
fn encodings(text: &[u8], texts: &mut BTreeSet<Vec<u8>>) {
    texts.insert(text.to_vec());
    for engine in [&BASE64_STANDARD_NO_PAD, &BASE64_URL_SAFE_NO_PAD] {
        for before in 0..3 {
            // Characters that depend on what stands before or after are left out.
            let encoded = engine.encode([&vec![0; before], text].concat());
            let begin = (before * 8).div_ceil(6);
            let end = (before + text.len()) * 8 / 6;
            // With the padding, if nothing comes after it.
            let rest = encoded.get(begin..).unwrap_or_default();
            texts.extend(["", "=", "=="].map(|padding| format!("{rest}{padding}").into_bytes()));
            let encoded = encoded.get(begin..end).unwrap_or_default();
            texts.insert(encoded.as_bytes().to_vec());
            for line in Scrubber::BASE64_LINES {
                let lines = encoded.as_bytes().chunks(line).filter(|_| begin == 0 && encoded.len() > line);
                texts.extend(lines.map(<[u8]>::to_vec));
            }
        }
    }
    for set in SETS {
        let encoded = percent_encode(text, set).to_string();
        let lower = lower_hexadecimal(&encoded);
        for encoded in [encoded, lower] {
            texts.insert(encoded.replace("%20", "+").into_bytes());
            texts.insert(encoded.into_bytes());
        }
    }
}

/// Returns a URL-encoded text with lower-case digits in its encoded characters.
fn lower_hexadecimal(encoded: &str) -> String {
    let mut parts = encoded.split('%');
    let mut lower = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2).unwrap_or((part, ""));
        lower.extend(["%", &digits.to_ascii_lowercase(), rest]);
    }
    lower
}

impl fmt::Debug for Scrubber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrubber")
    }
}

#[cfg(test)]
mod tests {
    use base64::prelude::BASE64_STANDARD;

    use super::*;

    const VALUE: &str = "s3cr3t/v+lue=&ü 2";

    /// Takes in a text in chunks of one length.
    fn scrubbed(scrubber: &Scrubber, text: &[u8], length: usize) -> String {
        let mut held = Vec::new();
        let mut shown = Vec::new();
        for chunk in text.chunks(length) {
            shown.extend_from_slice(&scrubber.take(&mut held, chunk));
        }
        shown.extend(scrubber.finish(&mut held));
        String::from_utf8(shown).expect("text")
    }

    #[test]
    fn a_value_is_hidden_however_it_is_cut_and_encoded() {
        let scrubber = Scrubber::new([("token", format!("{VALUE}\n").as_bytes())]);
        let encoded = |text: &str| BASE64_STANDARD.encode(text);
        let form = "s3cr3t%2Fv%2Blue%3D%26%C3%BC+2";
        for (text, expected) in [
            (format!("a {VALUE} b"), "a [secret token] b"),
            (format!("a {VALUE}{VALUE}"), "a [secret token][secret token]"),
            (format!("a {}", encoded(VALUE)), "a [secret token]"),
            (format!("a {}", encoded(&format!("x{VALUE}"))), "a eH[secret token]"),
            (format!("a {}", encoded(&format!("xy{VALUE}"))), "a eHl[secret token]"),
            (format!("a {form}&b"), "a [secret token]&b"),
            (format!("a {}&b", form.to_ascii_lowercase()), "a [secret token]&b"),
            (format!("a {}", form.replace('+', "%20").replace("%2F", "/")), "a [secret token]"),
            ("a s3cr3t/v+lue=&".to_owned(), "a s3cr3t/v+lue=&"),
            ("a s3cr3s3cr3t".to_owned(), "a s3cr3s3cr3t"),
        ] {
            for length in 1..=text.len() {
                let shown = scrubbed(&scrubber, text.as_bytes(), length);
                let expected_end = expected.trim_end_matches('=');
                assert!(shown.trim_end_matches('=').starts_with(expected_end), "{text} by {length}: {shown}");
                assert!(!shown.contains(VALUE), "{text} by {length}: {shown}");
            }
            assert!(scrubber.text(text.clone()).starts_with(expected.trim_end_matches('=')), "{text}");
        }
    }

    #[test]
    fn lines_and_passwords_are_hidden_by_themselves() {
        let conf = "[global]\nindex-url = https://user:p%40ss-word@pypi.example/simple\n";
        let netrc = "machine git.example login bob password hunter-2-hunter";
        let scrubber = Scrubber::new([("conf", conf.as_bytes()), ("netrc", netrc.as_bytes())]);
        for (text, expected) in [
            ("p%40ss-word", "[secret conf]"),
            ("p@ss-word", "[secret conf]"),
            ("index-url = https://user:p%40ss-word@pypi.example/simple", "[secret conf]"),
            ("Authorization: hunter-2-hunter", "Authorization: [secret netrc]"),
            ("https://pypi.example/simple", "https://pypi.example/simple"),
        ] {
            assert_eq!(scrubber.text(text.to_owned()), expected);
        }
    }

    #[test]
    fn a_long_value_in_base64_lines_is_hidden() {
        let key: Vec<u8> = (0..200).collect();
        let scrubber = Scrubber::new([("key", key.as_slice())]);
        let encoded = BASE64_STANDARD.encode(&key);
        let lines: Vec<&str> =
            encoded.as_bytes().chunks(76).map(|c| std::str::from_utf8(c).expect("text")).collect();
        let shown = scrubber.text(lines.join("\n"));
        for line in lines {
            assert!(!shown.contains(&line[..line.len() - 4]), "{shown}");
        }
    }

    #[test]
    fn a_scrubber_without_secrets_changes_nothing() {
        let scrubber = Scrubber::new([("short", &b"abc"[..])]);
        assert_eq!(scrubbed(&scrubber, b"abc abc", 2), "abc abc");
        assert_eq!(format!("{scrubber:?}"), "Scrubber");
    }
}
