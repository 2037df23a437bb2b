//! Gzip files: one or more members, and zeros that some programs write after them.

use std::io::{self, Write};

use flate2::write::GzDecoder;

use super::{Archive, Refused, refused};

/// A decoder that passes what it unpacks to an archive.
#[derive(Debug)]
pub(super) struct Gzip(State);

#[derive(Debug)]
enum State {
    /// Within a member.
    Member(Box<GzDecoder<Archive>>),
    /// After the end of a member.
    Between(Archive),
    /// Within the zeros after the last member.
    Padding(Archive),
    /// While the state changes.
    Changing,
}

impl Gzip {
    /// Number of bytes that are unpacked at once; they may unpack to a thousand times as much.
    const SLICE: usize = 4 * 1024;

    pub(super) fn new(archive: Archive) -> Self {
        Self(State::Member(Box::new(GzDecoder::new(archive))))
    }

    /// Unpacks the next bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), Refused> {
        while let Some(first) = bytes.first() {
            self.0 = match std::mem::replace(&mut self.0, State::Changing) {
                State::Member(mut decoder) => {
                    let slice = &bytes[..bytes.len().min(Self::SLICE)];
                    match decoder.write(slice).map_err(unpacking)? {
                        0 => State::Between(decoder.finish().map_err(unpacking)?),
                        taken => {
                            bytes = &bytes[taken..];
                            State::Member(decoder)
                        }
                    }
                }
                State::Between(archive) if *first == 0 => State::Padding(archive),
                State::Between(archive) => State::Member(Box::new(GzDecoder::new(archive))),
                State::Padding(archive) if bytes.iter().all(|byte| *byte == 0) => {
                    bytes = &[];
                    State::Padding(archive)
                }
                State::Padding(_) | State::Changing => return refused("must not go on after its end"),
            };
        }
        Ok(())
    }

    /// Finishes the file, and returns the archive.
    pub(super) fn finish(self) -> Result<Archive, Refused> {
        match self.0 {
            State::Member(decoder) => decoder.finish().map_err(unpacking),
            State::Between(archive) | State::Padding(archive) => Ok(archive),
            State::Changing => refused("must not go on after its end"),
        }
    }
}

/// Converts the error of a decoder: the rejection of what it has unpacked, or its failure to unpack.
fn unpacking(error: io::Error) -> Refused {
    match error.into_inner().map(|inner| inner.downcast::<Refused>()) {
        Some(Ok(refused)) => *refused,
        Some(Err(_)) | None => Refused("must be a whole gzip: it is damaged or cut off".to_owned()),
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
