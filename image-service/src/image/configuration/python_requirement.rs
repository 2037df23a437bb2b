//! Requirements of Python packages, by the grammar of PEP 508: a name, extras, versions or a URL, and a marker.
//!
//! The parsers of markers that there are evaluate them, in a time and with a stack that grow with their text.

use std::str::FromStr as _;

use pep440_rs::VersionSpecifier;

/// The variables of the environment that a marker may compare.
const VARIABLES: [&str; 21] = [
    "python_version",
    "python_full_version",
    "os_name",
    "sys_platform",
    "platform_machine",
    "platform_python_implementation",
    "platform_release",
    "platform_system",
    "platform_version",
    "implementation_name",
    "implementation_version",
    "extra",
    "extras",
    "dependency_groups",
    // Their names in PEP 345, which pip still takes.
    "os.name",
    "sys.platform",
    "platform.machine",
    "platform.version",
    "platform.python_implementation",
    "python_implementation",
    "platform.system",
];

/// Reports whether a text is a requirement. Only spaces separate its words.
pub(super) fn is_requirement(text: &str) -> bool {
    let text = text.trim();
    let name_end = text.find(|c: char| !is_name_part(c)).unwrap_or(text.len());
    let (name, rest) = text.split_at(name_end);
    let rest = rest.trim_start();
    let (extras, rest) = match rest.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((extras, rest))) => (extras.trim(), rest.trim_start()),
        Some(None) => return false,
        None => ("", rest),
    };
    if !is_name(name) || !extras.is_empty() && !extras.split(',').all(|extra| is_name(extra.trim())) {
        return false;
    }
    if let Some(rest) = rest.strip_prefix('@') {
        // A semicolon may be part of the URL.
        let rest = rest.trim();
        let (url, marker) = rest.split_once(' ').unwrap_or((rest, ""));
        let marker = marker.trim();
        return is_url(url) && (marker.is_empty() || marker.strip_prefix(';').is_some_and(is_marker));
    }
    match rest.split_once(';') {
        Some((versions, marker)) => are_versions(versions) && is_marker(marker),
        None => are_versions(rest),
    }
}

fn is_name(name: &str) -> bool {
    let is_end = |c: char| c.is_ascii_alphanumeric();
    name.starts_with(is_end) && name.ends_with(is_end) && name.chars().all(is_name_part)
}

fn is_name_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

fn is_url(url: &str) -> bool {
    let is_scheme_part = |c: char| c.is_ascii_alphanumeric() || "+.-".contains(c);
    url.split_once("://").is_some_and(|(scheme, rest)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(is_scheme_part)
            && !rest.is_empty()
    })
}

/// Reports whether a text is versions, separated by commas; there may be none.
fn are_versions(text: &str) -> bool {
    let text = text.trim();
    let inner = text.strip_prefix('(').and_then(|text| text.strip_suffix(')'));
    match inner.unwrap_or(text).trim() {
        "" => inner.is_none(),
        versions => versions.split(',').all(|version| is_version(version.trim())),
    }
}

fn is_version(text: &str) -> bool {
    match text.strip_prefix("===") {
        // Arbitrary equality, with whatever is no version of PEP 440.
        Some(other) => {
            let other = other.trim_start();
            !other.is_empty() && !other.contains([' ', '(', ')', ';'])
        }
        None => VersionSpecifier::from_str(text).is_ok(),
    }
}

/// Reports whether a text is a marker: comparisons joined by `and` and `or`, with parentheses.
fn is_marker(text: &str) -> bool {
    let mut depth = 0_u32;
    let mut rest = text.trim_start();
    loop {
        while let Some(inner) = rest.strip_prefix('(') {
            depth += 1;
            rest = inner.trim_start();
        }
        let Some(behind) = after_value(rest).and_then(after_operator).and_then(after_value) else {
            return false;
        };
        rest = behind;
        while let Some(outer) = rest.strip_prefix(')').filter(|_| depth > 0) {
            depth -= 1;
            rest = outer.trim_start();
        }
        if rest.is_empty() {
            return depth == 0;
        }
        match after_word(rest, "and").or_else(|| after_word(rest, "or")) {
            Some(next) => rest = next,
            None => return false,
        }
    }
}

/// Returns what follows a variable or a quoted text.
fn after_value(text: &str) -> Option<&str> {
    if let Some(quote) = text.chars().next().filter(|c| matches!(c, '"' | '\'')) {
        let (_, behind) = text[1..].split_once(quote)?;
        return Some(behind.trim_start());
    }
    VARIABLES.iter().find_map(|variable| after_word(text, variable))
}

/// Returns what follows a comparison.
fn after_operator(text: &str) -> Option<&str> {
    const SYMBOLS: [&str; 8] = ["===", "<=", "!=", "==", ">=", "~=", "<", ">"];
    let symbol = SYMBOLS.iter().find_map(|symbol| text.strip_prefix(symbol));
    let symbol = symbol.map(str::trim_start);
    symbol
        .or_else(|| after_word(text, "in"))
        .or_else(|| after_word(text, "not").and_then(|text| after_word(text, "in")))
}

/// Returns what follows a word, which ends there.
fn after_word<'a>(text: &'a str, word: &str) -> Option<&'a str> {
    let behind = text.strip_prefix(word)?;
    let is_end = !behind.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.');
    is_end.then(|| behind.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requirement_is_what_pip_takes() {
        for text in [
            "a",
            "Django",
            "a-b.c_d",
            "a[b, c-d]",
            "a[]",
            "a (>= 1, < 2)",
            "a>=1,<2",
            "a ~= 1.4.2",
            "a!=1.*",
            "a==2.1.0+cpu",
            "a===1.0-custom_build",
            "a (===foobar, >= 1)",
            "a @ https://x.example/a-1.0-py3-none-any.whl",
            "a@git+ssh://git@x.example:o/r.git@v1",
            "a @ https://x.example/y;z",
            "a @ https://x.example/y ; python_version < \"3.12\"",
            "a; python_version < '3.12' and (sys_platform == 'linux' or os_name != \"nt\")",
            "a; 'linux' in sys_platform",
            "a; sys_platform not  in 'win32 cygwin'",
            "a; python_version === \"3.8\"",
            "a; \"x\" ~= sys_platform",
            "a; python_version <= \"3.18446744073709551615\"",
            "a; os.name == 'posix'",
            "a; 'x' in extras",
        ] {
            assert!(is_requirement(text), "{text}");
        }
        for text in [
            "",
            "-",
            "a-",
            "_a",
            "a_ >= 1",
            "a[b-]",
            "a[b,]",
            "a[b",
            "a()",
            "a>1,",
            "a=1",
            "a = 1",
            "a >= x",
            "a ===",
            "a b",
            "a @",
            "a @ x y",
            "a @ https://x/y z",
            "a @ https://x/y.whl >=1",
            "a;",
            "a; b",
            "a; b == 'c'",
            "a; python_version",
            "a; python_version < ",
            "a; python_version < 3.12",
            "a; python_version < '3.12' and",
            "a; (python_version < '3.12'",
            "a; python_version < '3.12')",
            "a; python_versions < '3'",
            "a; python_version not '3'",
            "a; python_version < '3",
        ] {
            assert!(!is_requirement(text), "{text}");
        }
    }

    #[test]
    fn a_marker_takes_no_longer_than_its_text() {
        let many: Vec<String> = (0..40).map(|i| format!("(extra=='e{i}' or extra!='f{i}')")).collect();
        assert!(is_requirement(&format!("a; {}", many.join(" and "))));
        assert!(!is_requirement(&format!("a;{}", "(".repeat(1_000))));
        let nested = |depth| format!("a; {}os_name == 'x'{}", "(".repeat(depth), ")".repeat(depth));
        assert!(is_requirement(&nested(400)));
    }

    #[test]
    fn no_requirement_makes_the_parser_panic() {
        const PARTS: [&str; 40] = [
            "a",
            "b-",
            "-",
            "_",
            ".",
            "[",
            "]",
            ",",
            "(",
            ")",
            "@",
            " @ ",
            "https://x/y",
            ";",
            " ; ",
            "python_version",
            "'",
            "\"",
            "'3'",
            "==",
            "===",
            "!=",
            ">=",
            "<",
            "~=",
            "*",
            "1.0",
            "1!2",
            "+l",
            "and",
            "or",
            "not",
            "in",
            " ",
            "é",
            "extra",
            "#",
            "$",
            "{",
            "git+ssh://",
        ];
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let parts = std::iter::repeat_with(|| PARTS[random.usize(0..PARTS.len())]).take(8);
            let text: String = parts.collect();
            let _ = is_requirement(&text);
        }
    }
}
