//! Where an outbox keeps what is too much for memory.
//!
//! Nothing in a spool is ever read by another process: a worker that starts gives up what its predecessor held.

use std::{fmt::Debug, io};

use futures_util::future::BoxFuture;

pub(crate) use self::disk::DiskSpool;

mod disk;

/// Makes files, one for each attempt that needs it.
pub(crate) trait Spool: Debug + Send + Sync {
    /// A new file without content.
    fn create(&self) -> BoxFuture<'_, io::Result<Box<dyn SpoolFile>>>;
}

/// A file of one attempt. It is gone, and its space is free, when it is dropped.
pub(crate) trait SpoolFile: Debug + Send + Sync {
    /// Writes all of `bytes` at `offset`. If it fails, any of them may have been written there, and nothing elsewhere.
    fn write(&self, offset: u64, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>>;

    /// Reads `length` bytes at `offset`.
    fn read(&self, offset: u64, length: usize) -> BoxFuture<'_, io::Result<Vec<u8>>>;
}
