//! One write within a shared transaction, whose statements are sent together where possible.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, QueryTrait, Statement,
};

use super::{storage::Storage, write_connection::Connection};
use crate::{change::Revision, error::Error, writer::TransactionGuard};

/// A write in a transaction that the [`Writer`](crate::writer::Writer) has lent. It is undone unless
/// committed.
///
/// Statements deferred by [`defer`](Self::defer) are executed before its next statement or commit. On SQLite
/// they go to the connection's thread in one message, because a round trip takes longer than most statements.
#[derive(Debug)]
pub(super) struct WriteTransaction {
    guard: TransactionGuard<Connection>,
    storage: Storage,
    deferred: Mutex<Vec<Statement>>,
    /// Set once a statement has failed.
    failed: AtomicBool,
    /// Latest revision that the write has logged.
    reached: Mutex<Option<Revision>>,
}

impl WriteTransaction {
    /// Maximum number of statements sent together. The connection keeps them prepared.
    const TOGETHER: usize = 20;

    pub(super) fn new(guard: TransactionGuard<Connection>, storage: Storage) -> Self {
        let (deferred, failed, reached) = (Mutex::default(), AtomicBool::new(false), Mutex::default());
        Self { guard, storage, deferred, failed, reached }
    }

    /// Defers a statement until just before the next one or the commit, which then fails if it does.
    pub(super) fn defer(&self, write: impl QueryTrait) {
        self.defer_raw(write.build(self.get_database_backend()));
    }

    pub(super) fn defer_raw(&self, write: Statement) {
        self.waiting().push(write);
    }

    /// Records the latest logged revision, to be published on commit.
    pub(super) fn reach(&self, revision: Revision) {
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner) = Some(revision);
    }

    /// Commits with the writes that share the transaction, even if the call is cancelled meanwhile.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] also if the outcome is unknown, and [`Error::StorageFull`] if nothing was
    /// committed because the database has no space left.
    pub(super) async fn commit(self) -> Result<(), Error> {
        self.write().await?;
        if self.failed.into_inner() {
            // Postgres would accept the COMMIT, but roll back all writes that share it.
            return Err(DbErr::Custom("a statement of the transaction failed".to_owned()).into());
        }
        let reached = self.reached.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.guard.commit(reached).await.inspect_err(|error| self.storage.note(error))
    }

    /// Undoes the write and waits until whatever it has read is committed, so that it can be reported.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if that was not committed.
    pub(super) async fn rollback(self) -> Result<(), Error> {
        self.guard.rollback().await
    }

    fn txn(&self) -> &DatabaseTransaction {
        self.guard.connection().statements()
    }

    /// Executes a statement, and records whether it has failed.
    async fn noting<T>(&self, executing: impl Future<Output = Result<T, DbErr>>) -> Result<T, DbErr> {
        let result = self.guard.connection().within_patience(executing).await;
        if let Err(error) = &result {
            self.failed.store(true, Ordering::Relaxed);
            self.storage.note(&Error::from(error.clone()));
        }
        result
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Statement>> {
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executes the deferred statements.
    async fn write(&self) -> Result<(), DbErr> {
        let at_once = if self.get_database_backend() == DbBackend::Sqlite { Self::TOGETHER } else { 1 };
        let mut waiting = std::mem::take(&mut *self.waiting()).into_iter();
        while let Some(statement) = waiting.by_ref().take(at_once).reduce(together) {
            self.noting(self.txn().execute_raw(statement)).await?;
        }
        Ok(())
    }

    /// Joins the deferred statements and a query into one, or executes them before it.
    async fn after_deferred(&self, query: Statement) -> Result<Statement, DbErr> {
        let can_be_together = self.get_database_backend() == DbBackend::Sqlite
            && self.waiting().len() < Self::TOGETHER
            // Numbered parameters would refer to the values of the first statement.
            && !query.sql.contains('$');
        if !can_be_together {
            self.write().await?;
            return Ok(query);
        }
        let waiting = std::mem::take(&mut *self.waiting());
        Ok(match waiting.into_iter().reduce(together) {
            Some(before) => together(before, query),
            None => query,
        })
    }
}

/// Joins two statements into one for SQLite, which takes the values in their order.
fn together(mut first: Statement, second: Statement) -> Statement {
    first.sql.push_str("; ");
    first.sql.push_str(&second.sql);
    if let Some(values) = second.values {
        match &mut first.values {
            Some(all) => all.0.extend(values.0),
            none => *none = Some(values),
        }
    }
    first
}

#[async_trait]
impl ConnectionTrait for WriteTransaction {
    fn get_database_backend(&self) -> DbBackend {
        self.txn().get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        // Separate from them, because the result is its own number of changed rows.
        self.write().await?;
        self.noting(self.txn().execute_raw(statement)).await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.write().await?;
        self.noting(self.txn().execute_unprepared(sql)).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        let statement = self.after_deferred(statement).await?;
        self.noting(self.txn().query_one_raw(statement)).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        let statement = self.after_deferred(statement).await?;
        self.noting(self.txn().query_all_raw(statement)).await
    }
}

#[cfg(test)]
mod tests;
