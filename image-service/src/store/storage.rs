//! The room for more on the disk of the database.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use sea_orm::{ConnectionTrait, DbBackend, DbErr, EntityTrait, ExprTrait, Statement, sea_query::Expr};
use tokio::sync::watch;

use super::{Store, entity::catalogue, required};
use crate::{error::Error, turns::Turn};

/// The state of the storage, shared by the clones of a store.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    /// True while the storage is full, or nearly full.
    is_full: Arc<watch::Sender<bool>>,
    /// Directory of a SQLite database.
    directory: Option<PathBuf>,
    /// Free space below which nothing is added, in bytes.
    min_free: u64,
}

impl Storage {
    pub(super) fn new(directory: Option<&Path>) -> Self {
        let directory = directory.map(Path::to_owned);
        Self { is_full: Arc::new(watch::Sender::new(false)), directory, min_free: 0 }
    }

    /// Records that the database refused a write for lack of space.
    pub(super) fn note(&self, error: &Error) {
        if matches!(error, Error::StorageFull) {
            self.set(true);
        }
    }

    fn set(&self, is_full: bool) {
        if !self.is_full.send_if_modified(|full| std::mem::replace(full, is_full) != is_full) {
            return;
        }
        if is_full {
            tracing::error!("the disk of the catalogue is full: nothing is added (STORAGE_FULL)");
        } else {
            tracing::info!("the disk of the catalogue has room again");
        }
    }

    /// Returns how much is missing to the reserve on the disk of a SQLite database, in bytes.
    fn missing(&self) -> u64 {
        let free = self.directory.as_ref().and_then(|directory| {
            let found = rustix::fs::statvfs(directory).ok()?;
            Some(found.f_bavail.saturating_mul(found.f_frsize))
        });
        free.map_or(0, |free| self.min_free.saturating_sub(free))
    }
}

impl Store {
    /// Sets the free space of a SQLite database's disk below which writes of callers add nothing, in bytes.
    pub(crate) fn with_min_free_disk(self, min_free: u64) -> Self {
        Self { storage: Storage { min_free, ..self.storage }, ..self }
    }

    /// Watches whether the storage is full.
    pub(crate) fn storage_full(&self) -> watch::Receiver<bool> {
        self.storage.is_full.subscribe()
    }

    /// Checks that there is room for more, beside what running builds report.
    ///
    /// # Errors
    ///
    /// Returns [`Error::StorageFull`] if there is none.
    pub(crate) fn require_storage(&self) -> Result<(), Error> {
        if *self.storage.is_full.borrow() { Err(Error::StorageFull) } else { Ok(()) }
    }

    /// Looks whether the storage is full. After the database has refused a write for lack of space, another one
    /// is tried.
    pub(crate) async fn probe_storage(&self) {
        let was_full = *self.storage.is_full.borrow();
        let missing = self.storage.missing();
        let is_low = missing > 0 && self.unused_bytes().await.unwrap_or(0) < missing;
        self.storage.set(is_low || was_full && self.write_nothing().await.is_err());
    }

    /// Returns the size of the free pages in the file of a SQLite database.
    async fn unused_bytes(&self) -> Result<u64, DbErr> {
        let sql = "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size";
        let row = self.health_reader.query_one_raw(Statement::from_string(DbBackend::Sqlite, sql)).await?;
        let unused: i64 = required(row, "the free pages")?.try_get_by_index(0)?;
        Ok(u64::try_from(unused).unwrap_or(0))
    }

    /// Commits a transaction that changes nothing.
    async fn write_nothing(&self) -> Result<(), Error> {
        let txn = self.write(Turn::Background).await?;
        let unchanged = Expr::col(catalogue::Column::IndexBytes).add(0);
        txn.defer(catalogue::Entity::update_many().col_expr(catalogue::Column::IndexBytes, unchanged));
        txn.commit().await
    }
}
