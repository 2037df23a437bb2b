//! The lock on the data directory: a SQLite catalogue has one process that serves it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// The exclusive right to serve from a data directory, until this is dropped or the process is gone, however it ended.
///
/// It belongs to the open file and not to its name, so a file that is left over locks nothing.
#[derive(Debug)]
pub(crate) struct DataDirLock {
    _file: File,
}

/// The reason why a data directory cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds the lock.
    #[error("another process serves the data directory {}", .0.display())]
    Held(PathBuf),
    /// The file cannot be opened or locked.
    #[error("cannot lock the data directory {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

impl DataDirLock {
    const FILE: &str = "lock";

    /// Locks a data directory, which must exist, without waiting.
    ///
    /// # Errors
    ///
    /// [`LockError::Held`] when another process serves from it, or another service of this one.
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
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(LockError::Held(data_dir.to_owned())),
            Err(error) => Err(failed(error.into())),
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
