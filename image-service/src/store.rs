//! The database: one method, one transaction. The only place that knows sea-orm.
//!
//! SQLite or Postgres, with the same promises: no two transactions write at once, so a decision is committed upon the rows that
//! it was made from, and revisions are in the order of commits. One task writes (the [writer](crate::writer)): its transactions
//! begin IMMEDIATE on SQLite, and with a lock that all replicas share on Postgres. Readers never wait for writers. Whatever a
//! method has returned survives a power cut (`synchronous=FULL` on SQLite). Times that are stored, and the present that they are
//! compared with, are of one clock: the database's on Postgres, whichever replica asks.

use std::{borrow::Cow, path::Path};

use sea_orm::{
    AccessMode, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, EntityTrait,
    IsolationLevel, RuntimeErr, Statement, TransactionTrait, sqlx::Error as SqlxError,
};
use uuid::Uuid;

use crate::{
    change::{CommittedRevision, Revision},
    dispatch::Policy,
    error::Error,
    image::Quotas,
    timestamp::Timestamp,
    turns::Turn,
    writer::Writer,
};

#[cfg(all(test, feature = "simulation"))]
pub(crate) use self::connecting::execute;
use self::{connection::Connection, writing::Writing};
pub(crate) use self::{
    edits::{BatchOutcome, BatchTarget, WithBuild},
    records::ChangedRecords,
    write::Write,
};

mod builds;
mod changes;
mod connecting;
mod connection;
mod contexts;
mod creation;
mod decided;
mod dispatching;
mod edits;
mod entity;
mod grants;
mod hints;
mod histories;
mod images;
mod made;
mod migration;
mod queue;
mod records;
mod references;
mod retention;
mod rows;
mod usage;
mod values;
mod workers;
mod write;
mod writing;

/// A handle to the catalogue's database.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    reader: DatabaseConnection,
    writer: Writer<Connection>,
    /// A pool for the index alone, for which all reads wait: it waits for none of them.
    index_reader: DatabaseConnection,
    /// A pool of one, for nobody but who asks whether the database answers: it waits for no other.
    asked: DatabaseConnection,
    history: Uuid,
    policy: Policy,
    quotas: Quotas,
    /// Stands for the clock.
    #[cfg(all(test, feature = "simulation"))]
    clock: Option<std::sync::Arc<std::sync::atomic::AtomicI64>>,
}

impl Store {
    const READERS: u32 = 8;
    /// The follower, an ask, and one that compares; the loader has them for itself.
    const INDEX_READERS: u32 = 3;

    /// Opens the database at a `postgres://` URL, or else the one in the data directory, creating or migrating it where needed.
    pub(crate) async fn open(data_dir: &Path, url: Option<&str>, policy: Policy) -> Result<Self, DbErr> {
        let url = url.map_or_else(
            || format!("sqlite://{}?mode=rwc", data_dir.join("catalogue.sqlite").display()),
            ToOwned::to_owned,
        );
        let connection = connecting::connect(&url, 1).await?;
        connecting::migrate(&connection).await?;
        let reader = connecting::connect(&url, Self::READERS).await?;
        let index_reader = connecting::connect(&url, Self::INDEX_READERS).await?;
        let asked = connecting::connect(&url, 1).await?;
        let catalogue = required(entity::catalogue::Entity::find_by_id(1).one(&reader).await?, "catalogue")?;
        let latest = Revision { number: catalogue.revision, nonce: catalogue.nonce };
        let writer = Writer::start(&url, Connection::of(connection).await?, latest);
        Ok(Self {
            reader,
            writer,
            index_reader,
            asked,
            history: catalogue.history,
            policy,
            quotas: Quotas::UNLIMITED,
            #[cfg(all(test, feature = "simulation"))]
            clock: None,
        })
    }

    /// Bounds what images may take up.
    pub(crate) fn with_quotas(self, quotas: Quotas) -> Self {
        Self { quotas, ..self }
    }

    /// Goes by another clock than the database's.
    #[cfg(all(test, feature = "simulation"))]
    pub(crate) fn with_clock(self, clock: std::sync::Arc<std::sync::atomic::AtomicI64>) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// Names this database. One that was restored from a backup has the same name, and is told by the nonces of its revisions.
    pub(crate) fn history(&self) -> Uuid {
        self.history
    }

    /// The times and limits of dispatch.
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Waits for what is under way and closes the connections.
    pub(crate) async fn close(self) -> Result<(), DbErr> {
        self.writer.close().await;
        self.asked.close().await?;
        self.index_reader.close().await?;
        self.reader.close().await
    }

    /// Waits for the end of the task that writes, which before [`close`](Self::close) only a panic ends.
    pub(crate) async fn writer_ended(&self) {
        self.writer.ended().await;
    }

    /// Executes a statement in a transaction of its own.
    #[cfg(test)]
    pub(crate) async fn execute(&self, sql: &str) -> Result<(), Error> {
        let txn = self.write(Turn::Background).await?;
        txn.execute_unprepared(sql).await?;
        txn.commit().await
    }

    /// Returns the latest revision that was committed, where that is known without asking the database: not where others write,
    /// too.
    pub(crate) fn committed(&self) -> CommittedRevision {
        match self.backend() {
            DbBackend::Sqlite => *self.writer.committed().borrow(),
            DbBackend::Postgres | DbBackend::MySql | _ => CommittedRevision::Unknown,
        }
    }

    /// Fails unless the database answers.
    pub(crate) async fn ask(&self) -> Result<(), Error> {
        Ok(self.asked.ping().await?)
    }

    fn backend(&self) -> DbBackend {
        self.reader.get_database_backend()
    }

    /// Waits for a turn to write, and begins.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyWrites`], and [`Error::Busy`] when the turn does not come.
    async fn write(&self, turn: Turn<'_>) -> Result<Writing, Error> {
        Ok(Writing::new(self.writer.begin(turn).await?))
    }

    /// Returns the present, by the clock that all who share the database have in common.
    pub(crate) async fn present(&self) -> Result<Timestamp, Error> {
        Ok(self.now(&self.reader).await?)
    }

    /// The present, by the clock that all who share the database have in common: its own on Postgres, this machine's on SQLite.
    async fn now(&self, db: &impl ConnectionTrait) -> Result<Timestamp, DbErr> {
        #[cfg(all(test, feature = "simulation"))]
        if let Some(clock) = &self.clock {
            return Ok(Timestamp::from_micros(clock.load(std::sync::atomic::Ordering::Relaxed)));
        }
        if self.backend() != DbBackend::Postgres {
            return Ok(Timestamp::now());
        }
        // The time of the transaction would be that from before it waited for its turn.
        let sql = "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint";
        let row = db.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
        required(row, "the time")?.try_get_by_index(0)
    }

    /// Begins a transaction that reads everything as of one moment.
    async fn read(&self) -> Result<DatabaseTransaction, DbErr> {
        begin_to_read(&self.reader).await
    }
}

async fn begin_to_read(pool: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    if pool.get_database_backend() == DbBackend::Postgres {
        let (isolation, access) = (IsolationLevel::RepeatableRead, AccessMode::ReadOnly);
        return pool.begin_with_config(Some(isolation), Some(access)).await;
    }
    pool.begin().await
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        if is_passing(&error) { Self::Busy } else { Self::Internal(Box::new(error)) }
    }
}

/// What sqlx says is wrong.
fn sqlx_error(error: &DbErr) -> Option<&SqlxError> {
    let (DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))
    | DbErr::Conn(RuntimeErr::SqlxError(error))) = error
    else {
        return None;
    };
    Some(error.as_ref())
}

/// What the database says is wrong, by its code.
fn error_code(error: &DbErr) -> Option<Cow<'_, str>> {
    sqlx_error(error)?.as_database_error()?.code()
}

/// Returns whether the connection is of no use any more.
fn is_disconnected(error: &DbErr) -> bool {
    error_code(error).is_none_or(|code| {
        code.len() == 5 && ["08", "57P"].iter().any(|class| code.starts_with(class)) || code == "25P03"
    })
}

/// Whether the same may work a little later: another process has held a lock for too long (SQLITE_BUSY, or Postgres'
/// lock_not_available), two were in each other's way, this process was too slow in the middle of a transaction, or the database has
/// gone and comes back.
fn is_passing(error: &DbErr) -> bool {
    const OF_SQLITE: [&str; 3] = ["5", "261", "517"];
    const OF_POSTGRES: [&str; 9] =
        ["55P03", "57014", "40P01", "40001", "57P01", "57P02", "57P03", "25P03", "53300"];
    if let Some(code) = error_code(error) {
        return OF_SQLITE.iter().chain(&OF_POSTGRES).any(|passing| *passing == code)
            || code.len() == 5 && code.starts_with("08");
    }
    use SqlxError::{Io, PoolClosed, PoolTimedOut, WorkerCrashed};
    matches!(error, DbErr::ConnectionAcquire(_))
        || matches!(sqlx_error(error), Some(Io(_) | PoolTimedOut | PoolClosed | WorkerCrashed))
}

/// Returns what was read of a row that is there.
fn required<T>(row: Option<T>, what: &str) -> Result<T, DbErr> {
    row.ok_or_else(|| DbErr::RecordNotFound(what.to_owned()))
}
