//! Directories for checkouts, in the directory of the spool.
//!
//! Each is locked for as long as it is in use, so that a start can distinguish the directories of killed
//! workers from those of running ones.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use tokio::runtime::Handle;
use uuid::Uuid;

/// A directory that is removed when dropped.
#[derive(Debug)]
pub(super) struct Checkout {
    path: PathBuf,
    lock: Option<File>,
}

impl Checkout {
    const PREFIX: &str = "trailer-checkout-";

    /// Creates an empty directory. Blocks.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be created or locked.
    pub(super) fn create(parent: &Path) -> io::Result<Self> {
        let path = parent.join(format!("{}{}", Self::PREFIX, Uuid::new_v4()));
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        // A worker that starts right now removes it; then the fetch fails and is repeated.
        let lock = File::open(&path)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { path, lock: Some(lock) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the directories of workers that were killed. Blocks.
    ///
    /// # Errors
    ///
    /// Returns an error if the parent cannot be read, or one of them cannot be removed.
    pub(super) fn remove_abandoned(parent: &Path) -> io::Result<()> {
        for entry in fs::read_dir(parent)? {
            let entry = entry?;
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.strip_prefix(Self::PREFIX));
            if id.is_none_or(|id| Uuid::parse_str(id).is_err()) || !entry.file_type()?.is_dir() {
                continue;
            }
            let lock = File::open(entry.path())?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let (path, lock) = (std::mem::take(&mut self.path), self.lock.take());
        let removal = move || {
            if let Err(error) = remove(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove a checkout");
            }
            drop(lock);
        };
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(removal)),
            Err(_) => removal(),
        }
    }
}

/// Removes a directory in which killed processes may still create files for a moment.
fn remove(path: &Path) -> io::Result<()> {
    const ATTEMPTS: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(20);
    let mut attempt = 1;
    loop {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) if attempt < ATTEMPTS => thread::sleep(PAUSE),
            removed => return removed,
        }
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_in_use_survives_a_start() -> io::Result<()> {
        let parent = tempfile::tempdir()?;
        let used = Checkout::create(parent.path())?;
        let abandoned = parent.path().join(format!("{}{}", Checkout::PREFIX, Uuid::new_v4()));
        fs::create_dir_all(abandoned.join("tree"))?;
        let foreign = parent.path().join("trailer-checkout-notes");
        fs::create_dir(&foreign)?;
        Checkout::remove_abandoned(parent.path())?;
        assert!(used.path().exists() && foreign.exists() && !abandoned.exists());

        fs::write(used.path().join("file"), "content")?;
        let path = used.path().to_owned();
        drop(used);
        assert!(!path.exists());
        Ok(())
    }
}
