//! The connection that writes.

use std::{sync::Arc, time::Duration};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, TransactionTrait,
    error::ConnAcquireErr,
};
use tokio::time::timeout;

use crate::store::connecting;

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

    pub(super) async fn open(url: &str) -> Result<Self, DbErr> {
        Self::of(connecting::connect(url, 1).await?).await
    }

    /// Takes the connection of a pool of one.
    pub(super) async fn of(pool: DatabaseConnection) -> Result<Self, DbErr> {
        let held = pool.begin().await?;
        let connection = Self { held, pool };
        connection.rollback().await?;
        Ok(connection)
    }

    /// Executes statements within the transaction that was begun.
    pub(super) fn statements(&self) -> &DatabaseTransaction {
        &self.held
    }

    /// Begins a transaction that no other writes beside.
    pub(super) async fn begin(&self) -> Result<(), DbErr> {
        if self.is_remote() {
            return self.execute(&format!("BEGIN; SELECT pg_advisory_xact_lock({})", Self::WRITE_LOCK)).await;
        }
        self.execute("BEGIN IMMEDIATE").await
    }

    /// Sets the savepoint for the first time.
    pub(super) async fn save(&self) -> Result<(), DbErr> {
        self.execute("SAVEPOINT kept").await
    }

    /// Sets the savepoint anew, after what was written since.
    pub(super) async fn save_again(&self) -> Result<(), DbErr> {
        self.execute("RELEASE kept; SAVEPOINT kept").await
    }

    /// Undoes what was written since the savepoint, which stays.
    pub(super) async fn rollback_to_savepoint(&self) -> Result<(), DbErr> {
        self.execute("ROLLBACK TO kept").await
    }

    pub(super) async fn commit(&self) -> Result<(), DbErr> {
        self.execute("COMMIT").await
    }

    pub(super) async fn rollback(&self) -> Result<(), DbErr> {
        self.execute("ROLLBACK").await
    }

    /// Closes it, once nobody holds it any more.
    pub(super) async fn close(self: Arc<Self>) {
        let pool = self.pool.clone();
        // It rolls back when it is dropped, which is to have something to roll back.
        let _ = self.execute("BEGIN").await;
        drop(self);
        if let Err(error) = pool.close().await {
            tracing::warn!(%error, "cannot close the connection that writes");
        }
    }

    async fn execute(&self, sql: &str) -> Result<(), DbErr> {
        let executed = self.held.execute_unprepared(sql);
        let executed = if self.is_remote() {
            let too_late = |_| Err(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout));
            timeout(Self::PATIENCE, executed).await.unwrap_or_else(too_late)
        } else {
            executed.await
        };
        executed.map(drop)
    }

    fn is_remote(&self) -> bool {
        self.held.get_database_backend() == DbBackend::Postgres
    }
}
