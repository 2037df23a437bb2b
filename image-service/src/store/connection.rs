//! The connection that writes.

use std::{borrow::Cow, sync::Arc, time::Duration};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, TransactionTrait,
    error::ConnAcquireErr,
};
use tokio::time::timeout;

use super::{changes, connecting, is_disconnected};
use crate::{
    change::Revision,
    writer::{self, Step},
};

/// The one connection that writes, and what begins and ends its transactions.
///
/// sea-orm lends a single connection of a pool as a transaction only. So it is held as one for good, and its transactions are begun
/// and ended by statements: the connection need not go back to the pool between them, which asks it every time whether it lives.
#[derive(Debug)]
pub(super) struct Connection {
    /// Rolls back when it is dropped.
    held: DatabaseTransaction,
    pool: DatabaseConnection,
}

impl Connection {
    /// The lock of all who write to a Postgres database.
    const WRITE_LOCK: i64 = 0x7472_6169_6c65_7201;
    /// The time that a server may take to begin or end a transaction. One that the network has lost says nothing for a quarter of
    /// an hour.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Takes the connection of a pool of one.
    pub(super) async fn of(pool: DatabaseConnection) -> Result<Self, DbErr> {
        let held = pool.begin().await?;
        held.execute_unprepared("ROLLBACK").await?;
        Ok(Self { held, pool })
    }

    /// Executes statements within the transaction that was begun.
    pub(super) fn statements(&self) -> &DatabaseTransaction {
        &self.held
    }
}

impl writer::Connection for Connection {
    type Error = DbErr;

    async fn open(url: &str) -> Result<Self, DbErr> {
        Self::of(connecting::connect(url, 1).await?).await
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
        let executed = self.held.execute_unprepared(&sql);
        if is_remote {
            let too_late = |_| Err(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout));
            return timeout(Self::PATIENCE, executed).await.unwrap_or_else(too_late).map(drop);
        }
        executed.await.map(drop)
    }

    async fn latest(&self) -> Result<Revision, DbErr> {
        Ok(changes::revisions(&self.held).await?.latest)
    }

    async fn close(self: Arc<Self>) {
        let pool = self.pool.clone();
        // It rolls back when it is dropped, which is to have something to roll back.
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
