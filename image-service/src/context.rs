//! Build contexts that are uploaded as archives: named by what they contain, and checked while they come in.

use std::{
    fmt,
    io::{self, Write},
};

use flate2::write::MultiGzDecoder;
use ring::digest::{Context as Hashing, SHA256};
use serde::{Deserialize, Serialize};

use self::archive::Archive;
pub(crate) use self::archive::Refused;

mod archive;

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

/// Looks at an archive as it comes, and keeps nothing of it but what the rules need.
pub(crate) struct Inspection {
    hashing: Hashing,
    size: u64,
    limit: u64,
    /// The first bytes, until it is known what they are.
    head: Vec<u8>,
    form: Form,
}

enum Form {
    Unknown(Archive),
    Tar(Archive),
    Gzip(Box<MultiGzDecoder<Archive>>),
}

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
    /// How much is unpacked at once. It may unpack to a thousand times as much.
    const SLICE: usize = 4 * 1024;

    /// `limit`: how many bytes it may have, as it comes and unpacked.
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            hashing: Hashing::new(&SHA256),
            size: 0,
            limit,
            head: Vec::new(),
            form: Form::Unknown(Archive::new(limit)),
        }
    }

    /// Takes in the next bytes.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        self.size += bytes.len() as u64;
        if self.size > self.limit {
            return Err(Refused::too_large(self.limit));
        }
        self.hashing.update(bytes);
        if let Form::Unknown(_) = &self.form {
            self.head.extend(bytes);
            if self.head.len() < Self::GZIP.len() {
                return Ok(());
            }
            let head = std::mem::take(&mut self.head);
            self.recognise(&head);
            return self.look_at(&head);
        }
        self.look_at(bytes)
    }

    fn recognise(&mut self, head: &[u8]) {
        let form = std::mem::replace(&mut self.form, Form::Unknown(Archive::new(0)));
        self.form = match form {
            Form::Unknown(archive) if head.starts_with(&Self::GZIP) => {
                Form::Gzip(Box::new(MultiGzDecoder::new(archive)))
            }
            Form::Unknown(archive) => Form::Tar(archive),
            known => known,
        };
    }

    fn look_at(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        match &mut self.form {
            Form::Unknown(archive) | Form::Tar(archive) => archive.take(bytes),
            Form::Gzip(decoder) => {
                for slice in bytes.chunks(Self::SLICE) {
                    decoder.write_all(slice).map_err(Refused::unpacking)?;
                }
                Ok(())
            }
        }
    }

    /// The archive has come to its end.
    pub(crate) fn finish(mut self) -> Result<Inspected, Refused> {
        if let Form::Unknown(_) = &self.form {
            let head = std::mem::take(&mut self.head);
            self.recognise(&head);
            self.look_at(&head)?;
        }
        let gzip = matches!(self.form, Form::Gzip(_));
        let archive = match self.form {
            Form::Unknown(archive) | Form::Tar(archive) => archive,
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
