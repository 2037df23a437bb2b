//! Build contexts: a small tar packed in memory, or an archive in the spool.
//!
//! The tar holds single files; the archive was uploaded to the service, or is a remote context.

use std::{
    fmt,
    io::{self, Write},
    sync::Arc,
};

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream, Stream},
};
use proto::dispatch::{DockerBuild, FetchContextResponse};
use ring::digest::{Context as Hashing, SHA256};

use crate::spool::SpoolFile;

/// Path of a Dockerfile that is given as text, in its context.
pub(crate) const DOCKERFILE: &str = "Dockerfile";

/// The source of a build context.
pub(crate) enum Context {
    /// An archive in memory.
    Small(Bytes),
    /// An archive in the spool.
    Large(Arc<LargeContext>),
}

/// An archive that is being received into the spool.
///
/// A Dockerfile that is given as text replaces the archive's own.
pub(crate) struct Incoming<'a> {
    build: &'a DockerBuild,
    hashing: Hashing,
    /// Decoder of the archive; `None` while its bytes are stored unchanged.
    tar: Option<Tar>,
    context: LargeContext,
}

/// An archive in the spool, or a Dockerfile from a URL; dropping it removes it.
#[derive(Debug)]
pub(crate) struct LargeContext {
    file: Box<dyn SpoolFile>,
    length: u64,
}

impl Context {
    /// Size of a message to the engine, in bytes.
    const CHUNK: usize = 256 * 1024;

    /// Returns the archive from its beginning.
    ///
    /// # Errors
    ///
    /// The stream yields an error if the spool cannot be read.
    pub(crate) fn bytes(&self) -> BoxStream<'static, io::Result<Bytes>> {
        match self {
            Self::Small(archive) => {
                let rest = archive.clone();
                let chunks = stream::unfold(rest, |mut rest| async move {
                    let length = rest.len().min(Self::CHUNK);
                    (length > 0).then(|| (Ok(rest.split_to(length)), rest))
                });
                chunks.boxed()
            }
            Self::Large(archive) => Arc::clone(archive).into_stream().boxed(),
        }
    }
}

/// Returns the path of a build's Dockerfile in its context.
pub(crate) fn dockerfile_path(build: &DockerBuild) -> String {
    let path = if build.dockerfile_path.is_empty() { DOCKERFILE } else { &build.dockerfile_path };
    path.to_owned()
}

/// Packs a build's Dockerfile and files into a tar.
///
/// Equal builds give equal bytes, so that they hit the engine's cache.
///
/// # Errors
///
/// Returns an error if a path does not fit in a tar.
pub(crate) fn pack(build: &DockerBuild) -> io::Result<Bytes> {
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, DOCKERFILE, build.dockerfile.as_bytes(), 0o644)?;
    for file in &build.files {
        let mode = if file.executable { 0o755 } else { 0o644 };
        append(&mut archive, &file.path, &file.content, mode)?;
    }
    Ok(archive.into_inner()?.into())
}

pub(crate) fn append(
    archive: &mut tar::Builder<Vec<u8>>,
    path: &str,
    content: &[u8],
    mode: u32,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    archive.append_data(&mut header, path, content)
}

impl<'a> Incoming<'a> {
    /// Starts receiving an archive into `file`, which must be empty.
    pub(crate) fn new(build: &'a DockerBuild, file: Box<dyn SpoolFile>) -> Self {
        let context = LargeContext::new(file);
        Self { build, hashing: Hashing::new(&SHA256), tar: None, context }
    }

    /// Receives the next part.
    ///
    /// # Errors
    ///
    /// Returns an error if the part cannot be unpacked or written to the spool.
    pub(crate) async fn take(&mut self, part: FetchContextResponse) -> io::Result<()> {
        let FetchContextResponse { chunk, gzip, end } = part;
        self.hashing.update(&chunk);
        if self.build.dockerfile.is_empty() {
            return self.context.append(chunk.into()).await;
        }
        let tar = self.tar.get_or_insert_with(|| Tar::new(gzip, end));
        for slice in chunk.chunks(Tar::SLICE) {
            self.context.append(tar.unpack(slice)?).await?;
        }
        Ok(())
    }

    /// Completes the archive; returns `None` if its digest is not the one that the build names.
    ///
    /// # Errors
    ///
    /// Returns an error if the archive is truncated or cannot be written to the spool.
    pub(crate) async fn finish(self) -> io::Result<Option<LargeContext>> {
        let Self { build, hashing, tar, mut context } = self;
        let digits: String = hashing.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if build.archive != format!("sha256:{digits}") {
            return Ok(None);
        }
        if let Some(tar) = tar {
            context.append(tar.finish()?).await?;
            // The last entry of a path wins.
            let mut rest = tar::Builder::new(Vec::new());
            append(&mut rest, DOCKERFILE, build.dockerfile.as_bytes(), 0o644)?;
            context.append(rest.into_inner()?).await?;
        }
        Ok(Some(context))
    }
}

/// A decoder that strips the end of a tar, so that entries can be appended.
enum Tar {
    Plain(Beginning),
    Gzip(Box<MultiGzDecoder<Beginning>>),
}

/// The bytes before the end of a tar.
struct Beginning {
    left: usize,
    bytes: Vec<u8>,
}

impl Tar {
    /// Number of bytes to unpack at once; they may unpack to a thousand times as many.
    const SLICE: usize = 4 * 1024;

    fn new(gzip: bool, end: i64) -> Self {
        let beginning = Beginning { left: usize::try_from(end).unwrap_or(0), bytes: Vec::new() };
        if gzip { Self::Gzip(Box::new(MultiGzDecoder::new(beginning))) } else { Self::Plain(beginning) }
    }

    fn unpack(&mut self, slice: &[u8]) -> io::Result<Vec<u8>> {
        let beginning = match self {
            Self::Plain(beginning) => {
                beginning.write_all(slice)?;
                beginning
            }
            Self::Gzip(decoder) => {
                decoder.write_all(slice)?;
                decoder.get_mut()
            }
        };
        Ok(std::mem::take(&mut beginning.bytes))
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        let beginning = match self {
            Self::Plain(beginning) => beginning,
            Self::Gzip(decoder) => decoder.finish()?,
        };
        if beginning.left > 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(beginning.bytes) }
    }
}

impl Write for Beginning {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.left);
        self.left -= taken;
        self.bytes.extend(&bytes[..taken]);
        // The bytes of the end are discarded.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LargeContext {
    const READ: u64 = Context::CHUNK as u64;

    /// Creates an empty context in `file`, which must be empty.
    pub(crate) fn new(file: Box<dyn SpoolFile>) -> Self {
        Self { file, length: 0 }
    }

    /// Appends bytes.
    ///
    /// # Errors
    ///
    /// Returns an error if they cannot be written to the spool.
    pub(crate) async fn append(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        if !bytes.is_empty() {
            let length = bytes.len() as u64;
            self.file.write(self.length, bytes).await?;
            self.length += length;
        }
        Ok(())
    }

    /// Streams the archive from its beginning.
    fn into_stream(self: Arc<Self>) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        stream::try_unfold((self, 0), |(context, offset)| async move {
            let length = Self::READ.min(context.length - offset);
            if length == 0 {
                return Ok(None);
            }
            let length_here = usize::try_from(length).map_err(io::Error::other)?;
            let bytes = context.file.read(offset, length_here).await?;
            Ok(Some((Bytes::from(bytes), (context, offset + length))))
        })
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small(_) => "Small",
            Self::Large(_) => "Large",
        })
    }
}
