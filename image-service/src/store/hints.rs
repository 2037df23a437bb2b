//! Hints between the replicas that share a Postgres: what was committed elsewhere. SQLite has one process, which needs none.
//!
//! A hint that is lost costs time and nothing else: every reader polls, too.

use sea_orm::{
    ConnectionTrait, DbBackend, DbErr, Statement,
    sqlx::{Error as SqlxError, postgres::PgListener},
};

use super::{Store, writing::Writing};
use crate::hint::Hint;

const CHANNEL: &str = "trailer_hints";

/// Hears what is committed by all replicas.
#[derive(Debug)]
pub(crate) struct Hints(PgListener);

impl Store {
    /// Begins to hear what is committed elsewhere; `None` when there is no elsewhere.
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
    /// Waits for the next hint; connects again where needed.
    pub(crate) async fn next(&mut self) -> Result<Hint, SqlxError> {
        let heard = self.0.try_recv().await?;
        // Whatever was committed while nobody listened was not heard.
        Ok(heard.map_or(Hint::Anything, |heard| Hint::parse(heard.payload())))
    }
}

/// Sends a hint with the transaction; the database sends equal ones once.
pub(super) fn send(txn: &Writing, hint: Hint) {
    if txn.get_database_backend() == DbBackend::Postgres {
        let values = [CHANNEL.into(), hint.to_string().into()];
        let notify = Statement::from_sql_and_values(DbBackend::Postgres, "SELECT pg_notify($1, $2)", values);
        txn.later_raw(notify);
    }
}
