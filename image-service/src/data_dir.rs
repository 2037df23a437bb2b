//! The lock on the data directory, with which only one process serves a SQLite catalogue.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// An exclusive lock on a data directory, held until it is dropped or the process ends in any way.
///
/// The lock belongs to the open file, not to its name, so a file that is left over locks nothing.
#[derive(Debug)]
pub(crate) struct DataDirLock {
    file: File,
}

/// An error in locking a data directory.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Lock held by another process.
    #[error("another process serves the data directory {}", .0.display())]
    Held(PathBuf),
    /// Failure to open or lock the file.
    #[error("cannot lock the data directory {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

impl DataDirLock {
    const FILE: &str = "lock";

    /// Locks an existing data directory without waiting.
    ///
    /// # Errors
    ///
    /// Returns [`LockError::Held`] if another process, or another service of this one, holds the lock, and
    /// [`LockError::Io`] if the file cannot be opened or locked.
    pub(crate) fn acquire(data_dir: &Path) -> Result<Self, LockError> {
        let failed = |error: io::Error| LockError::Io(data_dir.to_owned(), error);
        let path = data_dir.join(Self::FILE);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(LockError::Held(data_dir.to_owned())),
            Err(error) => Err(failed(error.into())),
        }
    }
}

impl Drop for DataDirLock {
    fn drop(&mut self) {
        // A child of this process that is about to be another program has the open file, too.
        if let Err(error) = flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(%error, "cannot unlock the data directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_locked_until_the_lock_is_dropped() {
        let directory = tempfile::tempdir().expect("a directory");
        let lock = DataDirLock::acquire(directory.path()).expect("nobody serves it");
        let refused = DataDirLock::acquire(directory.path()).expect_err("it is locked");
        assert!(matches!(refused, LockError::Held(_)), "{refused:?}");
        drop(lock);
        DataDirLock::acquire(directory.path()).expect("the file that is left locks nothing");
        let missing = DataDirLock::acquire(&directory.path().join("missing")).expect_err("there is none");
        assert!(matches!(missing, LockError::Io(..)), "{missing:?}");
    }
}
