//! The files of a context that decide about its build: the Dockerfile, and the `.dockerignore` file that counts for it.

use std::{
    collections::{BTreeMap, VecDeque},
    io::Read,
    path::{Component, Path, PathBuf},
};

use tar::Archive;

use crate::context_archive::{ArchiveError, kind_of, plain};

#[cfg(test)]
mod tests;

/// Name of the `.dockerignore` file that counts for any Dockerfile without one of its own.
const COMMON: &str = ".dockerignore";

/// The files of a context that decide about its build.
#[derive(Debug, Default)]
pub(crate) struct BuildFiles {
    /// Path of the Dockerfile.
    pub(crate) path: PathBuf,
    /// Content of the Dockerfile; `None` if there is none.
    pub(crate) dockerfile: Option<Vec<u8>>,
    /// Text of the `.dockerignore` file; empty if there is none.
    pub(crate) ignore: String,
    /// Targets of hard links, each with all of its links, in order.
    pub(crate) hard_links: BTreeMap<PathBuf, Vec<PathBuf>>,
}

/// Symbolic and hard links by their paths; the targets of hard links are absolute.
type Links = BTreeMap<PathBuf, PathBuf>;

/// Finds the Dockerfile at `path` in a tar, and the `.dockerignore` file that counts for it; either may be a link.
///
/// `reopen` opens the tar from its beginning.
///
/// # Errors
///
/// Returns [`ArchiveError::Refused`] if one of the files is too large, and [`ArchiveError::Io`] if the tar cannot be
/// read.
pub(crate) fn build_files<R: Read>(
    reopen: impl Fn() -> Archive<R>,
    path: &str,
) -> Result<BuildFiles, ArchiveError> {
    let path = plain(Path::new(path));
    let of = |dockerfile: &Path| PathBuf::from(format!("{}.dockerignore", dockerfile.display()));
    // As docker does, for this name only.
    let lower_case = path.ends_with("Dockerfile").then(|| path.with_file_name("dockerfile"));
    let paths = || std::iter::once(&path).chain(&lower_case);
    let common = PathBuf::from(COMMON);
    let names: Vec<PathBuf> =
        paths().flat_map(|path| [path.clone(), of(path)]).chain([common.clone()]).collect();

    let mut hard_links: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    let mut links = Links::new();
    let mut contents = BTreeMap::new();
    for entry in reopen().entries()? {
        let mut entry = entry?;
        let kind = kind_of(&entry);
        let found = plain(&entry.path()?);
        // Of entries with one path, the last one counts.
        links.remove(&found);
        contents.remove(&found);
        if kind.is_symlink() {
            let target = entry.link_name()?.unwrap_or_default().into_owned();
            links.insert(found, target);
        } else if kind.is_hard_link() {
            let target = plain(&entry.link_name()?.unwrap_or_default());
            links.insert(found.clone(), Path::new("/").join(&target));
            hard_links.entry(target).or_default().push(found);
        } else if kind.is_file() && names.contains(&found) {
            let content = content(&found, &mut entry)?;
            contents.insert(found, content);
        }
    }

    let find = |name: &Path| match contents.get(name) {
        Some(content) => Ok(Some(content.clone())),
        None => resolved(&links, name).map_or(Ok(None), |target| file_at(&reopen, &target)),
    };
    let mut found = None;
    for path in paths() {
        if let Some(content) = find(path)? {
            found = Some((path.clone(), content));
            break;
        }
    }
    let (path, dockerfile) = match found {
        Some((path, content)) => (path, Some(content)),
        None => (path, None),
    };
    let ignore = match find(&of(&path))? {
        Some(ignore) => ignore,
        None => find(&common)?.unwrap_or_default(),
    };
    let ignore = String::from_utf8_lossy(&ignore).into_owned();
    Ok(BuildFiles { path, dockerfile, ignore, hard_links })
}

/// Follows the links on the way to `name`; returns `None` if there are none, or too many.
fn resolved(links: &Links, name: &Path) -> Option<PathBuf> {
    /// Maximum number of links that lead to a file.
    const MAX_LINKS: usize = 40;
    let mut followed = 0;
    let mut path = PathBuf::new();
    let mut rest: VecDeque<PathBuf> =
        name.components().map(|component| component.as_os_str().into()).collect();
    while let Some(component) = rest.pop_front() {
        match component.components().next() {
            Some(Component::Normal(name)) => path.push(name),
            Some(Component::ParentDir) => {
                path.pop();
                continue;
            }
            Some(Component::CurDir | Component::RootDir | Component::Prefix(_)) | None => continue,
        }
        let Some(target) = links.get(&path) else { continue };
        followed += 1;
        if followed > MAX_LINKS {
            return None;
        }
        // Nothing outside of the context is read; docker, too, looks at absolute targets within it.
        if target.is_absolute() {
            path.clear();
        } else {
            path.pop();
        }
        for component in target.components().rev() {
            rest.push_front(component.as_os_str().into());
        }
    }
    (followed > 0).then_some(path)
}

/// Returns the content of a file of a tar, if it is there.
fn file_at<R: Read>(reopen: &impl Fn() -> Archive<R>, path: &Path) -> Result<Option<Vec<u8>>, ArchiveError> {
    let mut last = None;
    for entry in reopen().entries()? {
        let mut entry = entry?;
        if kind_of(&entry).is_file() && plain(&entry.path()?) == path {
            last = Some(content(path, &mut entry)?);
        }
    }
    Ok(last)
}

/// Returns the content of a file.
///
/// # Errors
///
/// Returns [`ArchiveError::Refused`] if it has more than 4 MiB, and [`ArchiveError::Io`] if it cannot be read.
pub(crate) fn content(name: &Path, file: impl Read) -> Result<Vec<u8>, ArchiveError> {
    const MAX_MIB: u64 = 4;
    let mut bytes = Vec::new();
    let length = file.take((MAX_MIB << 20) + 1).read_to_end(&mut bytes)?;
    if length as u64 > MAX_MIB << 20 {
        let rule = format!("{}: must have at most {MAX_MIB} MiB", name.display());
        return Err(ArchiveError::Refused(rule));
    }
    Ok(bytes)
}

/// Returns the text of a Dockerfile.
///
/// # Errors
///
/// Returns [`ArchiveError::Refused`] if it is compressed or in UTF-16, which no engine reads.
pub(crate) fn dockerfile_text(bytes: &[u8]) -> Result<String, ArchiveError> {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
    const UTF_16: [&[u8]; 2] = [&[0xff, 0xfe], &[0xfe, 0xff]];
    if [GZIP, ZSTD].iter().chain(&UTF_16).any(|with| bytes.starts_with(with)) {
        let rule = "the Dockerfile is compressed or in UTF-16: it must be text in UTF-8";
        return Err(ArchiveError::Refused(rule.to_owned()));
    }
    Ok(String::from_utf8_lossy(bytes).into_owned())
}
