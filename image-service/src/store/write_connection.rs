//! The write connection.

use std::{borrow::Cow, sync::Arc, time::Duration};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, TransactionTrait,
    error::ConnAcquireErr,
};
use tokio::time::timeout;

use super::{change_log, is_disconnected, pool};
use crate::{
    change::Revision,
    writer::{self, Step},
};

/// The single connection that writes.
///
/// sea-orm lends a single connection of a pool only as a transaction, so this one is held for good, and the
/// real transactions are begun and ended by statements. That also saves the pool's liveness check between
/// transactions.
#[derive(Debug)]
pub(super) struct Connection {
    /// Stands for the connection; rolls back when it is dropped.
    held: DatabaseTransaction,
    pool: DatabaseConnection,
}

impl Connection {
    /// Key of the Postgres advisory lock that serialises writes.
    const WRITE_LOCK: i64 = 0x7472_6169_6c65_7201;
    /// Maximum time of a statement. Without it, a server lost by the network is noticed only after 15 minutes.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Takes over the connection of a single-connection pool.
    pub(super) async fn new(pool: DatabaseConnection) -> Result<Self, DbErr> {
        let held = pool.begin().await?;
        held.execute_unprepared("ROLLBACK").await?;
        Ok(Self { held, pool })
    }

    /// Waits for a statement; for one on a remote server, not for ever.
    pub(super) async fn within_patience<T>(
        &self,
        executing: impl Future<Output = Result<T, DbErr>>,
    ) -> Result<T, DbErr> {
        if self.held.get_database_backend() != DbBackend::Postgres {
            return executing.await;
        }
        let too_late = |_| Err(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout));
        timeout(Self::PATIENCE, executing).await.unwrap_or_else(too_late)
    }

    /// Returns the handle that executes statements within the current transaction.
    pub(super) fn statements(&self) -> &DatabaseTransaction {
        &self.held
    }
}

impl writer::Connection for Connection {
    type Error = DbErr;

    async fn open(url: &str) -> Result<Self, DbErr> {
        Self::new(pool::connect(url, 1).await?).await
    }

    async fn execute(&self, step: Step) -> Result<(), DbErr> {
        let is_remote = self.held.get_database_backend() == DbBackend::Postgres;
        let sql = match step {
            Step::Begin if is_remote => {
                Cow::Owned(format!("BEGIN; SELECT pg_advisory_xact_lock({})", Self::WRITE_LOCK))
            }
            Step::Begin => "BEGIN IMMEDIATE".into(),
            Step::Save => "SAVEPOINT kept".into(),
            Step::SaveAgain => "RELEASE kept; SAVEPOINT kept".into(),
            Step::Undo => "ROLLBACK TO kept".into(),
            Step::Commit => "COMMIT".into(),
            Step::Rollback => "ROLLBACK".into(),
        };
        self.within_patience(self.held.execute_unprepared(&sql)).await.map(drop)
    }

    async fn latest(&self) -> Result<Revision, DbErr> {
        Ok(change_log::revisions(&self.held).await?.latest)
    }

    async fn close(self: Arc<Self>) {
        let pool = self.pool.clone();
        // It rolls back when it is dropped, and needs a transaction for that.
        let _ = self.held.execute_unprepared("BEGIN").await;
        drop(self);
        if let Err(error) = pool.close().await {
            tracing::warn!(%error, "cannot close the connection that writes");
        }
    }

    fn is_lost(error: &DbErr) -> bool {
        is_disconnected(error)
    }
}

#[cfg(test)]
mod tests;
