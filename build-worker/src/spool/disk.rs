//! Spool in a directory.
//!
//! A file is unlinked as soon as it is open. Therefore it goes with its last handle, however the attempt or
//! the process ends, and workers that share a directory cannot remove each other's files.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use uuid::Uuid;

use super::{Spool, SpoolFile};

/// A spool in a directory.
#[derive(Debug)]
pub(crate) struct DiskSpool {
    directory: PathBuf,
}

#[derive(Debug)]
struct DiskFile(Arc<File>);

impl DiskSpool {
    /// Prefix of the names of spool files.
    const PREFIX: &str = "trailer-spool-";

    /// Creates the directory if it is missing, and checks that files can be created in it.
    ///
    /// A full disk is not an error. A file that still has a name was left by a worker that was killed while
    /// it created the file, and is removed.
    ///
    /// # Errors
    ///
    /// Returns an error if the directory cannot be created, read or written.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        make(&directory)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| name.strip_prefix(Self::PREFIX));
            if id.is_some_and(|id| Uuid::parse_str(id).is_ok()) && entry.file_type()?.is_file() {
                remove(&directory.join(name))?;
            }
        }
        match new_file(&directory) {
            Err(error)
                if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                Err(error)
            }
            Ok(_) | Err(_) => Ok(Self { directory }),
        }
    }
}

impl Spool for DiskSpool {
    fn create(&self) -> BoxFuture<'_, io::Result<Box<dyn SpoolFile>>> {
        let directory = self.directory.clone();
        Box::pin(async move {
            let file = blocking(move || new_file(&directory)).await?;
            Ok(Box::new(DiskFile(Arc::new(file))) as Box<dyn SpoolFile>)
        })
    }
}

impl SpoolFile for DiskFile {
    fn write(&self, offset: u64, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        let file = Arc::clone(&self.0);
        Box::pin(blocking(move || file.write_all_at(&bytes, offset)))
    }

    fn read(&self, offset: u64, length: usize) -> BoxFuture<'_, io::Result<Vec<u8>>> {
        let file = Arc::clone(&self.0);
        Box::pin(blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        }))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn make(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Creates a file and removes its name.
fn new_file(directory: &Path) -> io::Result<File> {
    // A cleaner of temporary directories may have removed the directory.
    make(directory)?;
    let path = directory.join(format!("{}{}", DiskSpool::PREFIX, Uuid::new_v4()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    remove(&path)?;
    Ok(file)
}

/// Removes a file, unless another worker that starts on the same directory already has.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("it is a directory");
        entries.map(|entry| entry.expect("it is listed").file_name().to_string_lossy().into_owned()).collect()
    }

    #[tokio::test]
    async fn a_file_is_read_as_it_was_written_and_has_no_name() -> io::Result<()> {
        let parent = tempfile::tempdir()?;
        let directory = parent.path().join("of").join("w1");
        let spool = DiskSpool::open(directory.clone())?;
        assert_eq!(fs::metadata(&directory)?.permissions().mode() & 0o777, 0o700);
        let file = spool.create().await?;
        file.write(3, b"later".to_vec()).await?;
        file.write(0, b"now".to_vec()).await?;
        assert_eq!(file.read(0, 8).await?, b"nowlater");
        assert!(file.read(4, 8).await.is_err(), "a read is whole or fails");
        assert_eq!(names(&directory), [""; 0]);

        fs::remove_dir(&directory)?;
        spool.create().await?.write(0, b"again".to_vec()).await
    }

    #[tokio::test]
    async fn a_start_removes_what_was_left_and_nothing_else() -> io::Result<()> {
        let directory = tempfile::tempdir()?;
        let running = DiskSpool::open(directory.path().to_owned())?;
        let file = running.create().await?;
        file.write(0, b"kept".to_vec()).await?;
        let left = directory.path().join(format!("{}{}", DiskSpool::PREFIX, Uuid::new_v4()));
        fs::write(&left, "left by a worker that was killed")?;
        fs::write(directory.path().join("trailer-spool-notes"), "of somebody else")?;
        DiskSpool::open(directory.path().to_owned())?;
        assert_eq!(names(directory.path()), ["trailer-spool-notes"]);
        assert_eq!(file.read(0, 4).await?, b"kept", "another worker's start harms no file in use");
        Ok(())
    }

    #[test]
    fn an_unusable_spool_directory_is_refused() -> io::Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        assert!(DiskSpool::open(file.path().to_owned()).is_err());
        assert!(DiskSpool::open(file.path().join("below")).is_err());
        Ok(())
    }
}
