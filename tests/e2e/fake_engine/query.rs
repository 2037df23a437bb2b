//! Decoding of the paths and queries of requests.

use std::collections::BTreeMap;

/// Splits a prefix like `/v1.45` from a path; returns the version, if there is one, and the rest.
pub(super) fn split_version(path: &str) -> (Option<&str>, &str) {
    let versioned = path.strip_prefix("/v").filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    match versioned.and_then(|rest| Some((rest, rest.find('/')?))) {
        Some((rest, slash)) => (Some(&rest[..slash]), &rest[slash..]),
        None => (None, path),
    }
}

/// Returns the parameters of a query. The first of several with the same name counts.
pub(super) fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut parameters = BTreeMap::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = value.replace('+', " ");
        parameters.entry(decode(&key.replace('+', " "))).or_insert_with(|| decode(&value));
    }
    parameters
}

/// Returns the text with percent-encoding such as `%2F` decoded.
pub(super) fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..2).filter(|_| *first == b'%');
        let code = code.and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
