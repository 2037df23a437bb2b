//! Writing of a context by code that blocks.

use std::io::{self, Write};

use tokio::sync::mpsc;

use crate::context::LargeContext;

/// Number of chunks that wait for the spool; the writer waits if there are more.
const WAITING: usize = 4;
/// Size of a chunk, in bytes.
const CHUNK: usize = 256 * 1024;

/// A writer that hands over what was written, chunk by chunk.
struct Chunks {
    buffer: Vec<u8>,
    chunks: mpsc::Sender<Vec<u8>>,
}

/// Fills a context with what `write` writes on a thread of its own.
///
/// # Errors
///
/// Returns the error of `write`, or an error if the context cannot be written.
pub(crate) async fn fill<E>(
    mut context: LargeContext,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E> + Send + 'static,
) -> Result<LargeContext, E>
where
    E: From<io::Error> + Send + 'static,
{
    let (chunks, mut written) = mpsc::channel(WAITING);
    let writing = tokio::task::spawn_blocking(move || -> Result<(), E> {
        let mut output = Chunks { buffer: Vec::with_capacity(CHUNK), chunks };
        write(&mut output)?;
        Ok(output.flush()?)
    });
    while let Some(chunk) = written.recv().await {
        context.append(chunk).await?;
    }
    writing.await.map_err(io::Error::other)??;
    Ok(context)
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.chunks.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
