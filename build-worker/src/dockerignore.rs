//! `.dockerignore` files: which paths of a context the engine does not get.
//!
//! The rules are those of docker's `patternmatcher`: Go's `filepath.Match` with `**`, exceptions, and the
//! last matching line wins.

use std::fmt::Write;

use regex::Regex;

/// The patterns of a file, in order.
#[derive(Debug, Default)]
pub(crate) struct DockerIgnore(Vec<Pattern>);

#[derive(Debug)]
struct Pattern {
    regex: Regex,
    is_exception: bool,
}

impl DockerIgnore {
    /// Parses the text of a file.
    ///
    /// # Errors
    ///
    /// Returns the rule that a line violates.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut patterns = Vec::new();
        for line in text.trim_start_matches('\u{feff}').lines() {
            let pattern = line.trim();
            if line.starts_with('#') || pattern.is_empty() {
                continue;
            }
            let (is_exception, pattern) = match pattern.strip_prefix('!') {
                Some(pattern) => (true, pattern.trim()),
                None => (false, pattern),
            };
            if pattern.is_empty() {
                return Err(format!(".dockerignore: `{line}` excepts nothing"));
            }
            let cleaned = clean(pattern);
            let regex = translated(&cleaned).and_then(|text| Regex::new(&text).ok());
            let regex = regex.ok_or_else(|| format!(".dockerignore: `{line}` is no valid pattern"))?;
            patterns.push(Pattern { regex, is_exception });
        }
        Ok(Self(patterns))
    }

    /// Reports whether a path is excluded. It is relative, without `.` and `..`.
    pub(crate) fn excludes(&self, path: &str) -> bool {
        let ends = path.match_indices('/').map(|(end, _)| end);
        let prefixes: Vec<&str> = std::iter::once(path.len()).chain(ends).map(|end| &path[..end]).collect();
        let mut is_excluded = false;
        for pattern in &self.0 {
            // Nothing changes what is so already.
            if pattern.is_exception == is_excluded
                && prefixes.iter().any(|prefix| pattern.regex.is_match(prefix))
            {
                is_excluded = !pattern.is_exception;
            }
        }
        is_excluded
    }
}

/// Returns the shortest path that is equivalent, as Go's `filepath.Clean` does, and without a leading slash.
fn clean(path: &str) -> String {
    let is_absolute = path.starts_with('/');
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." if names.last().is_some_and(|last| *last != "..") => {
                names.pop();
            }
            ".." if is_absolute => {}
            name => names.push(name),
        }
    }
    match (names.is_empty(), is_absolute) {
        (true, true) => "/".to_owned(),
        (true, false) => ".".to_owned(),
        (false, _) => names.join("/"),
    }
}

/// Translates a pattern to a regular expression; returns `None` if it is malformed.
fn translated(pattern: &str) -> Option<String> {
    let mut regex = String::from("(?s)^");
    let mut rest = pattern.chars().peekable();
    while let Some(character) = rest.next() {
        match character {
            '*' if rest.peek() == Some(&'*') => {
                rest.next();
                rest.next_if_eq(&'/');
                regex.push_str(if rest.peek().is_none() { ".*" } else { "(.*/)?" });
            }
            '*' => regex.push_str("[^/]*"),
            '?' => regex.push_str("[^/]"),
            '\\' => push_literal(&mut regex, rest.next()?),
            '[' => {
                regex.push('[');
                if rest.next_if_eq(&'^').is_some() {
                    regex.push('^');
                }
                push_class(&mut regex, &mut rest)?;
            }
            character => push_literal(&mut regex, character),
        }
    }
    regex.push('$');
    Some(regex)
}

/// Translates the ranges of a class, of which there is at least one, and its end.
fn push_class(regex: &mut String, rest: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<()> {
    let mut is_first = true;
    loop {
        let mut bound = || match rest.next()? {
            '\\' => rest.next(),
            '-' => None,
            character => Some(character),
        };
        let low = bound()?;
        if low == ']' && !is_first {
            regex.push(']');
            return Some(());
        }
        if low == ']' {
            return None;
        }
        is_first = false;
        push_literal(regex, low);
        if rest.next_if_eq(&'-').is_some() {
            let high = match rest.next()? {
                '\\' => rest.next()?,
                ']' | '-' => return None,
                character => character,
            };
            regex.push('-');
            push_literal(regex, high);
        }
    }
}

/// Writes a character that stands for itself, also within a class.
fn push_literal(regex: &mut String, character: char) {
    // Writing to a String cannot fail.
    let _ = write!(regex, "\\x{{{:x}}}", u32::from(character));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_docker_has_them() {
        for (text, path, is_excluded) in [
            ("", "a", false),
            ("# a\n\n", "a", false),
            ("a", "a", true),
            ("a", "a/b", true),
            ("a", "b/a", false),
            ("a", "ab", false),
            ("/a/", "a/b", true),
            ("./a", "a", true),
            ("a/../b", "b", true),
            ("*", "a/b", true),
            ("*/b", "a/b", true),
            ("*/b", "b", false),
            ("*.pem", "a.pem", true),
            ("*.pem", "a/b.pem", false),
            ("**/*.pem", "a/b.pem", true),
            ("**/*.pem", "b.pem", true),
            ("**", "a/b", true),
            ("a/**", "a/b/c", true),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/b/b/c", true),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("a.b", "aXb", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("é?", "éü", true),
            ("*\n!a", "a", false),
            ("*\n!a", "a/b", false),
            ("*\n!a/b", "a/b", false),
            ("*\n!a/b", "a/c", true),
            ("!a\na", "a", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", true),
            ("*.md\n!README*.md\nREADME-secret.md", "README.md", false),
            ("\u{feff}a", "a", true),
            (" a ", "a", true),
            (" # a", "# a", true),
            ("! a", "b", false),
        ] {
            let ignore = DockerIgnore::parse(text).expect(text);
            assert_eq!(ignore.excludes(path), is_excluded, "{text:?} {path}");
        }
        for bad in ["!", "a[", "a[]", "[a-", "a\\", "[-a]"] {
            assert!(DockerIgnore::parse(bad).is_err(), "{bad}");
        }
    }
}
