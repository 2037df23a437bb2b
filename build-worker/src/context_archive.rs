//! The archives of contexts as the engine gets them: in one format, owned by root, and without what
//! `.dockerignore` excludes.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use tar::{Archive, Builder, Entry, EntryType, Header};

use crate::dockerignore::DockerIgnore;

#[cfg(test)]
pub(crate) mod tests;

/// The compression of a tar.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
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

/// Writes what the engine gets of a tar; a Dockerfile that is given as text replaces the tar's own at its path.
///
/// A hard link to an excluded file takes its place. `hard_links` are all links to each target, in order.
///
/// # Errors
///
/// Returns an error if the tar cannot be read or the result cannot be written.
pub(crate) fn write(
    tar: &mut Archive<impl Read>,
    ignore: &DockerIgnore,
    hard_links: &BTreeMap<PathBuf, Vec<PathBuf>>,
    dockerfile: Option<(&str, &str)>,
    out: impl Write,
) -> Result<(), ArchiveError> {
    let excludes = |path: &Path| ignore.excludes(&path.to_string_lossy());
    // The path at which the content of a file is: that of its first link that is kept, if the file itself is not.
    let place = |target: &Path| {
        let links = || hard_links.get(target).into_iter().flatten();
        if excludes(target) { links().find(|link| !excludes(link)).cloned() } else { Some(target.to_owned()) }
    };
    let mut out = Builder::new(out);
    // The engine recognises a tar by the whole of its first entry, if that is short.
    out.append_data(&mut directory(), "./", io::empty())?;
    let given_path = dockerfile.map(|(path, _)| plain(Path::new(path)));
    // Directories that are excluded, but may have a file that is not.
    let mut waiting: BTreeMap<PathBuf, Header> = BTreeMap::new();
    let mut known = BTreeSet::new();
    for entry in tar.entries()? {
        let mut entry = entry?;
        let kind = kind_of(&entry);
        let path = plain(&entry.path()?);
        if path.as_os_str().is_empty() || !is_kept(kind) || given_path.as_ref() == Some(&path) {
            continue;
        }
        // A directory is there even if the tar has only files of it, and all of them are excluded.
        for above in ancestors(&path) {
            if known.insert(above.to_owned()) {
                if excludes(above) {
                    waiting.insert(above.to_owned(), directory());
                } else {
                    out.append_data(&mut directory(), above, io::empty())?;
                }
            }
        }
        if kind.is_dir() {
            known.insert(path.clone());
        }
        let mut header = root_owned(&entry);
        let path = if kind.is_dir() {
            Some(path)
        } else if kind.is_hard_link() {
            Some(path).filter(|path| !excludes(path))
        } else {
            place(&path)
        };
        let Some(path) = path else { continue };
        if kind.is_dir() && excludes(&path) {
            waiting.insert(path, header);
            continue;
        }
        for above in ancestors(&path) {
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
        } else if ignore.blanks(&path.to_string_lossy()) {
            header.set_size(0);
            out.append_data(&mut header, &path, io::empty())?;
        } else {
            out.append_data(&mut header, &path, &mut entry)?;
        }
    }
    if let (Some((_, text)), Some(path)) = (dockerfile, given_path)
        && !excludes(&path)
    {
        append(&mut out, &path.to_string_lossy(), text.as_bytes(), 0o644)?;
    }
    out.into_inner()?.flush()?;
    Ok(())
}

/// Returns the directories above a path, the uppermost first, without the root.
fn ancestors(path: &Path) -> Vec<&Path> {
    let mut above: Vec<&Path> =
        path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect();
    above.reverse();
    above
}

/// Returns the kind of an entry. Version 7 had no kind for directories, whose paths end in a slash.
pub(crate) fn kind_of(entry: &Entry<'_, impl Read>) -> EntryType {
    const AT: usize = 156;
    let is_of_version_7 = entry.header().as_bytes()[AT] == 0 && entry.path_bytes().ends_with(b"/");
    if is_of_version_7 { EntryType::Directory } else { entry.header().entry_type() }
}

/// Returns an archive without files, which the engine recognises as one by its directory.
///
/// # Errors
///
/// Never returns one, because it is written to memory.
pub(crate) fn empty() -> io::Result<Vec<u8>> {
    let mut out = Builder::new(Vec::new());
    out.append_data(&mut directory(), "./", io::empty())?;
    out.into_inner()
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

/// Reports whether a context can have entries of this kind; devices are left out.
fn is_kept(kind: EntryType) -> bool {
    has_content(kind) || kind.is_dir() || kind.is_symlink() || kind.is_hard_link() || kind.is_fifo()
}

fn has_content(kind: EntryType) -> bool {
    kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse()
}

/// Returns the header of an entry for root, without a path and a target.
fn root_owned(entry: &Entry<'_, impl Read>) -> Header {
    let mut header = Header::new_gnu();
    let kind = kind_of(entry);
    header.set_entry_type(if has_content(kind) { EntryType::Regular } else { kind });
    header.set_size(if has_content(kind) { entry.size() } else { 0 });
    header.set_mode(entry.header().mode().unwrap_or(0o644));
    // No time before 1970 fits in this format.
    header.set_mtime(entry.header().mtime().ok().filter(|time| i64::try_from(*time).is_ok()).unwrap_or(0));
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Returns a path without what leads nowhere, such as `./`.
pub(crate) fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}
