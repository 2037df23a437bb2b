//! `.dockerignore` files: which paths of a context the engine does not get.
//!
//! The rules are those of moby's `patternmatcher`. The last matching line wins.

use self::pattern::{Paths, is_valid};

mod pattern;

/// The patterns of a file, in order.
#[derive(Debug, Default)]
pub(crate) struct DockerIgnore(Vec<Pattern>);

#[derive(Debug)]
struct Pattern {
    paths: Paths,
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
            if pattern.contains(['\t', '\r', '\0']) {
                return Err(format!(".dockerignore: {line:?} has a control character"));
            }
            let cleaned = clean(pattern);
            if is_exception && cleaned == "/" {
                return Err(format!(".dockerignore: `{line}` excepts nothing"));
            }
            let paths = is_valid(&cleaned).then(|| Paths::parse(&cleaned));
            let paths = match paths {
                // Docker fails only when it tries the exception.
                Some(None) if is_exception => Some(Paths::Nothing),
                paths => paths.flatten(),
            };
            let paths = paths.ok_or_else(|| format!(".dockerignore: `{line}` is no valid pattern"))?;
            patterns.push(Pattern { paths, is_exception });
        }
        Ok(Self(patterns))
    }

    /// Reports whether docker sends a file without its content: an exception applies to it, but not once the
    /// patterns are tried on the file alone.
    pub(crate) fn blanks(&self, path: &str) -> bool {
        let prefixes = || path.match_indices('/').map(|(end, _)| &path[..end]).chain([path]);
        let mut is_excluded = false;
        for pattern in &self.0 {
            if pattern.is_exception == is_excluded && prefixes().any(|prefix| pattern.paths.contain(prefix)) {
                is_excluded = !pattern.is_exception;
            }
        }
        is_excluded
    }

    /// Reports whether a path is excluded. It is relative, without `.` and `..`.
    pub(crate) fn excludes(&self, path: &str) -> bool {
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        // The patterns that match the directory, and therefore all that is below.
        let mut matching = vec![false; self.0.len()];
        let mut is_excluded = false;
        for end in ends {
            is_excluded = false;
            for (pattern, matches) in self.0.iter().zip(&mut matching) {
                // A pattern that would change nothing is not tried, and does not count for what is below.
                *matches =
                    *matches || pattern.is_exception == is_excluded && pattern.paths.contain(&path[..end]);
                if *matches {
                    is_excluded = !pattern.is_exception;
                }
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
            // A pattern that begins with two asterisks and has no other wildcard is the end of a path.
            ("**.key", "a.key", true),
            ("**.key", "a/b.key", true),
            ("**/b", "b", true),
            ("**/b", "a/b/c", true),
            ("**/b", "ab", false),
            ("**.k*", "a.key", false),
            ("**.k*", "a/.key", true),
            ("a**", "ab/c", true),
            ("a**", "ba", false),
            ("a**b", "a/x/b", true),
            ("a**b", "axb", false),
            ("[[:alpha:]]x", "ax", true),
            ("[[:alpha:]]x", "1x", false),
            ("[^[:alpha:]_]x", "1x", true),
            ("[a[]x", "[x", true),
            ("[a&&b]x", "&x", true),
            ("\\d", "7", true),
            ("\\d", "d", false),
            ("[\\w]x", "ax", true),
            ("a]", "a]", true),
            ("a^b", "a^b", true),
            ("a^b?", "a^bc", false),
            ("sub/*|b", "x/b", true),
            ("a|b", "a|b", true),
            ("?{2}", "ab", true),
            ("*{log,tmp}", "a{log,tmp}", true),
            ("{{x}}*", "{{x}}y", true),
            ("\\w*", "é", false),
            // A wildcard within brackets ends them, as they are translated.
            ("[*]x", "*x", false),
            ("[*]x", "/]x", true),
            ("[a*]b", "ab", false),
            // An exception counts for what is below a directory only if the directory was excluded before.
            ("**/.env\n!config", "config/.env", true),
            ("**/.env\n!config", "config/a", false),
            ("dir/*\n!dir", "dir/a", true),
            ("dir/**\n!dir", "dir/a/b", true),
            ("dir\n!dir", "dir/a", false),
            ("*\n!dir", "dir/a", false),
            ("*\n!dir\ndir/sub/a\n!dir/sub", "dir/sub/a", true),
            ("dir/sub/a\n!dir/*", "dir/sub/a", true),
            ("**/a\n!**/sub", "x/sub/a", true),
            ("node_modules\n**/*.js\n!src/node_modules", "src/node_modules/a.js", true),
            ("*.log\n!logs/*.log", "logs/a.log", false),
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
        let blank = DockerIgnore::parse("*\n!a/bar\na").expect("patterns");
        assert_eq!([blank.excludes("a/bar"), blank.blanks("a/bar")], [false, true]);
        let whole = DockerIgnore::parse("*\n!a/bar").expect("patterns");
        assert_eq!([whole.excludes("a/bar"), whole.blanks("a/bar")], [false, false]);
        assert_eq!(DockerIgnore::parse("![z-a]x").expect("an exception").0.len(), 1);
        for bad in [
            "*{2}",
            "a\rb",
            "!/",
            "*\n!//",
            "\\é",
            "!",
            "a[",
            "a[]",
            "[a-",
            "a\\",
            "[-a]",
            "[]a]",
            "\\i",
            "[z-a]",
            "[[:letter:]]",
            "[[:alpha:]",
        ] {
            assert!(DockerIgnore::parse(bad).is_err(), "{bad}");
        }
    }
}
