//! Build contexts that are uploaded as archives: named by what they contain, and checked while they come in.

use std::{
    fmt,
    io::{self, Write},
};

use flate2::write::MultiGzDecoder;
use ring::digest::{Context as Hashing, SHA256};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::archive::Archive;
use crate::timestamp::Timestamp;

mod archive;
mod paths;

/// What an archive is named by: `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ContextDigest(String);

/// An archive that was taken in whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inspected {
    pub(crate) digest: ContextDigest,
    pub(crate) size_bytes: i64,
    /// Whether it is compressed by gzip.
    pub(crate) gzip: bool,
    /// How many bytes of the tar come before the blocks that mark its end.
    pub(crate) end: i64,
}

/// An archive that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptContext {
    pub(crate) upload: Uuid,
    pub(crate) size_bytes: i64,
    pub(crate) gzip: bool,
    pub(crate) end: i64,
    /// The time of its upload, or of the last time that a configuration named it.
    pub(crate) used_at: Timestamp,
}

/// Looks at an archive as it comes, and keeps nothing of it but what the rules need.
pub(crate) struct Inspection {
    hashing: Hashing,
    size: u64,
    limit: u64,
    /// The first bytes, until it is known what they are.
    head: Vec<u8>,
    form: Option<Form>,
}

enum Form {
    Tar(Archive),
    Gzip(Box<MultiGzDecoder<Archive>>),
}

/// Why an archive is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

impl ContextDigest {
    /// Parses what names an archive.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let digits = text.strip_prefix("sha256:").unwrap_or_default();
        if digits.len() == 64 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text.to_owned()))
        } else {
            Err("must be `sha256:` and 64 lower-case hexadecimal digits")
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContextDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Inspection {
    const GZIP: [u8; 2] = [0x1f, 0x8b];
    /// What an engine would take for something compressed: bzip2, xz, Zstandard and, whatever its number, a skippable frame of it.
    const COMPRESSED: [&[u8]; 3] = [b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];
    const SKIPPABLE: &[u8] = b"*M\x18";

    /// `limit`: how many bytes it may have, as it comes and unpacked.
    pub(crate) fn new(limit: u64) -> Self {
        Self { hashing: Hashing::new(&SHA256), size: 0, limit, head: Vec::new(), form: None }
    }

    /// Takes in the next bytes.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        self.size += bytes.len() as u64;
        if self.size > self.limit {
            return Err(Refused::too_large(self.limit));
        }
        self.hashing.update(bytes);
        if let Some(form) = &mut self.form {
            return form.take(bytes);
        }
        self.head.extend(bytes);
        if self.head.len() < Archive::BLOCK {
            Ok(())
        } else {
            self.begin().map(|form| self.form = Some(form))
        }
    }

    /// Takes in what has come before it was known what it is.
    fn begin(&mut self) -> Result<Form, Refused> {
        let head = std::mem::take(&mut self.head);
        let archive = Archive::new(self.limit);
        let is_gzip = head.starts_with(&Self::GZIP);
        let is_skippable =
            matches!(head.as_slice(), [0x50..=0x5f, rest @ ..] if rest.starts_with(Self::SKIPPABLE));
        if is_skippable || Self::COMPRESSED.iter().any(|magic| head.starts_with(magic)) {
            return refused("must be a tar archive, or one that is compressed by gzip");
        }
        let mut form =
            if is_gzip { Form::Gzip(Box::new(MultiGzDecoder::new(archive))) } else { Form::Tar(archive) };
        form.take(&head)?;
        Ok(form)
    }

    /// The archive has come to its end.
    pub(crate) fn finish(mut self) -> Result<Inspected, Refused> {
        let form = match self.form.take() {
            Some(form) => form,
            None => self.begin()?,
        };
        let gzip = matches!(form, Form::Gzip(_));
        let archive = match form {
            Form::Tar(archive) => archive,
            Form::Gzip(decoder) => decoder.finish().map_err(Refused::unpacking)?,
        };
        let digits: String =
            self.hashing.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Inspected {
            digest: ContextDigest(format!("sha256:{digits}")),
            size_bytes: i64::try_from(self.size).unwrap_or(i64::MAX),
            gzip,
            end: archive.finish()?,
        })
    }
}

impl Form {
    /// How much is unpacked at once. It may unpack to a thousand times as much.
    const SLICE: usize = 4 * 1024;

    fn take(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        match self {
            Self::Tar(archive) => archive.take(bytes),
            Self::Gzip(decoder) => {
                for slice in bytes.chunks(Self::SLICE) {
                    decoder.write_all(slice).map_err(Refused::unpacking)?;
                }
                Ok(())
            }
        }
    }
}

impl Refused {
    fn too_large(limit: u64) -> Self {
        Self(format!("must have at most {limit} bytes, also when it is unpacked"))
    }

    /// What a decoder says: what the archive is refused for, or that it cannot be unpacked.
    fn unpacking(error: io::Error) -> Self {
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

impl fmt::Debug for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inspection").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Write for Archive {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.take(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
