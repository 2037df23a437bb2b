//! Archives of build contexts: received from callers, and sent to the workers that build with them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    access::{Principal, Role},
    build_context::{ContextDigest, Inspected, Inspection, KeptContext, Refused},
    dispatch::Attempt,
    error::{Error, Resource, Violations},
    store::Store,
    timestamp::Timestamp,
};

/// The archives of the catalogue, and the limits for uploads.
#[derive(Clone, Debug)]
pub(crate) struct Contexts {
    store: Store,
    /// Maximum size of an archive in bytes, both as received and unpacked.
    limit: u64,
    /// Retention period of an archive that no configuration names.
    retain: Duration,
    uploads: Arc<Semaphore>,
    by_caller: Arc<UploadsByCaller>,
}

/// Outcome of starting an upload.
#[derive(Debug)]
pub(crate) enum Begun {
    /// An archive that the store already keeps.
    Known(Taken),
    Upload(Box<Upload>),
}

/// An upload in progress.
#[derive(Debug)]
pub(crate) struct Upload {
    contexts: Contexts,
    /// Caller that uploads the archive.
    caller: Principal,
    id: uuid::Uuid,
    expected: Option<ContextDigest>,
    inspection: Inspection,
    /// Received bytes that do not fill a chunk yet.
    buffer: Vec<u8>,
    chunks: i64,
    _place: Place,
}

/// Numbers of uploads in progress by the subjects of their callers; none is zero.
type UploadsByCaller = Mutex<HashMap<String, usize>>;

/// The place of an upload among those in progress.
#[derive(Debug)]
struct Place {
    caller: String,
    by_caller: Arc<UploadsByCaller>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_caller = lock(&self.by_caller);
        if let Some(uploads) = by_caller.get_mut(&self.caller) {
            *uploads -= 1;
            if *uploads == 0 {
                by_caller.remove(&self.caller);
            }
        }
    }
}

fn lock(by_caller: &UploadsByCaller) -> MutexGuard<'_, HashMap<String, usize>> {
    by_caller.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An archive that the store keeps, as reported to the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) digest: ContextDigest,
    pub(crate) size_bytes: i64,
    pub(crate) expires_at: Timestamp,
}

/// A download in progress.
#[derive(Debug)]
pub(crate) struct Download {
    store: Store,
    pub(crate) kept: KeptContext,
    next: i64,
}

impl Contexts {
    /// Maximum number of concurrent uploads.
    const UPLOADS: usize = 8;
    /// Maximum number of concurrent uploads of a caller, so that nobody holds all of them.
    const UPLOADS_OF_CALLER: usize = 4;

    pub(crate) fn new(store: Store, limit: u64, retain: Duration) -> Self {
        let uploads = Arc::new(Semaphore::new(Self::UPLOADS));
        Self { store, limit, retain, uploads, by_caller: Arc::default() }
    }

    /// Takes a place for an upload of a caller.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyUploads`] if too many uploads, or too many of this caller, are in progress.
    fn place(&self, caller: &Principal) -> Result<Place, Error> {
        let permit = Arc::clone(&self.uploads).try_acquire_owned().map_err(|_| Error::TooManyUploads)?;
        let mut by_caller = lock(&self.by_caller);
        let uploads = by_caller.entry(caller.subject().to_owned()).or_default();
        if *uploads >= Self::UPLOADS_OF_CALLER {
            return Err(Error::TooManyUploads);
        }
        *uploads += 1;
        drop(by_caller);
        Ok(Place {
            caller: caller.subject().to_owned(),
            by_caller: Arc::clone(&self.by_caller),
            _permit: permit,
        })
    }

    /// Starts an upload, unless the store already keeps an archive with the expected digest.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] unless the caller is a builder, and [`Error::TooManyUploads`] if too
    /// many uploads are in progress.
    pub(crate) async fn begin(
        &self,
        caller: &Principal,
        expected: Option<ContextDigest>,
    ) -> Result<Begun, Error> {
        caller.require(Role::Builder)?;
        if let Some(digest) = &expected
            && let Some(kept) = self.store.use_context(caller, digest).await?
        {
            return Ok(Begun::Known(self.taken(digest.clone(), &kept)));
        }
        let place = self.place(caller)?;
        Ok(Begun::Upload(Box::new(Upload {
            id: self.store.begin_context(caller).await?,
            caller: caller.clone(),
            contexts: self.clone(),
            expected,
            inspection: Inspection::new(self.limit),
            buffer: Vec::new(),
            chunks: 0,
            _place: place,
        })))
    }

    /// Starts the download of an attempt's archive by the worker that holds the attempt.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the worker does not hold the attempt or the build has no archive.
    pub(crate) async fn download(&self, caller: &Principal, attempt: Attempt) -> Result<Download, Error> {
        let kept = self.store.context_of(caller.subject(), attempt).await?;
        let kept = kept.ok_or(Error::NotFound(Resource::Build(attempt.build)))?;
        Ok(Download { store: self.store.clone(), kept, next: 0 })
    }

    fn taken(&self, digest: ContextDigest, kept: &KeptContext) -> Taken {
        Taken { digest, size_bytes: kept.size_bytes, expires_at: kept.used_at.after(self.retain) }
    }
}

impl Upload {
    const CHUNK: usize = 512 * 1024;

    /// Checks and stores the next bytes.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] if the archive violates a rule, [`Error::CreatorQuotaExceeded`] if the
    /// caller's archives have too many bytes, and [`Error::Busy`] if earlier bytes were removed because the
    /// upload took too long.
    pub(crate) async fn take(&mut self, bytes: Bytes) -> Result<(), Error> {
        self.inspect(bytes.clone()).await?;
        self.buffer.extend(bytes);
        while self.buffer.len() >= Self::CHUNK {
            let rest = self.buffer.split_off(Self::CHUNK);
            let chunk = std::mem::replace(&mut self.buffer, rest);
            self.keep(chunk).await?;
        }
        Ok(())
    }

    /// Checks bytes on a blocking thread, because they may unpack to a thousand times as much.
    async fn inspect(&mut self, bytes: Bytes) -> Result<(), Error> {
        let mut inspection = std::mem::replace(&mut self.inspection, Inspection::new(0));
        let looked = tokio::task::spawn_blocking(move || {
            let taken = inspection.take(&bytes);
            (inspection, taken)
        });
        let (inspection, taken) = looked.await.map_err(|error| Error::Internal(error.into()))?;
        self.inspection = inspection;
        taken.map_err(refused)
    }

    /// Finishes the upload: the archive is durable then, and configurations may name it.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] if the archive is incomplete, violates a rule or does not have the expected
    /// digest, and [`Error::Busy`] if earlier bytes were removed because the upload took too long. The upload
    /// is discarded on errors.
    pub(crate) async fn finish(mut self) -> Result<Taken, Error> {
        let finished = self.try_finish().await;
        if finished.is_err() {
            self.give_up().await;
        }
        finished
    }

    async fn try_finish(&mut self) -> Result<Taken, Error> {
        let inspection = std::mem::replace(&mut self.inspection, Inspection::new(0));
        let found: Inspected = inspection.finish().map_err(refused)?;
        if self.expected.as_ref().is_some_and(|expected| *expected != found.digest) {
            let rule = format!("must be the digest of what is sent, which has {}", found.digest);
            return Err(Error::Invalid(Violations::one("start.digest", rule)));
        }
        let rest = std::mem::take(&mut self.buffer);
        if !rest.is_empty() {
            self.keep(rest).await?;
        }
        let kept = self.contexts.store.finish_context(&self.caller, self.id, &found, self.chunks).await?;
        Ok(self.contexts.taken(found.digest, &kept))
    }

    /// Discards the upload.
    pub(crate) async fn give_up(self) {
        if let Err(error) = self.contexts.store.give_up_context(self.id).await {
            // The remains are removed once their retention period is over.
            tracing::warn!(%error, "cannot give up an upload");
        }
    }

    async fn keep(&mut self, chunk: Vec<u8>) -> Result<(), Error> {
        self.contexts.store.append_context(&self.caller, self.id, self.chunks, chunk).await?;
        self.chunks += 1;
        Ok(())
    }
}

impl Download {
    /// Returns the next chunk, or `None` at the end.
    ///
    /// # Errors
    ///
    /// Returns an error if the store cannot be read.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let chunk = self.store.context_chunk(self.kept.upload, self.next).await?;
        self.next += 1;
        Ok(chunk)
    }
}

fn refused(refused: Refused) -> Error {
    Error::Invalid(Violations::one("chunk", refused.to_string()))
}
