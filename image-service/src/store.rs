//! Database access: each method is one transaction. No other module uses sea-orm.
//!
//! SQLite and Postgres give the same guarantees. Write transactions are serialised, so a decision is
//! committed against the rows that it was made from, and revisions are in commit order. One task, the
//! [writer](crate::writer), begins them: `IMMEDIATE` on SQLite, and under a lock that all replicas share on
//! Postgres. Readers never wait for writers. Whatever a method has returned survives a power failure
//! (`synchronous=FULL` on SQLite). Stored times and the time that they are compared with come from one clock:
//! on Postgres the database's, whichever replica asks.
//!
//! Any method returns [`Error::Busy`] if the database is locked or down, [`Error::StorageFull`] if it has no space
//! left, and [`Error::Internal`] if it fails.

use std::{
    borrow::Cow,
    fs::{OpenOptions, Permissions},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

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
pub(crate) use self::pool::execute;
pub(crate) use self::{
    edits::{BatchOutcome, BatchTarget, WithBuild},
    index_rows::ChangedRecords,
    request_transaction::RequestTransaction,
};
use self::{storage::Storage, transaction::WriteTransaction, write_connection::Connection};

mod answers;
mod artifacts;
mod build_history;
mod builds;
mod change_log;
mod contexts;
mod creation;
mod decisions;
mod dispatch_store;
mod edits;
mod engine_images;
mod entity;
mod grants;
mod hints;
mod images;
mod index_rows;
mod migration;
mod pool;
mod queue;
mod references;
mod request_transaction;
mod retention;
mod rows;
mod storage;
mod transaction;
mod usage;
mod values;
mod workers;
mod write_connection;

/// A handle to the catalogue's database.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    reader: DatabaseConnection,
    writer: Writer<Connection>,
    /// Pool reserved for the index: all reads wait for the index, so it must wait for none of them.
    index_reader: DatabaseConnection,
    /// Single-connection pool reserved for health checks, which wait for no other reads.
    health_reader: DatabaseConnection,
    catalogue_id: Uuid,
    policy: Policy,
    quotas: Quotas,
    storage: Storage,
    /// Replacement for the database's clock.
    #[cfg(all(test, feature = "simulation"))]
    clock: Option<std::sync::Arc<std::sync::atomic::AtomicI64>>,
}

impl Store {
    /// Time without a response of the database after which the service counts as not ready.
    ///
    /// All replicas have the same database, so that nothing is gained if all leave at once because it stalls:
    /// calls that need it fail one by one meanwhile.
    pub(crate) const OUTAGE: Duration = Duration::from_secs(20);
    pub(crate) const READERS: u32 = 8;
    /// One each for the follower, a freshness check and the verifier. The loader runs before them and has
    /// all.
    const INDEX_READERS: u32 = 3;

    /// Opens the Postgres database at `url`, or else SQLite in `data_dir`, and migrates it if needed.
    ///
    /// # Errors
    ///
    /// Returns an error if the database cannot be opened, or was created by a version before 0.1.0.
    pub(crate) async fn open(data_dir: &Path, url: Option<&str>, policy: Policy) -> Result<Self, DbErr> {
        let storage = Storage::new(url.is_none().then_some(data_dir));
        let url = match url {
            Some(url) => url.to_owned(),
            None => {
                let file = data_dir.join("catalogue.sqlite");
                make_private(&file).map_err(|error| DbErr::Custom(format!("{}: {error}", file.display())))?;
                format!("sqlite://{}?mode=rwc", file.display())
            }
        };
        let connection = pool::connect(&url, 1).await?;
        pool::migrate(&connection).await?;
        let reader = pool::connect(&url, Self::READERS).await?;
        let index_reader = pool::connect(&url, Self::INDEX_READERS).await?;
        let health_reader = pool::connect(&url, 1).await?;
        let catalogue = required(entity::catalogue::Entity::find_by_id(1).one(&reader).await?, "catalogue")?;
        let latest = Revision { number: catalogue.revision, nonce: catalogue.nonce };
        let writer = Writer::start(&url, Connection::new(connection).await?, latest);
        Ok(Self {
            reader,
            writer,
            index_reader,
            health_reader,
            catalogue_id: catalogue.catalogue_id,
            policy,
            quotas: Quotas::UNLIMITED,
            storage,
            #[cfg(all(test, feature = "simulation"))]
            clock: None,
        })
    }

    /// Sets the quotas that writes are checked against.
    pub(crate) fn with_quotas(self, quotas: Quotas) -> Self {
        Self { quotas, ..self }
    }

    #[cfg(all(test, feature = "simulation"))]
    pub(crate) fn with_clock(self, clock: std::sync::Arc<std::sync::atomic::AtomicI64>) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// Returns the identifier of this database. A restored backup has the same one, but other nonces in later
    /// revisions.
    pub(crate) fn catalogue_id(&self) -> Uuid {
        self.catalogue_id
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Waits for writes under way and closes the connections.
    ///
    /// # Errors
    ///
    /// Returns an error if the connections of a pool cannot be closed.
    pub(crate) async fn close(self) -> Result<(), DbErr> {
        self.writer.close().await;
        self.health_reader.close().await?;
        self.index_reader.close().await?;
        self.reader.close().await
    }

    /// Waits for the writer's task to end, which only a panic causes before [`close`](Self::close).
    pub(crate) async fn writer_ended(&self) {
        self.writer.ended().await;
    }

    /// Executes a statement in its own transaction.
    #[cfg(test)]
    pub(crate) async fn execute(&self, sql: &str) -> Result<(), Error> {
        let txn = self.write(Turn::Background).await?;
        txn.execute_unprepared(sql).await?;
        txn.commit().await
    }

    /// Returns the latest committed revision. It is unknown on Postgres, where other replicas write, too.
    pub(crate) fn committed(&self) -> CommittedRevision {
        match self.backend() {
            DbBackend::Sqlite => *self.writer.committed().borrow(),
            DbBackend::Postgres | DbBackend::MySql | _ => CommittedRevision::Unknown,
        }
    }

    /// Checks that the database responds.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn ping(&self) -> Result<(), Error> {
        Ok(self.health_reader.ping().await?)
    }

    fn backend(&self) -> DbBackend {
        self.reader.get_database_backend()
    }

    /// Waits for a turn to write and begins a transaction.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Writer::begin`].
    async fn write(&self, turn: Turn<'_>) -> Result<WriteTransaction, Error> {
        let begun = self.writer.begin(turn).await.inspect_err(|error| self.storage.note(error))?;
        Ok(WriteTransaction::new(begun, self.storage.clone()))
    }

    /// Returns the current time by the clock that all replicas share.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn present(&self) -> Result<Timestamp, Error> {
        Ok(self.now(&self.reader).await?)
    }

    /// Returns the current time: by the database's clock on Postgres, by this machine's on SQLite.
    async fn now(&self, db: &impl ConnectionTrait) -> Result<Timestamp, DbErr> {
        #[cfg(all(test, feature = "simulation"))]
        if let Some(clock) = &self.clock {
            return Ok(Timestamp::from_micros(clock.load(std::sync::atomic::Ordering::Relaxed)));
        }
        if self.backend() != DbBackend::Postgres {
            return Ok(Timestamp::now());
        }
        // `now()` would return the time at which the transaction began, before it waited for the write lock.
        let sql = "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint";
        let row = db.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
        required(row, "the time")?.try_get_by_index(0)
    }

    /// Begins a transaction that reads from one snapshot.
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
        if is_full(&error) {
            Self::StorageFull
        } else if is_passing(&error) {
            Self::Busy
        } else {
            Self::Internal(Box::new(error))
        }
    }
}

/// Lets only the owner read a file, which is created if it does not exist. SQLite gives its other files the same mode.
fn make_private(file: &Path) -> std::io::Result<()> {
    const MODE: u32 = 0o600;
    let file = OpenOptions::new().append(true).create(true).mode(MODE).open(file)?;
    file.set_permissions(Permissions::from_mode(MODE))
}

/// Returns the underlying sqlx error, if there is one.
fn sqlx_error(error: &DbErr) -> Option<&SqlxError> {
    let (DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))
    | DbErr::Conn(RuntimeErr::SqlxError(error))) = error
    else {
        return None;
    };
    Some(error.as_ref())
}

/// Returns the database's error code, if the error comes from the database.
fn error_code(error: &DbErr) -> Option<Cow<'_, str>> {
    sqlx_error(error)?.as_database_error()?.code()
}

/// Reports whether the connection is no longer usable after this error.
fn is_disconnected(error: &DbErr) -> bool {
    error_code(error).is_none_or(|code| {
        code.len() == 5 && ["08", "57P"].iter().any(|class| code.starts_with(class)) || code == "25P03"
    })
}

/// Reports whether the database has no space left: `SQLITE_FULL`, `SQLITE_IOERR_SHMSIZE`, `disk_full`.
fn is_full(error: &DbErr) -> bool {
    const CODES: [&str; 3] = ["13", "4874", "53100"];
    error_code(error).is_some_and(|code| CODES.iter().any(|full| *full == code))
}

/// Reports whether the same operation may succeed a little later.
///
/// True for lock timeouts (`SQLITE_BUSY`, `lock_not_available`), conflicts, idle timeouts in a transaction,
/// and lost connections.
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

/// Returns a row that must exist, or else [`DbErr::RecordNotFound`].
fn required<T>(row: Option<T>, what: &str) -> Result<T, DbErr> {
    row.ok_or_else(|| DbErr::RecordNotFound(what.to_owned()))
}
