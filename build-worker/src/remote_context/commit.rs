//! A commit as Git lists it: its files, their number and size, and its submodules.

use std::{
    collections::HashMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// The files that a context may still have.
#[derive(Debug)]
pub(super) struct Limits {
    bytes: u64,
    entries: usize,
}

/// A submodule at its place in a repository.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Submodule {
    pub(super) path: PathBuf,
    /// ID of its commit.
    pub(super) commit: String,
    /// URL from `.gitmodules`; may be relative.
    pub(super) url: String,
}

impl Limits {
    /// Maximum size of all files, in bytes.
    const MAX_BYTES: u64 = 1024 * 1024 * 1024;
    /// Maximum number of files and directories.
    const MAX_ENTRIES: usize = 250_000;

    /// Counts the files in the output of `git ls-tree -r -t -l -z`, and returns the submodules, without their
    /// URLs.
    ///
    /// # Errors
    ///
    /// Returns the violated rule if there are too many files, they are too large, or the output cannot be
    /// understood.
    pub(super) fn count(&mut self, listed: &[u8]) -> Result<Vec<Submodule>, String> {
        let mut submodules = Vec::new();
        for record in records(listed) {
            let (kind, id, size, path) = entry(record).ok_or("has a listing that cannot be understood")?;
            self.entries = self
                .entries
                .checked_sub(1)
                .ok_or_else(|| format!("has more than {} files and directories", Self::MAX_ENTRIES))?;
            self.bytes = self
                .bytes
                .checked_sub(size)
                .ok_or_else(|| format!("has files of more than {} MiB", Self::MAX_BYTES / 1024 / 1024))?;
            if kind == "commit" {
                submodules.push(Submodule {
                    path: path.to_owned(),
                    commit: id.to_owned(),
                    url: String::new(),
                });
            }
        }
        Ok(submodules)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: Self::MAX_BYTES, entries: Self::MAX_ENTRIES }
    }
}

/// Returns the kind, the ID, the size and the path of an entry: `MODE KIND ID SIZE<tab>PATH`.
fn entry(record: &[u8]) -> Option<(&str, &str, u64, &Path)> {
    let tab = record.iter().position(|byte| *byte == b'\t')?;
    let (before, path) = record.split_at(tab);
    let mut fields = std::str::from_utf8(before).ok()?.split_ascii_whitespace().skip(1);
    let (kind, id, size) = (fields.next()?, fields.next()?, fields.next()?);
    let size = if size == "-" { 0 } else { size.parse().ok()? };
    Some((kind, id, size, Path::new(OsStr::from_bytes(&path[1..]))))
}

/// Returns the URLs of submodules by their paths, from the output of `git config -z --list` for a
/// `.gitmodules`.
///
/// The last value of a key wins. Names without a path or a URL are left out.
pub(super) fn submodule_urls(listed: &[u8]) -> HashMap<PathBuf, String> {
    let (mut paths, mut urls) = (HashMap::new(), HashMap::new());
    for record in records(listed) {
        let Some(end) = record.iter().position(|byte| *byte == b'\n') else { continue };
        let (key, value) = (&record[..end], &record[end + 1..]);
        let Some(key) = key.strip_prefix(b"submodule.") else { continue };
        if let Some(name) = key.strip_suffix(b".path") {
            paths.insert(name, PathBuf::from(OsStr::from_bytes(value)));
        } else if let Some(name) = key.strip_suffix(b".url") {
            urls.insert(name, String::from_utf8_lossy(value).into_owned());
        }
    }
    let url_of = |(name, path)| Some((path, urls.remove(name)?));
    paths.into_iter().filter_map(url_of).collect()
}

/// Returns the parts of a text that NUL ends.
fn records(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == 0).filter(|record| !record.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_and_submodules_found() {
        let listed = b"040000 tree aa       -\td\x00100644 blob bb       3\td/f\x00160000 commit cc       -\td/m x\x00";
        let mut limits = Limits::default();
        let submodule = Submodule { path: "d/m x".into(), commit: "cc".to_owned(), url: String::new() };
        assert_eq!(limits.count(listed), Ok(vec![submodule]));
        assert_eq!((limits.bytes, limits.entries), (Limits::MAX_BYTES - 3, Limits::MAX_ENTRIES - 3));
        assert!(Limits { bytes: 2, ..Limits::default() }.count(listed).is_err());
        assert!(Limits { entries: 2, ..Limits::default() }.count(listed).is_err());
        assert!(limits.count(b"100644 blob\tx\x00").is_err());
        assert_eq!(limits.count(b""), Ok(vec![]));
    }

    #[test]
    fn a_submodule_is_known_by_its_path() {
        let listed = b"submodule.a.b.path\nlib/a\x00submodule.a.b.url\n../a.git\x00submodule.a.b.update\n!sh\x00submodule.c.url\nx\x00core.bare\nfalse\x00broken\x00";
        let expected = HashMap::from([(PathBuf::from("lib/a"), "../a.git".to_owned())]);
        assert_eq!(submodule_urls(listed), expected);
    }
}
