//! The rules of an archive, held against a tar as it comes, block by block. Nothing is unpacked, and of files nothing is kept.
//!
//! Whoever unpacks it writes nothing outside of where it is told to: paths go down only, nothing lies below a link, and a
//! link's target first goes up, by no more than there is, and then down.

use std::{collections::HashMap, io};

use tar::{EntryType, Header, PaxExtensions};

/// A tar, so far.
pub(crate) struct Archive {
    limit: u64,
    /// How many bytes have come.
    size: u64,
    block: Vec<u8>,
    state: State,
    /// What was said of the next entry.
    extended: Extended,
    entries: u32,
    /// What each path is. Bounded by the number of entries and the length of a path.
    paths: HashMap<String, What>,
    kept_bytes: usize,
    end: u64,
}

enum State {
    /// A header comes next, or the end.
    Header,
    /// So many bytes of content, with what fills the last block.
    Content {
        left: u64,
        collected: Option<Collected>,
    },
    /// So many blocks of nothing have come.
    Ending {
        blocks: u8,
    },
    Ended,
}

/// The content of an entry that says something of the next one.
struct Collected {
    kind: EntryType,
    length: usize,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum What {
    File,
    Directory,
    Link,
}

/// Why an archive is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

impl Refused {
    pub(super) fn too_large(limit: u64) -> Self {
        Self(format!("must have at most {limit} bytes, also when it is unpacked"))
    }

    /// What a decoder says: what the archive is refused for, or that it cannot be unpacked.
    pub(super) fn unpacking(error: io::Error) -> Self {
        let text = error.to_string();
        match error.into_inner().map(|inner| inner.downcast::<Self>()) {
            Some(Ok(refused)) => *refused,
            Some(Err(_)) | None => Self(format!("must be a whole gzip: {text}")),
        }
    }

    fn of(path: &str, rule: &str) -> Self {
        // It may hold anything.
        let shown: String = path.chars().take(100).collect();
        Self(format!("{shown:?} {rule}"))
    }
}

fn refused<T>(rule: &str) -> Result<T, Refused> {
    Err(Refused(rule.to_owned()))
}

impl Archive {
    const BLOCK: usize = 512;
    const MAX_ENTRIES: u32 = 100_000;
    const MAX_PATH: usize = 4_096;
    /// What is kept of paths.
    const MAX_KEPT: usize = 32 * 1024 * 1024;
    /// A header that says something of the next entry.
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
            entries: 0,
            paths: HashMap::new(),
            kept_bytes: 0,
            end: 0,
        }
    }

    /// Takes in the next bytes.
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
            self.go_on()?;
        }
        Ok(())
    }

    /// The archive has come to its end: where the blocks that mark it begin.
    pub(super) fn finish(self) -> Result<i64, Refused> {
        match self.state {
            State::Ended if self.block.iter().all(|byte| *byte == 0) => {
                Ok(i64::try_from(self.end).unwrap_or(i64::MAX))
            }
            State::Ended => refused("must not go on after its end"),
            State::Header if self.size == 0 => refused("must not be empty"),
            State::Header if self.entries == 0 => refused(Self::NO_TAR),
            State::Header | State::Content { .. } | State::Ending { .. } => refused(Self::CUT_OFF),
        }
    }

    fn go_on(&mut self) -> Result<(), Refused> {
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
            State::Header if is_nothing => {
                self.end = self.size - Self::BLOCK as u64;
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
        let size = header.entry_size().map_err(|_| no_tar())?;
        self.entries += 1;
        if self.entries > Self::MAX_ENTRIES {
            return refused("must have at most 100,000 entries");
        }
        let kind = header.entry_type();
        let tells = matches!(
            kind,
            EntryType::XHeader | EntryType::XGlobalHeader | EntryType::GNULongName | EntryType::GNULongLink
        );
        if tells && size > Self::MAX_EXTENDED {
            return refused("must have no extended header of over 64 KiB");
        }
        let is_file = matches!(kind, EntryType::Regular | EntryType::Continuous);
        if !tells {
            let Extended { path, target } = std::mem::take(&mut self.extended);
            let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
            let target = target.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
            self.check(&path, kind, target.as_deref().unwrap_or_default())?;
            if size > 0 && !is_file {
                return Err(Refused::of(
                    &String::from_utf8_lossy(&path),
                    "must have no content: it is no file",
                ));
            }
        }
        if size > 0 {
            let length = usize::try_from(size).unwrap_or(usize::MAX);
            let collected = tells.then(|| Collected { kind, length, bytes: Vec::new() });
            let blocks = size.div_ceil(Self::BLOCK as u64);
            let left =
                blocks.checked_mul(Self::BLOCK as u64).ok_or_else(|| Refused::too_large(self.limit))?;
            self.state = State::Content { left, collected };
        }
        Ok(())
    }

    /// Takes in what is said of the next entry.
    fn extend(&mut self, collected: Collected) -> Result<(), Refused> {
        let Collected { kind, length, mut bytes } = collected;
        bytes.truncate(length);
        match kind {
            EntryType::GNULongName => self.extended.path = Some(until_nul(bytes)),
            EntryType::GNULongLink => self.extended.target = Some(until_nul(bytes)),
            EntryType::XHeader | EntryType::XGlobalHeader => {
                for extension in PaxExtensions::new(&bytes) {
                    let extension = extension
                        .map_err(|_| Refused("has an extended header that is damaged".to_owned()))?;
                    let value = extension.value_bytes();
                    match extension.key_bytes() {
                        b"path" if kind == EntryType::XHeader => self.extended.path = Some(value.to_vec()),
                        b"linkpath" if kind == EntryType::XHeader => {
                            self.extended.target = Some(value.to_vec())
                        }
                        // Whoever goes by it and whoever does not find different entries.
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
            _ => {}
        }
        Ok(())
    }

    fn check(&mut self, path: &[u8], kind: EntryType, target: &[u8]) -> Result<(), Refused> {
        let what = match kind {
            EntryType::Regular | EntryType::Continuous => What::File,
            EntryType::Directory => What::Directory,
            EntryType::Symlink => What::Link,
            EntryType::Link => What::File,
            _ => {
                let shown = String::from_utf8_lossy(path);
                return Err(Refused::of(&shown, "must be a file, a directory or a link"));
            }
        };
        let path = inner_path(path)?;
        let Some(path) = path else {
            // The root itself.
            return if what == What::Directory { Ok(()) } else { refused("must not replace its root") };
        };
        match kind {
            EntryType::Symlink => check_target(&path, target)?,
            EntryType::Link => {
                let target = inner_path(target)?.unwrap_or_default();
                if self.paths.get(&target) != Some(&What::File) {
                    return Err(Refused::of(&path, "must link to a file that came before it"));
                }
            }
            _ => {}
        }
        for (end, _) in path.match_indices('/') {
            let above = &path[..end];
            match self.paths.get(above) {
                Some(What::Directory) => {}
                Some(What::Link) => return Err(Refused::of(&path, "must not lie below a link")),
                Some(What::File) => return Err(Refused::of(&path, "must not lie below a file")),
                None => self.keep(above.to_owned(), What::Directory)?,
            }
        }
        if what == What::Link && self.paths.get(&path) == Some(&What::Directory) {
            return Err(Refused::of(&path, "must not be a link in the place of a directory"));
        }
        self.keep(path, what)
    }

    fn keep(&mut self, path: String, what: What) -> Result<(), Refused> {
        const OVERHEAD: usize = 64;
        self.kept_bytes += path.len() + OVERHEAD;
        if self.kept_bytes > Self::MAX_KEPT {
            return refused("must have shorter or fewer paths: at most 32 MiB of them");
        }
        self.paths.insert(path, what);
        Ok(())
    }
}

/// A path within the archive, without `.` names; none for the root.
fn inner_path(bytes: &[u8]) -> Result<Option<String>, Refused> {
    let shown = String::from_utf8_lossy(bytes);
    let fail = |rule| Err(Refused::of(&shown, rule));
    let Ok(path) = std::str::from_utf8(bytes) else {
        return fail("must be UTF-8");
    };
    if path.is_empty() {
        return refused("has an entry without a path");
    }
    if path.len() > Archive::MAX_PATH {
        return fail("must have at most 4,096 bytes");
    }
    if path.starts_with('/') {
        return fail("must be relative");
    }
    if path.contains('\0') {
        return fail("must not contain NUL");
    }
    let mut names = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => return fail("must have no `..` in it"),
            name => names.push(name),
        }
    }
    Ok((!names.is_empty()).then(|| names.join("/")))
}

/// A symbolic link at `path` leads to somewhere within the archive.
fn check_target(path: &str, target: &[u8]) -> Result<(), Refused> {
    let Ok(target) = std::str::from_utf8(target) else {
        return Err(Refused::of(path, "must link to UTF-8"));
    };
    if target.is_empty() || target.len() > Archive::MAX_PATH {
        return Err(Refused::of(path, "must link to a path of 1 to 4,096 bytes"));
    }
    if target.starts_with('/') {
        return Err(Refused::of(path, "must not link to an absolute path"));
    }
    let mut above = path.matches('/').count();
    let mut goes_down = false;
    for name in target.split('/') {
        match name {
            "" | "." => {}
            ".." if goes_down => {
                return Err(Refused::of(path, "must link up by `..` before it links down"));
            }
            ".." if above == 0 => return Err(Refused::of(path, "must not link out of the archive")),
            ".." => above -= 1,
            _ => goes_down = true,
        }
    }
    Ok(())
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
