//! Spool of an outbox: storage for events that memory cannot hold.
//!
//! No other process ever reads a spool: a worker that starts gives up the attempts of its predecessor.

use std::{fmt::Debug, io};

use futures_util::future::BoxFuture;

pub(crate) use self::disk::DiskSpool;

mod disk;

/// A source of files, one for each attempt that needs one.
pub(crate) trait Spool: Debug + Send + Sync {
    /// Creates an empty file.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be created, for example because the disk is full.
    fn create(&self) -> BoxFuture<'_, io::Result<Box<dyn SpoolFile>>>;
}

/// A file of one attempt; dropping it removes it and frees its space.
pub(crate) trait SpoolFile: Debug + Send + Sync {
    /// Writes all of `bytes` at `offset`.
    ///
    /// A failed write may have written any of them there, and nothing elsewhere.
    ///
    /// # Errors
    ///
    /// Returns an error if any of the bytes cannot be written.
    fn write(&self, offset: u64, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>>;

    /// Reads exactly `length` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be read or has fewer bytes there.
    fn read(&self, offset: u64, length: usize) -> BoxFuture<'_, io::Result<Vec<u8>>>;
}
