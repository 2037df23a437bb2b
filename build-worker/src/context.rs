//! Build contexts: a small tar packed in memory, or a file in the spool.
//!
//! The tar holds single files; the file is an archive that was uploaded to the service, or a remote context.

use std::{fmt, io, sync::Arc};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream, Stream},
};
use proto::dispatch::DockerBuild;

use crate::{context_archive::append, spool::SpoolFile};

/// Path of a Dockerfile that is given as text, in its context.
pub(crate) const DOCKERFILE: &str = "Dockerfile";

/// The source of a build context.
pub(crate) enum Context {
    /// An archive in memory.
    Small(Bytes),
    /// A file in the spool.
    Large(Arc<LargeContext>),
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

/// Packs a build's files into a tar.
///
/// Equal builds give equal bytes, so that they hit the engine's cache.
///
/// # Errors
///
/// Returns an error if a path does not fit in a tar.
pub(crate) fn pack(build: &DockerBuild) -> io::Result<Bytes> {
    let mut archive = tar::Builder::new(Vec::new());
    for file in &build.files {
        let mode = if file.executable { 0o755 } else { 0o644 };
        append(&mut archive, &file.path, &file.content, mode)?;
    }
    Ok(archive.into_inner()?.into())
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
