//! The build context: a small tar of single files, made in memory; an archive that was uploaded, fetched into the spool; or what
//! the engine itself gets from a URL.

use std::{
    fmt,
    io::{self, Write},
    time::Duration,
};

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures_util::stream::{self, Stream, StreamExt};
use proto::dispatch::{Attempt, DockerBuild, FetchContextResponse};
use ring::digest::{Context as Hashing, SHA256};
use tonic::Code;

use crate::{
    dial::{Dial, DialError},
    spool::{Spool, SpoolFile},
};

/// Where the engine finds a Dockerfile that is given as a text.
const DOCKERFILE: &str = "Dockerfile";

/// Where the engine gets a context from.
pub(crate) enum Context {
    /// An archive in memory.
    Small(Bytes),
    /// An archive in the spool.
    Large(LargeContext),
    /// A URL.
    Remote(String),
}

/// An archive in the spool. It is gone when it is dropped.
#[derive(Debug)]
pub(crate) struct LargeContext {
    file: Box<dyn SpoolFile>,
    length: u64,
}

/// Why there is no context.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContextError {
    #[error("cannot fetch the context")]
    Fetch(#[from] DialError),
    #[error("nothing more of the context comes")]
    Silent,
    #[error("cannot keep the context")]
    Keep(#[from] io::Error),
    #[error("the context that was sent is not the one that was named")]
    Other,
}

/// Where the Dockerfile of a build lies in its context.
pub(crate) fn dockerfile_path(build: &DockerBuild) -> String {
    let path = if build.dockerfile_path.is_empty() { DOCKERFILE } else { &build.dockerfile_path };
    path.to_owned()
}

/// Gets a build's context. Waits for a service that is away.
pub(crate) async fn of(
    build: &DockerBuild,
    attempt: &Attempt,
    dial: &dyn Dial,
    spool: &dyn Spool,
) -> Result<Context, ContextError> {
    /// How long to wait before the service is asked again.
    const PAUSE: Duration = Duration::from_millis(500);
    if !build.remote.is_empty() {
        return Ok(Context::Remote(build.remote.clone()));
    }
    if build.archive.is_empty() {
        return Ok(Context::Small(pack(build)?));
    }
    loop {
        match fetch(build, attempt, dial, spool).await {
            Err(error) if may_pass(&error) => {
                tracing::warn!(build = attempt.build_id, %error, "cannot fetch a context yet");
                tokio::time::sleep(PAUSE).await;
            }
            fetched => return Ok(Context::Large(fetched?)),
        }
    }
}

/// Packs a build's Dockerfile and files. Equal builds give equal bytes, so that the engine's cache knows them again.
fn pack(build: &DockerBuild) -> io::Result<Bytes> {
    let mut archive = tar::Builder::new(Vec::new());
    append(&mut archive, DOCKERFILE, build.dockerfile.as_bytes(), 0o644)?;
    for file in &build.files {
        let mode = if file.executable { 0o755 } else { 0o644 };
        append(&mut archive, &file.path, &file.content, mode)?;
    }
    Ok(archive.into_inner()?.into())
}

fn append(archive: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8], mode: u32) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    header.set_mtime(0);
    archive.append_data(&mut header, path, content)
}

/// Whether the same may work a little later.
fn may_pass(error: &ContextError) -> bool {
    let error = match error {
        ContextError::Fetch(error) => error,
        ContextError::Silent => return true,
        ContextError::Keep(_) | ContextError::Other => return false,
    };
    match error {
        DialError::Address(_) | DialError::NoToken => false,
        DialError::Connect(_) | DialError::Token(_) => true,
        DialError::Refused(status) => !matches!(
            status.code(),
            Code::NotFound | Code::InvalidArgument | Code::PermissionDenied | Code::Unimplemented
        ),
    }
}

/// How long the next part of an archive may take.
const SILENCE: Duration = Duration::from_secs(30);

async fn fetch(
    build: &DockerBuild,
    attempt: &Attempt,
    dial: &dyn Dial,
    spool: &dyn Spool,
) -> Result<LargeContext, ContextError> {
    let mut chunks = dial.fetch_context(attempt.clone()).await?;
    let mut hashing = Hashing::new(&SHA256);
    let mut context = LargeContext { file: spool.create().await?, length: 0 };
    let mut tar: Option<Tar> = None;
    loop {
        let next = tokio::time::timeout(SILENCE, chunks.next()).await.map_err(|_| ContextError::Silent)?;
        let Some(chunk) = next else { break };
        let FetchContextResponse { chunk, gzip, end } = chunk?;
        hashing.update(&chunk);
        if build.dockerfile.is_empty() {
            context.append(chunk.into()).await?;
            continue;
        }
        let tar = tar.get_or_insert_with(|| Tar::new(gzip, end));
        for slice in chunk.chunks(Tar::SLICE) {
            context.append(tar.unpack(slice)?).await?;
        }
    }
    let digits: String = hashing.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    if build.archive != format!("sha256:{digits}") {
        return Err(ContextError::Other);
    }
    if let Some(tar) = tar {
        context.append(tar.finish()?).await?;
        // What comes last counts.
        let mut rest = tar::Builder::new(Vec::new());
        append(&mut rest, DOCKERFILE, build.dockerfile.as_bytes(), 0o644)?;
        context.append(rest.into_inner()?).await?;
    }
    Ok(context)
}

/// An archive on its way to become a tar without an end, so that something can be appended.
enum Tar {
    Plain(Beginning),
    Gzip(Box<MultiGzDecoder<Beginning>>),
}

/// The bytes before the end, as they come.
struct Beginning {
    left: usize,
    bytes: Vec<u8>,
}

impl Tar {
    /// How much is unpacked at once. It may unpack to a thousand times as much.
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
        // What marks the end is passed over.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LargeContext {
    const READ: u64 = 256 * 1024;

    async fn append(&mut self, bytes: Vec<u8>) -> io::Result<()> {
        if !bytes.is_empty() {
            let length = bytes.len() as u64;
            self.file.write(self.length, bytes).await?;
            self.length += length;
        }
        Ok(())
    }

    /// Its bytes, from the beginning.
    pub(crate) fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
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
            Self::Remote(_) => "Remote",
        })
    }
}
