//! The archives of contexts as the engine gets them: in one format, owned by root, and without what
//! `.dockerignore` excludes.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use tar::{Archive, Builder, Entry, EntryType, Header};

use crate::dockerignore::DockerIgnore;

#[cfg(test)]
mod tests;

/// Name of the `.dockerignore` file that counts for any Dockerfile without one of its own.
const COMMON: &str = ".dockerignore";

/// The compression of a tar.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
}

/// The files of a context that decide about its build.
#[derive(Debug, Default)]
pub(crate) struct BuildFiles {
    /// First MiB of the Dockerfile; empty if there is none.
    pub(crate) dockerfile: Vec<u8>,
    /// Text of the `.dockerignore` file; empty if there is none.
    pub(crate) ignore: String,
    /// Targets of hard links, each with all of its links, in order.
    pub(crate) hard_links: BTreeMap<PathBuf, Vec<PathBuf>>,
}

/// The reason why an archive cannot be given to the engine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// A violation that the author of the context has to fix.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Compression {
    /// Number of bytes from which a compression is recognised.
    pub(crate) const PREFIX: usize = 512;

    /// Recognises a tar by the first bytes of a file; returns `None` if it is none, or compressed in another
    /// way.
    pub(crate) fn of_tar(prefix: &[u8]) -> Option<Self> {
        const GZIP: &[u8] = &[0x1f, 0x8b];
        if prefix.starts_with(GZIP) {
            return Some(Self::Gzip);
        }
        let mut header = Header::new_old();
        let bytes = prefix.get(..Self::PREFIX)?;
        header.as_mut_bytes().copy_from_slice(bytes);
        // The digits of the sum itself count as spaces.
        let sum = bytes.iter().enumerate();
        let sum = sum.map(|(i, byte)| if (148..156).contains(&i) { 32 } else { u32::from(*byte) });
        (header.cksum().ok() == Some(sum.sum())).then_some(Self::None)
    }
}

/// Opens a tar.
pub(crate) fn open<'a>(tar: impl Read + 'a, compression: Compression) -> Archive<Box<dyn Read + 'a>> {
    Archive::new(match compression {
        Compression::None => Box::new(tar),
        Compression::Gzip => Box::new(MultiGzDecoder::new(tar)),
    })
}

/// Finds the Dockerfile at `path` in a tar, and the `.dockerignore` file that counts for it, which may be a symbolic link.
///
/// `reopen` opens the tar from its beginning.
///
/// # Errors
///
/// Returns an error if the tar cannot be read.
pub(crate) fn build_files<R: Read>(reopen: impl Fn() -> Archive<R>, path: &str) -> io::Result<BuildFiles> {
    let path = plain(Path::new(path));
    let of_dockerfile = PathBuf::from(format!("{}.dockerignore", path.display()));
    let mut files = BuildFiles::default();
    let mut links = BTreeMap::new();
    let (mut own, mut common) = (None, None);
    for entry in reopen().entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        let found = plain(&entry.path()?);
        if kind.is_symlink() {
            let target = entry.link_name()?.unwrap_or_default().into_owned();
            links.insert(found, target);
        } else if kind.is_hard_link() {
            let target = plain(&entry.link_name()?.unwrap_or_default());
            files.hard_links.entry(target).or_default().push(found);
        } else if !kind.is_file() {
            // A directory, or a device.
        } else if found == path {
            files.dockerfile = prefix(&mut entry)?;
        } else if found == of_dockerfile {
            own = Some(text(&mut entry)?);
        } else if found == Path::new(COMMON) {
            common = Some(text(&mut entry)?);
        }
    }
    let linked = |name: &Path| resolved(&links, name).map_or(Ok(None), |target| file_at(&reopen, &target));
    if own.is_none() {
        own = linked(&of_dockerfile)?;
    }
    if own.is_none() && common.is_none() {
        common = linked(Path::new(COMMON))?;
    }
    files.ignore = own.or(common).unwrap_or_default();
    Ok(files)
}

/// Follows the symbolic links of a tar from `name`, if that is one, to a path that is none.
fn resolved(links: &BTreeMap<PathBuf, PathBuf>, name: &Path) -> Option<PathBuf> {
    /// Maximum number of links that lead to a file.
    const MAX_LINKS: usize = 40;
    let mut path = links.contains_key(name).then(|| name.to_owned())?;
    for _ in 0..MAX_LINKS {
        let Some(target) = links.get(&path) else { return Some(path) };
        // Nothing outside of the context is read; docker, too, looks at absolute targets within it.
        let mut next =
            path.parent().filter(|_| !target.is_absolute()).unwrap_or_else(|| Path::new("")).to_owned();
        for component in target.components() {
            match component {
                Component::Normal(name) => next.push(name),
                Component::ParentDir => {
                    next.pop();
                }
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            }
        }
        path = next;
    }
    None
}

/// Returns the text of a file of a tar, if it is there.
fn file_at<R: Read>(reopen: &impl Fn() -> Archive<R>, path: &Path) -> io::Result<Option<String>> {
    for entry in reopen().entries()? {
        let mut entry = entry?;
        if entry.header().entry_type().is_file() && plain(&entry.path()?) == path {
            return text(&mut entry).map(Some);
        }
    }
    Ok(None)
}

/// Writes what the engine gets of a tar; a Dockerfile that is given as text replaces the tar's own.
///
/// The Dockerfile at `path` stays even if it is excluded, because the build reads it. A hard link to an excluded file
/// takes its place.
///
/// # Errors
///
/// Returns an error if the tar cannot be read or the result cannot be written.
pub(crate) fn write(
    tar: &mut Archive<impl Read>,
    ignore: &DockerIgnore,
    hard_links: &BTreeMap<PathBuf, Vec<PathBuf>>,
    path: &str,
    dockerfile: Option<&str>,
    out: impl Write,
) -> Result<(), ArchiveError> {
    let dockerfile_path = plain(Path::new(path));
    let excludes = |path: &Path| path != dockerfile_path && ignore.excludes(&path.to_string_lossy());
    // The path at which the content of a file is: that of its first link that is kept, if the file itself is not.
    let place = |target: &Path| {
        let links = || hard_links.get(target).into_iter().flatten();
        if excludes(target) { links().find(|link| !excludes(link)).cloned() } else { Some(target.to_owned()) }
    };
    let mut out = Builder::new(out);
    // The engine recognises a tar by the whole of its first entry, if that is short.
    out.append_data(&mut directory(), "./", io::empty())?;
    // Directories that are excluded, but may have a file that is not.
    let mut waiting: BTreeMap<PathBuf, Header> = BTreeMap::new();
    for entry in tar.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        let path = plain(&entry.path()?);
        if path.as_os_str().is_empty() || !is_kept(kind) {
            continue;
        }
        if path == dockerfile_path && dockerfile.is_some() {
            continue;
        }
        let mut header = root_owned(&entry);
        let path = match has_content(kind) {
            true => place(&path),
            false => Some(path).filter(|path| kind.is_dir() || !excludes(path)),
        };
        let Some(path) = path else { continue };
        if kind.is_dir() && excludes(&path) {
            waiting.insert(path, header);
            continue;
        }
        for above in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            if let Some(mut header) = waiting.remove(above) {
                out.append_data(&mut header, above, io::empty())?;
            }
        }
        if kind.is_hard_link() {
            let target = plain(&entry.link_name()?.unwrap_or_default());
            match place(&target) {
                // The content was written here.
                Some(target) if target == path => {}
                Some(target) => out.append_link(&mut header, &path, &target)?,
                None => {}
            }
        } else if kind.is_symlink() {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            // As it is: `a//b` stays, where it fits.
            match header.set_link_name_literal(&target) {
                Ok(()) => out.append_data(&mut header, &path, io::empty())?,
                Err(_) => out.append_link(&mut header, &path, OsStr::from_bytes(&target))?,
            }
        } else {
            out.append_data(&mut header, &path, &mut entry)?;
        }
    }
    if let Some(text) = dockerfile {
        append(&mut out, path, text.as_bytes(), 0o644)?;
    }
    out.into_inner()?.flush()?;
    Ok(())
}

/// Returns the header of the context's own directory.
fn directory() -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_size(0);
    header.set_mode(0o755);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Appends a file that is owned by root.
///
/// # Errors
///
/// Returns an error if the path does not fit in a tar, or the tar cannot be written.
pub(crate) fn append(out: &mut Builder<impl Write>, path: &str, content: &[u8], mode: u32) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    out.append_data(&mut header, path, content)
}

/// Reports whether a context can have entries of this kind; devices and pipes are left out.
fn is_kept(kind: EntryType) -> bool {
    has_content(kind) || kind.is_dir() || kind.is_symlink() || kind.is_hard_link()
}

fn has_content(kind: EntryType) -> bool {
    kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse()
}

/// Returns the header of an entry for root, without a path and a target.
fn root_owned(entry: &Entry<'_, impl Read>) -> Header {
    let mut header = Header::new_gnu();
    let kind = entry.header().entry_type();
    header.set_entry_type(if has_content(kind) { EntryType::Regular } else { kind });
    header.set_size(if has_content(kind) { entry.size() } else { 0 });
    header.set_mode(entry.header().mode().unwrap_or(0o644));
    // No time before 1970 fits in this format.
    header.set_mtime(entry.header().mtime().ok().filter(|time| i64::try_from(*time).is_ok()).unwrap_or(0));
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Returns the text of a file, at most 1 MiB; what is no text is replaced.
///
/// # Errors
///
/// Returns an error if the file cannot be read.
pub(crate) fn text(file: impl Read) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&prefix(file)?).into_owned())
}

/// Returns the first MiB of a file.
///
/// # Errors
///
/// Returns an error if the file cannot be read.
pub(crate) fn prefix(file: impl Read) -> io::Result<Vec<u8>> {
    const MAX_BYTES: u64 = 1024 * 1024;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
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

/// Returns a path without what leads nowhere, such as `./`.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}
