//! Hides values of secrets in what steps print and engines report.
//!
//! A value is hidden as a whole and line by line, as it is, in base64 at any offset, URL-encoded, and escaped
//! for JSON and HTML, wherever lines break it. The passwords in URLs and netrc entries are hidden by
//! themselves, too.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};

use super::{Netrc, encodings};

/// The texts to hide. `Debug` does not show them.
///
/// Texts have no line ends, and are looked for in what is printed without its line ends.
#[derive(Default)]
pub(crate) struct Scrubber {
    automaton: Option<AhoCorasick>,
    /// Texts in order, by which the begin of one is found.
    texts: Vec<Vec<u8>>,
    /// Replacements of the texts.
    replacements: Vec<String>,
    /// Length of the longest text.
    longest: usize,
}

/// The last bytes of a stream, as far as a secret may begin in them.
#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    /// Number of bytes that were shown all the same, because so few say little.
    shown: usize,
}

/// Bytes without line ends, and where each of them was.
struct Joined {
    bytes: Vec<u8>,
    positions: Vec<usize>,
}

impl Scrubber {
    /// Minimum length of a text that is hidden, in bytes: shorter ones are in every log.
    pub(crate) const SHORTEST: usize = 4;
    /// Minimum length of a line that is hidden by itself, in bytes.
    const SHORTEST_LINE: usize = 8;
    /// Maximum length of a text that is hidden in one piece, in bytes.
    const LONGEST: usize = 4096;

    /// Creates a scrubber of secrets, each with its name. Takes time for large ones.
    pub(crate) fn new<'a>(secrets: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut named = BTreeMap::new();
        for (name, value) in secrets {
            let mut texts = BTreeSet::new();
            for part in parts(value) {
                encodings::add(&part, &mut texts);
            }
            for text in texts {
                let text: Vec<u8> = text.into_iter().filter(|byte| !is_line_end(*byte)).collect();
                if text.len() >= Self::SHORTEST {
                    named.entry(text).or_insert_with(|| format!("[secret {name}]"));
                }
            }
        }
        if named.is_empty() {
            return Self::default();
        }
        let (texts, replacements): (Vec<_>, Vec<_>) = named.into_iter().unzip();
        let mut builder = AhoCorasick::builder();
        builder.match_kind(MatchKind::LeftmostLongest).kind(Some(AhoCorasickKind::ContiguousNFA));
        let automaton = builder.build(&texts).expect("secrets are far smaller than an automaton may be");
        let longest = texts.iter().map(Vec::len).max().unwrap_or_default();
        Self { automaton: Some(automaton), texts, replacements, longest }
    }

    /// Takes in the next bytes of a stream, and returns what may be shown.
    ///
    /// The end of the stream that may be the begin of a secret is held back.
    pub(crate) fn take<'a>(&self, held: &mut Held, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let Some(automaton) = &self.automaton else { return Cow::Borrowed(bytes) };
        held.bytes.extend_from_slice(bytes);
        Cow::Owned(self.scrub(automaton, held, false))
    }

    /// Returns what was held back at the end of a stream, with its secrets hidden.
    pub(crate) fn finish(&self, held: &mut Held) -> Vec<u8> {
        let scrubbed = self.automaton.as_ref().map(|automaton| self.scrub(automaton, held, true));
        *held = Held::default();
        scrubbed.unwrap_or_default()
    }

    /// Hides the secrets in a text.
    pub(crate) fn text(&self, text: String) -> String {
        let Some(automaton) = &self.automaton else { return text };
        if !automaton.is_match(&Joined::new(text.as_bytes()).bytes) {
            return text;
        }
        let mut held = Held { bytes: text.into_bytes(), shown: 0 };
        String::from_utf8_lossy(&self.scrub(automaton, &mut held, true)).into_owned()
    }

    fn scrub(&self, automaton: &AhoCorasick, held: &mut Held, is_end: bool) -> Vec<u8> {
        let joined = Joined::new(&held.bytes);
        let undecided = |from| if is_end { joined.bytes.len() } else { self.undecided(&joined.bytes, from) };
        let mut limit = undecided(0);
        let mut scrubbed = Vec::with_capacity(held.bytes.len());
        // Positions in what is held, and in the joined bytes.
        let (mut done, mut joined_done) = (held.shown, 0);
        let mut last = None;
        for found in automaton.find_iter(&joined.bytes).take_while(|found| found.start() < limit) {
            let (begin, end) = (joined.positions[found.start()], joined.positions[found.end() - 1] + 1);
            let between = held.bytes.get(done..begin).unwrap_or_default();
            scrubbed.extend_from_slice(between);
            let replacement = &self.replacements[found.pattern()];
            // Neighbours are one.
            if last != Some(replacement) || !between.is_empty() {
                scrubbed.extend_from_slice(replacement.as_bytes());
            }
            last = Some(replacement);
            (done, joined_done) = (done.max(end), found.end());
        }
        if joined_done > limit {
            // What was undecided may have been the end of what was found.
            limit = undecided(joined_done);
        }
        let mut end = joined.positions.get(limit).copied().unwrap_or(held.bytes.len());
        // A line that ends with so little of a secret need not wait for the next one.
        let few = joined.positions.get(limit + Self::SHORTEST - 1).copied().unwrap_or(held.bytes.len());
        let is_ended = held.bytes[end..few].iter().rposition(|byte| is_line_end(*byte));
        let kept = end;
        if let Some(line_end) = is_ended {
            end += line_end + 1;
        }
        let end = end.max(done);
        scrubbed.extend_from_slice(&held.bytes[done..end]);
        held.bytes.drain(..kept);
        held.shown = end - kept;
        scrubbed
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

impl Joined {
    fn new(bytes: &[u8]) -> Self {
        let kept = bytes.iter().enumerate().filter(|(_, byte)| !is_line_end(**byte));
        let (positions, bytes) = kept.map(|(position, byte)| (position, *byte)).unzip();
        Self { bytes, positions }
    }
}

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// Returns the parts of a value that are hidden by themselves.
fn parts(value: &[u8]) -> Vec<Cow<'_, [u8]>> {
    let whole = value.trim_ascii();
    let mut parts = vec![Cow::Borrowed(whole)];
    let lines = value.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    parts.extend(lines.filter(|line| line.len() >= Scrubber::SHORTEST_LINE).map(Cow::Borrowed));
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
    let is_long_enough = |part: &Cow<'_, [u8]>| part.len() >= Scrubber::SHORTEST;
    parts.into_iter().filter(is_long_enough).flat_map(pieces).collect()
}

/// Cuts a part that is too long to be hidden in one piece.
///
/// The length of a piece is divisible by three, so that base64 of the whole has that of each piece.
fn pieces(part: Cow<'_, [u8]>) -> Vec<Cow<'_, [u8]>> {
    const PIECE: usize = Scrubber::LONGEST / 3 * 3;
    if part.len() <= Scrubber::LONGEST {
        return vec![part];
    }
    part.chunks(PIECE).map(|piece| Cow::Owned(piece.to_vec())).collect()
}

impl fmt::Debug for Scrubber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrubber")
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};

    use super::*;

    const VALUE: &str = "s3cr3t/v+lue=&ü 2";

    /// Takes in a text in chunks of one length.
    fn scrubbed(scrubber: &Scrubber, text: &[u8], length: usize) -> String {
        let mut held = Held::default();
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
        let every: String = VALUE.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for (text, expected) in [
            (format!("a {VALUE} b"), "a [secret token] b"),
            (format!("a {VALUE}{VALUE}"), "a [secret token]"),
            (format!("a {VALUE} {VALUE}"), "a [secret token] [secret token]"),
            (format!("a {}", encoded(VALUE)), "a [secret token]"),
            (format!("a {}", encoded(&format!("x{VALUE}"))), "a eH[secret token]"),
            (format!("a {}", encoded(&format!("xy{VALUE}"))), "a eHl[secret token]"),
            (format!("a {form}&b"), "a [secret token]&b"),
            (format!("a {}&b", form.to_ascii_lowercase()), "a [secret token]&b"),
            (format!("a {}", form.replace('+', "%20").replace("%2F", "/")), "a [secret token]"),
            (format!("a {every}"), "a [secret token]"),
            ("a s3cr3t/v+lue=&".to_owned(), "a s3cr3t/v+lue=&"),
            ("a s3cr3s3cr3t".to_owned(), "a s3cr3s3cr3t"),
        ] {
            for length in 1..=text.len() {
                let shown = scrubbed(&scrubber, text.as_bytes(), length);
                // Neighbours are one only if they arrive together.
                let shown = shown.replace("[secret token][secret token]", "[secret token]");
                assert_eq!(shown, expected, "{text} by {length}");
            }
            assert_eq!(scrubber.text(text.clone()), expected, "{text}");
        }
    }

    #[test]
    fn a_value_is_hidden_wherever_lines_break_it() {
        let key: String = (0..120).map(|line| format!("{line:04}-{}\n", line * 7919 % 1013)).collect();
        let scrubber = Scrubber::new([("key", key.as_bytes())]);
        for prefix in ["", "t", "t:", "t: ", "token: "] {
            let encoded = BASE64_STANDARD.encode(format!("{prefix}{key}"));
            for width in [1, 3, 5, 20, 64, 76] {
                let lines: Vec<String> = encoded
                    .as_bytes()
                    .chunks(width)
                    .map(|line| String::from_utf8_lossy(line).into_owned())
                    .collect();
                let text = lines.join("\n");
                for length in [1, 7, 4096] {
                    let shown = scrubbed(&scrubber, text.as_bytes(), length);
                    let rest = shown.replace("[secret key]", "").replace('\n', "");
                    assert!(
                        rest.len() <= prefix.len() * 2 + 8,
                        "{width} by {length} after {prefix:?}: {shown}"
                    );
                }
            }
        }
        assert_eq!(scrubbed(&scrubber, key.as_bytes(), 10), "[secret key]\n");
    }

    #[test]
    fn a_line_does_not_wait_for_the_next_one() {
        let scrubber = Scrubber::new([("token", VALUE.as_bytes())]);
        let mut held = Held::default();
        assert_eq!(&*scrubber.take(&mut held, b"ends with s3c\n"), b"ends with s3c\n");
        assert_eq!(&*scrubber.take(&mut held, b"next\n"), b"next\n");
        assert_eq!(&*scrubber.take(&mut held, b"s3c\n"), b"s3c\n");
        let rest = &VALUE.as_bytes()[3..];
        assert_eq!(&*scrubber.take(&mut held, rest), b"[secret token]", "the rest is hidden all the same");
        assert_eq!(scrubber.finish(&mut held), b"");
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
    fn a_scrubber_without_secrets_changes_nothing() {
        let scrubber = Scrubber::new([("short", &b"abc"[..])]);
        assert_eq!(scrubbed(&scrubber, b"abc abc", 2), "abc abc");
        assert_eq!(format!("{scrubber:?}"), "Scrubber");
    }
}
