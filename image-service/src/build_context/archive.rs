//! The rules for archives, checked block by block while a tar is received. Nothing is unpacked, and no file
//! content is kept.
//!
//! Unpacking an accepted archive writes nothing outside of the target directory: paths only go down, and
//! nothing lies below a link. The target of a symbolic link may be any, because it counts in the image that
//! the link is copied to.

use std::{borrow::Cow, collections::HashMap};

use tar::{Header, PaxExtensions};

use super::{
    Refused,
    entry_kind::{ExtensionHeader, Kind},
    file_paths::FilePaths,
    paths::{check_target, inner_path},
    refused,
};

/// A tar as received so far.
#[derive(Debug)]
pub(crate) struct Archive {
    limit: u64,
    /// Number of bytes received.
    size: u64,
    block: Vec<u8>,
    state: State,
    /// Path and target that extended headers have given for the next entry.
    extended: Extended,
    /// Set while an extended header waits for its entry.
    is_awaited: bool,
    entries: u32,
    /// Kind of each path. Bounded by the number of entries and the length of a path.
    paths: HashMap<String, PathKind>,
    kept_bytes: usize,
}

#[derive(Debug)]
enum State {
    /// Before a header or the end.
    Header,
    /// Within content of which `left` bytes are missing, including the padding of the last block.
    Content {
        left: u64,
        collected: Option<Collected>,
    },
    /// After this number of zero blocks.
    Ending {
        blocks: u8,
    },
    Ended,
}

/// The content of an extended header.
#[derive(Debug)]
struct Collected {
    header: ExtensionHeader,
    length: usize,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
}

/// Kind of an accepted path.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum PathKind {
    File,
    Pipe,
    Directory,
    Link,
}

/// Position of the type in a header.
const TYPE_AT: usize = 156;

impl Archive {
    pub(super) const BLOCK: usize = 512;
    const MAX_ENTRIES: u32 = 100_000;
    /// Maximum memory for paths, in bytes.
    const MAX_KEPT: usize = 16 * 1024 * 1024;
    /// Maximum size of an extended header, in bytes.
    const MAX_EXTENDED: u64 = 64 * 1024;
    const NO_TAR: &str = "must be a tar archive, or one that is compressed by gzip";
    const CUT_OFF: &str = "must be whole: it is cut off before its end";

    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            size: 0,
            block: Vec::new(),
            state: State::Header,
            extended: Extended::default(),
            is_awaited: false,
            entries: 0,
            paths: HashMap::new(),
            kept_bytes: 0,
        }
    }

    /// Checks the next bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), Refused> {
        while !bytes.is_empty() {
            let taken = match &mut self.state {
                State::Content { left, collected } => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    if let Some(collected) = collected {
                        collected.bytes.extend(&bytes[..taken]);
                    }
                    *left -= taken as u64;
                    taken
                }
                State::Header | State::Ending { .. } | State::Ended => {
                    let taken = (Self::BLOCK - self.block.len()).min(bytes.len());
                    self.block.extend(&bytes[..taken]);
                    taken
                }
            };
            self.size += taken as u64;
            if self.size > self.limit {
                return Err(Refused::too_large(self.limit));
            }
            bytes = &bytes[taken..];
            self.advance()?;
        }
        Ok(())
    }

    /// Checks that the archive is complete, and returns the paths of its files and links.
    pub(super) fn finish(self) -> Result<FilePaths, Refused> {
        match self.state {
            State::Ended if self.paths.is_empty() => refused("must have at least one file"),
            State::Ended if self.block.iter().all(|byte| *byte == 0) => {
                let is_no_file = |kind: PathKind| matches!(kind, PathKind::Directory | PathKind::Pipe);
                let files = self.paths.iter().filter(|(_, kind)| !is_no_file(**kind));
                Ok(FilePaths::new(files.map(|(path, kind)| (path.as_str(), *kind == PathKind::Link))))
            }
            State::Ended => refused("must not go on after its end"),
            State::Header if self.size == 0 => refused("must not be empty"),
            State::Header if self.entries == 0 => refused(Self::NO_TAR),
            State::Header | State::Content { .. } | State::Ending { .. } => refused(Self::CUT_OFF),
        }
    }

    fn advance(&mut self) -> Result<(), Refused> {
        if let State::Content { left: 0, collected } = &mut self.state {
            let collected = collected.take();
            self.state = State::Header;
            return collected.map_or(Ok(()), |collected| self.extend(collected));
        }
        if self.block.len() < Self::BLOCK {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        let is_nothing = block.iter().all(|byte| *byte == 0);
        match self.state {
            State::Header if is_nothing && self.is_awaited => {
                refused("must not end with a header that no entry follows")
            }
            State::Header if is_nothing => {
                self.state = State::Ending { blocks: 1 };
                Ok(())
            }
            State::Header => self.begin_entry(&block),
            State::Ending { blocks: 1 } if is_nothing => {
                self.state = State::Ended;
                Ok(())
            }
            State::Ended if is_nothing => Ok(()),
            State::Ending { .. } | State::Ended => refused("must not go on after its end"),
            State::Content { .. } => Ok(()),
        }
    }

    fn begin_entry(&mut self, block: &[u8]) -> Result<(), Refused> {
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        let no_tar = || {
            Refused(if self.entries == 0 { Self::NO_TAR } else { "has a header that is damaged" }.to_owned())
        };
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(i, byte)| if (148..156).contains(&i) { 32 } else { u32::from(*byte) })
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(no_tar());
        }
        if !is_of_known_form(block) {
            return refused("must be a tar as of POSIX, GNU or Unix version 7");
        }
        let size = header.entry_size().map_err(|_| no_tar())?;
        self.entries += 1;
        if self.entries > Self::MAX_ENTRIES {
            return refused("must have at most 100,000 entries");
        }
        let mut kind = Kind::new(header.entry_type());
        let extension = if let Kind::ExtensionHeader(header) = kind { Some(header) } else { None };
        if extension.is_some() && size > Self::MAX_EXTENDED {
            return refused("must have no extended header of over 64 KiB");
        }
        self.is_awaited = match extension {
            Some(ExtensionHeader::LongPath | ExtensionHeader::LongTarget | ExtensionHeader::Pax) => true,
            Some(ExtensionHeader::GlobalPax) => self.is_awaited,
            None => false,
        };
        if extension.is_none() {
            let Extended { path, target } = std::mem::take(&mut self.extended);
            let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
            // Version 7 had no type for directories.
            if block[TYPE_AT] == 0 && kind == Kind::File && path.ends_with(b"/") {
                kind = Kind::Directory;
            }
            let target = target.or_else(|| header.link_name_bytes().map(Cow::into_owned));
            if kind != Kind::Label {
                self.check(&path, kind, target.as_deref().unwrap_or_default())?;
            }
            if size > 0 && kind != Kind::File {
                let shown = String::from_utf8_lossy(&path);
                return Err(Refused::new(&shown, "must have no content: it is no file"));
            }
        }
        if size > 0 {
            let length = usize::try_from(size).unwrap_or(usize::MAX);
            let collected =
                extension.map(|extension| Collected { header: extension, length, bytes: Vec::new() });
            let blocks = size.div_ceil(Self::BLOCK as u64);
            let left =
                blocks.checked_mul(Self::BLOCK as u64).ok_or_else(|| Refused::too_large(self.limit))?;
            self.state = State::Content { left, collected };
        }
        Ok(())
    }

    /// Applies an extended header to the next entry.
    fn extend(&mut self, collected: Collected) -> Result<(), Refused> {
        let Collected { header, length, mut bytes } = collected;
        bytes.truncate(length);
        match header {
            ExtensionHeader::LongPath => set_once(&mut self.extended.path, until_nul(bytes))?,
            ExtensionHeader::LongTarget => set_once(&mut self.extended.target, until_nul(bytes))?,
            ExtensionHeader::Pax | ExtensionHeader::GlobalPax => {
                let is_of_next = header == ExtensionHeader::Pax;
                for extension in PaxExtensions::new(&bytes) {
                    let damaged = |_| Refused("has an extended header that is damaged".to_owned());
                    let extension = extension.map_err(damaged)?;
                    let value = extension.value_bytes();
                    match extension.key_bytes() {
                        b"path" if is_of_next => set_once(&mut self.extended.path, value.to_vec())?,
                        b"linkpath" if is_of_next => set_once(&mut self.extended.target, value.to_vec())?,
                        // Readers that honour this key and readers that ignore it find different entries.
                        b"path" | b"linkpath" | b"size" => {
                            return refused(
                                "must have no sizes in extended headers, and no paths in global ones",
                            );
                        }
                        key if key.starts_with(b"GNU.sparse") => return refused("must have no sparse files"),
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, path: &[u8], kind: Kind, target: &[u8]) -> Result<(), Refused> {
        let path_kind = match kind {
            Kind::File => PathKind::File,
            Kind::Pipe => PathKind::Pipe,
            Kind::HardLink => self.kind_of(path, target)?,
            Kind::Directory => PathKind::Directory,
            Kind::SymbolicLink => PathKind::Link,
            Kind::Label | Kind::ExtensionHeader(_) | Kind::Other => {
                let shown = String::from_utf8_lossy(path);
                return Err(Refused::new(&shown, "must be a file, a directory, a link or a pipe"));
            }
        };
        if path_kind == PathKind::File && path.ends_with(b"/") {
            return Err(Refused::new(&String::from_utf8_lossy(path), "must not end in `/`: it is a file"));
        }
        let path = inner_path(path)?;
        let Some(path) = path else {
            // The root itself.
            return if path_kind == PathKind::Directory {
                Ok(())
            } else {
                refused("must not replace its root")
            };
        };
        if kind == Kind::SymbolicLink {
            check_target(&path, target)?;
        }
        for (end, _) in path.match_indices('/') {
            let above = &path[..end];
            match self.paths.get(above) {
                Some(PathKind::Directory) => {}
                Some(PathKind::Link) => return Err(Refused::new(&path, "must not lie below a link")),
                Some(PathKind::File | PathKind::Pipe) => {
                    return Err(Refused::new(&path, "must not lie below a file"));
                }
                None => self.keep(above.to_owned(), PathKind::Directory)?,
            }
        }
        if path_kind == PathKind::Link && self.paths.get(&path) == Some(&PathKind::Directory) {
            return Err(Refused::new(&path, "must not be a link in the place of a directory"));
        }
        self.keep(path, path_kind)
    }

    /// Returns the kind of a hard link: that of its target.
    fn kind_of(&self, path: &[u8], target: &[u8]) -> Result<PathKind, Refused> {
        let target = inner_path(target)?.unwrap_or_default();
        match self.paths.get(&target) {
            Some(kind @ (PathKind::File | PathKind::Pipe | PathKind::Link)) => Ok(*kind),
            Some(PathKind::Directory) | None => {
                let shown = String::from_utf8_lossy(path);
                Err(Refused::new(&shown, "must link to a file that came before it"))
            }
        }
    }

    fn keep(&mut self, path: String, path_kind: PathKind) -> Result<(), Refused> {
        const OVERHEAD: usize = 64;
        self.kept_bytes += path.len() + OVERHEAD;
        if self.kept_bytes > Self::MAX_KEPT {
            return refused("must have shorter or fewer paths: at most 16 MiB of them");
        }
        self.paths.insert(path, path_kind);
        Ok(())
    }
}

/// Sets the path or target of an entry, which only one header may set.
///
/// If two headers set it, readers differ in the one that they use.
fn set_once(slot: &mut Option<Vec<u8>>, value: Vec<u8>) -> Result<(), Refused> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => refused("must not give an entry's path or target twice"),
    }
}

/// Reports whether all readers agree on the format of a header.
///
/// These are POSIX (`ustar`, version 00, without the trailer of `star`), GNU, and Unix version 7, which has
/// no magic number.
fn is_of_known_form(block: &[u8]) -> bool {
    let (magic, trailer) = (&block[257..265], &block[508..512]);
    let is_posix = magic == b"ustar\x0000" && trailer != b"tar\0";
    is_posix || magic == b"ustar  \0" || magic == [0; 8]
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
