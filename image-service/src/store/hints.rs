//! Hints between replicas on Postgres about what each has committed. SQLite has a single process, which needs
//! none.
//!
//! A lost hint costs only time, because every reader polls, too.

use sea_orm::{
    ConnectionTrait, DbBackend, DbErr, Statement,
    sqlx::{Error as SqlxError, postgres::PgListener},
};

use super::{Store, transaction::WriteTransaction};
use crate::hint::Hint;

const CHANNEL: &str = "trailer_hints";

/// A subscription to the hints of all replicas.
#[derive(Debug)]
pub(crate) struct Hints(PgListener);

impl Store {
    /// Subscribes to the hints of all replicas; `None` on SQLite.
    ///
    /// # Errors
    ///
    /// Returns an error if the database cannot be reached or refuses the subscription.
    pub(crate) async fn hints(&self) -> Result<Option<Hints>, DbErr> {
        if self.backend() != DbBackend::Postgres {
            return Ok(None);
        }
        let mut listener = PgListener::connect_with(self.reader.get_postgres_connection_pool())
            .await
            .map_err(|error| DbErr::Custom(error.to_string()))?;
        listener.listen(CHANNEL).await.map_err(|error| DbErr::Custom(error.to_string()))?;
        Ok(Some(Hints(listener)))
    }
}

impl Hints {
    /// Waits for the next hint, and reconnects as needed.
    ///
    /// # Errors
    ///
    /// Returns an error if the connection is lost and no other can be opened.
    pub(crate) async fn next(&mut self) -> Result<Hint, SqlxError> {
        let notification = self.0.try_recv().await?;
        // Hints sent while the connection was down are lost.
        Ok(notification.map_or(Hint::Anything, |notification| Hint::parse(notification.payload())))
    }
}

/// Sends a hint when the transaction commits. Postgres sends equal ones once.
pub(super) fn send(txn: &WriteTransaction, hint: Hint) {
    if txn.get_database_backend() == DbBackend::Postgres {
        let values = [CHANNEL.into(), hint.to_string().into()];
        let notify = Statement::from_sql_and_values(DbBackend::Postgres, "SELECT pg_notify($1, $2)", values);
        txn.defer_raw(notify);
    }
}
