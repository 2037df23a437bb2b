//! One write: its part of a transaction that no other writes beside, with its statements sent together where they can be.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, QueryTrait, Statement,
};

use super::connection::Connection;
use crate::{change::Revision, error::Error, writer::Lent};

/// A write within the transaction that the [`Writer`](crate::writer::Writer) has lent to it. Unless it is committed, it is undone.
///
/// What it writes [`later`](Self::later) is written before the next of its statements, or before it commits. On SQLite that is in
/// one message to the connection's thread, the way to which and back takes longer than most statements.
#[derive(Debug)]
pub(super) struct Writing {
    lent: Lent<Connection>,
    later: Mutex<Vec<Statement>>,
    /// A statement has failed.
    failed: AtomicBool,
    /// The latest revision that it has logged.
    reached: Mutex<Option<Revision>>,
}

impl Writing {
    /// How many statements are sent together at most: the connection keeps them prepared.
    const TOGETHER: usize = 20;

    pub(super) fn new(lent: Lent<Connection>) -> Self {
        Self { lent, later: Mutex::default(), failed: AtomicBool::new(false), reached: Mutex::default() }
    }

    /// Writes this before anything else is done in this transaction. If that fails, what is done next fails.
    pub(super) fn later(&self, write: impl QueryTrait) {
        self.later_raw(write.build(self.get_database_backend()));
    }

    pub(super) fn later_raw(&self, write: Statement) {
        self.waiting().push(write);
    }

    /// Notes that this revision was logged, to be published when it is committed.
    pub(super) fn reach(&self, revision: Revision) {
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner) = Some(revision);
    }

    /// Commits with the others that share the transaction. If the call is cancelled meanwhile, it is committed all the same.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] also when it is unknown whether it was committed.
    pub(super) async fn commit(self) -> Result<(), Error> {
        self.write().await?;
        if self.failed.into_inner() {
            // Postgres would take the COMMIT, and roll all back that share it.
            return Err(DbErr::Custom("a statement of the transaction failed".to_owned()).into());
        }
        let reached = self.reached.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.lent.commit(reached).await
    }

    /// Undoes it, and waits until whatever it has read is committed, so that the caller can be told of it.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] when that was not committed.
    pub(super) async fn rollback(self) -> Result<(), Error> {
        self.lent.rollback().await
    }

    fn txn(&self) -> &DatabaseTransaction {
        self.lent.connection().statements()
    }

    /// Notes whether a statement has failed.
    fn noting<T>(&self, result: Result<T, DbErr>) -> Result<T, DbErr> {
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Statement>> {
        self.later.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what waits.
    async fn write(&self) -> Result<(), DbErr> {
        let at_once = if self.get_database_backend() == DbBackend::Sqlite { Self::TOGETHER } else { 1 };
        let mut waiting = std::mem::take(&mut *self.waiting()).into_iter();
        while let Some(statement) = waiting.by_ref().take(at_once).reduce(together) {
            self.noting(self.txn().execute_raw(statement).await)?;
        }
        Ok(())
    }

    /// What is to be asked, with what is to be written before it, or after that is written.
    async fn after_what_waits(&self, asked: Statement) -> Result<Statement, DbErr> {
        let can_be_together = self.get_database_backend() == DbBackend::Sqlite
            && self.waiting().len() < Self::TOGETHER
            // Values that are numbered are so from the first one on.
            && !asked.sql.contains('$');
        if !can_be_together {
            self.write().await?;
            return Ok(asked);
        }
        let waiting = std::mem::take(&mut *self.waiting());
        Ok(match waiting.into_iter().reduce(together) {
            Some(before) => together(before, asked),
            None => asked,
        })
    }
}

/// Two statements as one of SQLite, which takes the values in their order.
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
impl ConnectionTrait for Writing {
    fn get_database_backend(&self) -> DbBackend {
        self.txn().get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        // Apart, for what is told is how many rows it has changed.
        self.write().await?;
        self.noting(self.txn().execute_raw(statement).await)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.write().await?;
        self.noting(self.txn().execute_unprepared(sql).await)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        let statement = self.after_what_waits(statement).await?;
        self.noting(self.txn().query_one_raw(statement).await)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        let statement = self.after_what_waits(statement).await?;
        self.noting(self.txn().query_all_raw(statement).await)
    }
}

#[cfg(test)]
mod tests;
