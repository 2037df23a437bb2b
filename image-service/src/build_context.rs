//! Build contexts that are uploaded as archives: identified by their content, and checked while they are
//! received.

use std::fmt;

use ring::digest::{Context as Hashing, SHA256};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(crate) use self::file_paths::FilePaths;
use self::{archive::Archive, gzip::Gzip};
use crate::timestamp::Timestamp;

mod archive;
mod entry_kind;
mod file_paths;
mod gzip;
mod paths;

/// Digest that identifies an archive: `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ContextDigest(String);

/// An archive that was received completely and violates no rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inspected {
    pub(crate) digest: ContextDigest,
    pub(crate) size_bytes: i64,
    pub(crate) paths: FilePaths,
}

/// An archive that the store keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptContext {
    pub(crate) upload: Uuid,
    pub(crate) size_bytes: i64,
    /// Time of the upload, or of the last time that a configuration named the archive.
    pub(crate) used_at: Timestamp,
}

/// A check of an archive while it is received, which keeps only what the rules need.
pub(crate) struct Inspection {
    hashing: Hashing,
    size: u64,
    limit: u64,
    /// First bytes, until there are enough of them to recognize the format.
    head: Vec<u8>,
    form: Option<Form>,
}

enum Form {
    Tar(Archive),
    Gzip(Box<Gzip>),
}

/// Reason why an archive is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

impl ContextDigest {
    /// Parses the digest of an archive.
    ///
    /// # Errors
    ///
    /// Returns the violated rule if the text is not a digest.
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
    /// Magic numbers of the formats that an engine would decompress: bzip2, xz and Zstandard.
    const COMPRESSED: [&[u8]; 3] = [b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];
    /// Magic number of a skippable Zstandard frame, without the first byte, which has any of 16 values.
    const SKIPPABLE: &[u8] = b"*M\x18";

    /// Creates an inspection. `limit` is the maximum size in bytes, both as received and unpacked.
    pub(crate) fn new(limit: u64) -> Self {
        Self { hashing: Hashing::new(&SHA256), size: 0, limit, head: Vec::new(), form: None }
    }

    /// Checks the next bytes.
    ///
    /// # Errors
    ///
    /// Returns [`Refused`] if the archive violates a rule or exceeds the limit.
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

    /// Recognizes the format by the first bytes, and checks them.
    fn begin(&mut self) -> Result<Form, Refused> {
        let head = std::mem::take(&mut self.head);
        let archive = Archive::new(self.limit);
        let is_gzip = head.starts_with(&Self::GZIP);
        let is_skippable =
            matches!(head.as_slice(), [0x50..=0x5f, rest @ ..] if rest.starts_with(Self::SKIPPABLE));
        if is_skippable || Self::COMPRESSED.iter().any(|magic| head.starts_with(magic)) {
            return refused("must be a tar archive, or one that is compressed by gzip");
        }
        let mut form = if is_gzip { Form::Gzip(Box::new(Gzip::new(archive))) } else { Form::Tar(archive) };
        form.take(&head)?;
        Ok(form)
    }

    /// Finishes the check at the end of the archive.
    ///
    /// # Errors
    ///
    /// Returns [`Refused`] if the archive is incomplete or violates a rule.
    pub(crate) fn finish(mut self) -> Result<Inspected, Refused> {
        let form = match self.form.take() {
            Some(form) => form,
            None => self.begin()?,
        };
        let archive = match form {
            Form::Tar(archive) => archive,
            Form::Gzip(gzip) => gzip.finish()?,
        };
        let paths = archive.finish()?;
        Ok(Inspected {
            digest: ContextDigest(format!("sha256:{}", hex::encode(self.hashing.finish()))),
            size_bytes: i64::try_from(self.size).unwrap_or(i64::MAX),
            paths,
        })
    }
}

impl Form {
    fn take(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        match self {
            Self::Tar(archive) => archive.take(bytes),
            Self::Gzip(gzip) => gzip.take(bytes),
        }
    }
}

impl Refused {
    fn too_large(limit: u64) -> Self {
        Self(format!("must have at most {limit} bytes, also when it is unpacked"))
    }

    fn new(path: &str, rule: &str) -> Self {
        // The path may contain anything.
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

#[cfg(test)]
mod tests;
