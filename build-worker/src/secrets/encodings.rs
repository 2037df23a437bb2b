//! The forms in which programs print a text.

use std::{collections::BTreeSet, fmt::Write};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};
use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, percent_encode};

/// Characters that URLs must encode.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// Characters that programs encode, from all but letters and digits to those that no URL may have.
const SETS: [&AsciiSet; 5] = [
    NON_ALPHANUMERIC,
    RESERVED,
    &RESERVED.remove(b'/'),
    &RESERVED.remove(b'!').remove(b'\'').remove(b'(').remove(b')').remove(b'*'),
    // As `encodeURI`.
    &CONTROLS
        .add(b' ')
        .add(b'"')
        .add(b'<')
        .add(b'>')
        .add(b'%')
        .add(b'\\')
        .add(b'^')
        .add(b'`')
        .add(b'{')
        .add(b'|')
        .add(b'}'),
];

/// Adds a text in all its forms.
pub(super) fn add(text: &[u8], forms: &mut BTreeSet<Vec<u8>>) {
    forms.insert(text.to_vec());
    for engine in [&BASE64_STANDARD_NO_PAD, &BASE64_URL_SAFE_NO_PAD] {
        for before in 0..3 {
            // Characters that depend on what stands before or after are left out.
            let encoded = engine.encode([&vec![0; before], text].concat());
            let begin = (before * 8).div_ceil(6);
            let end = (before + text.len()) * 8 / 6;
            // With the padding, if nothing comes after it.
            let rest = encoded.get(begin..).unwrap_or_default();
            forms.extend(["", "=", "=="].map(|padding| format!("{rest}{padding}").into_bytes()));
            forms.insert(encoded.get(begin..end).unwrap_or_default().into());
        }
    }
    for set in SETS {
        let encoded = percent_encode(text, set).to_string();
        let lower = lower_hexadecimal(&encoded);
        for encoded in [encoded, lower] {
            forms.insert(encoded.replace("%20", "+").into_bytes());
            forms.insert(encoded.into_bytes());
        }
    }
    let every = text.iter().fold(String::new(), |mut all, byte| {
        // Writing to a String cannot fail.
        let _ = write!(all, "%{byte:02X}");
        all
    });
    forms.insert(every.to_ascii_lowercase().into_bytes());
    forms.insert(every.into_bytes());
    if let Ok(text) = std::str::from_utf8(text) {
        let json = serde_json::Value::from(text).to_string();
        forms.insert(json.trim_matches('"').into());
        let html =
            text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
        forms.insert(html.replace('\'', "&#39;").into_bytes());
        forms.insert(html.into_bytes());
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
