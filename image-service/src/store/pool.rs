//! Database connections and schema migration.

use std::{collections::HashSet, str::FromStr, time::Duration};

use opentelemetry::KeyValue;
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, DbErr, RuntimeErr,
    SqlxPostgresConnector, Statement,
    sqlx::{
        self, ConnectOptions as _, Error as SqlxError,
        postgres::{PgConnectOptions, PgPoolOptions},
        sqlite::{SqliteJournalMode, SqliteSynchronous},
    },
};
use sea_orm_migration::{MigratorTrait, SchemaManager};

use super::migration;

/// Longest wait for a lock that another process holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(60);
/// Key of the Postgres advisory lock that serialises migrations.
const MIGRATION_LOCK: i64 = 0x7472_6169_6c65_7202;

/// Migrates the schema, in one process at a time.
pub(super) async fn migrate(writer: &DatabaseConnection) -> Result<(), DbErr> {
    let is_shared = writer.get_database_backend() == DbBackend::Postgres;
    // The writer is a single connection, so lock, migration and unlock run in one session.
    let lock = |function: &str| {
        Statement::from_string(DbBackend::Postgres, format!("SELECT {function}({MIGRATION_LOCK})"))
    };
    if is_shared {
        writer.execute_unprepared("SET lock_timeout = 0").await?;
        // Poll: `CREATE INDEX CONCURRENTLY` waits for all running statements, including one that waits for
        // this lock.
        while !writer
            .query_one_raw(lock("pg_try_advisory_lock"))
            .await?
            .map_or(Ok(false), |row| row.try_get_by_index(0))?
        {
            writer.execute_unprepared(MIGRATION_PAUSE).await?;
        }
    }
    let migrated = async {
        let applied = applied(writer).await?;
        let mut migrations = migration::Migrator::migrations().into_iter();
        if !applied.is_empty() && !migrations.next().is_some_and(|first| applied.contains(first.name())) {
            return Err(DbErr::Custom(
                "the database was made by a version before 0.1.0, which cannot be upgraded: start with a new one"
                    .to_owned(),
            ));
        }
        // Other applied migrations come from a later version, alongside which this one must start; `up` would
        // refuse.
        let has_all = !applied.is_empty() && migrations.all(|migration| applied.contains(migration.name()));
        if has_all { Ok(()) } else { migration::Migrator::up(writer, None).await }
    };
    let migrated = migrated.await;
    if is_shared {
        writer.query_one_raw(lock("pg_advisory_unlock")).await?;
        let timeout = BUSY_TIMEOUT.as_millis();
        writer.execute_unprepared(&format!("SET lock_timeout = {timeout}")).await?;
    }
    migrated
}

/// Pause between attempts to take the migration lock.
const MIGRATION_PAUSE: &str = "SELECT pg_sleep(0.1)";

/// Returns the names of the applied migrations.
async fn applied(db: &DatabaseConnection) -> Result<HashSet<String>, DbErr> {
    if !SchemaManager::new(db).has_table("seaql_migrations").await? {
        return Ok(HashSet::new());
    }
    let sql = "SELECT version FROM seaql_migrations";
    let applied = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await?;
    applied.iter().map(|row| row.try_get_by_index(0)).collect()
}

/// Opens a pool of at most `connections` connections.
pub(super) async fn connect(url: &str, connections: u32) -> Result<DatabaseConnection, DbErr> {
    let mut connection = if url.starts_with("sqlite:") {
        Database::connect(sqlite_options(url, connections)).await?
    } else {
        postgres(url, connections).await?
    };
    measure(&mut connection, url);
    Ok(connection)
}

/// Records the durations of statements by the semantic conventions of OpenTelemetry.
fn measure(connection: &mut DatabaseConnection, url: &str) {
    #[cfg(test)]
    let recorded = RECORDED.lock().expect("nobody panics with it").clone();
    #[cfg(test)]
    let recorded = recorded.into_iter().find(|(part, _)| url.contains(part));
    #[cfg(not(test))]
    let _ = url;
    let system = match connection.get_database_backend() {
        DbBackend::Postgres => "postgresql",
        DbBackend::Sqlite => "sqlite",
        DbBackend::MySql | _ => "other_sql",
    };
    let duration = opentelemetry::global::meter(crate::PROGRAM)
        .f64_histogram("db.client.operation.duration")
        .with_unit("s")
        .with_description("Duration of statements")
        .with_boundaries(vec![0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0])
        .build();
    connection.set_metric_callback(move |done| {
        #[cfg(test)]
        if let Some((_, statements)) = &recorded {
            statements.lock().expect("nobody panics with it").push(done.statement.clone());
        }
        let sql = done.statement.sql.as_str();
        // Several statements sent together.
        let operation = if sql.contains("; ") { "BATCH" } else { sql.split(' ').next().unwrap_or_default() };
        let mut labels = vec![
            KeyValue::new("db.system.name", system),
            KeyValue::new("db.operation.name", operation.to_owned()),
        ];
        if done.failed {
            labels.push(KeyValue::new("error.type", "_OTHER"));
        }
        duration.record(done.elapsed.as_secs_f64(), &labels);
    });
}

async fn postgres(url: &str, connections: u32) -> Result<DatabaseConnection, DbErr> {
    let failed = |error: SqlxError| DbErr::Conn(RuntimeErr::SqlxError(error.into()));
    let timeout = BUSY_TIMEOUT.as_millis().to_string();
    let settings = [
        // A plan cached for one search can be bad for another.
        ("plan_cache_mode", "force_custom_plan"),
        // Compiling a statement takes longer than executing any of these.
        ("jit", "off"),
        ("lock_timeout", timeout.as_str()),
        // A process that hangs in the middle of a write must not block all other writers.
        ("idle_in_transaction_session_timeout", "10000"),
        ("client_min_messages", "error"),
    ];
    let options = PgConnectOptions::from_str(url)
        .map_err(failed)?
        .application_name("trailer image-service")
        .options(settings)
        .disable_statement_logging();
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        // A caller that is cancelled while its transaction begins leaves it open, so roll back before the
        // next caller. Only the return of the connection waits for this. Without a transaction, `ROLLBACK`
        // alone would log a warning on the server.
        .after_release(|connection, _| {
            Box::pin(async move { Ok(sqlx::raw_sql("BEGIN; ROLLBACK").execute(connection).await.is_ok()) })
        })
        .connect_with(options)
        .await
        .map_err(failed)?;
    Ok(SqlxPostgresConnector::from_sqlx_postgres_pool(pool))
}

fn sqlite_options(url: &str, connections: u32) -> ConnectOptions {
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A file does not disconnect, and a ping takes as long as reading a row.
        .test_before_acquire(false)
        .sqlx_logging(false)
        .map_sqlx_sqlite_opts(|sqlite| {
            sqlite
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .busy_timeout(BUSY_TIMEOUT)
                // 4 MiB per connection; negative values are in KiB.
                .pragma("cache_size", "-4096")
                // A container's file system may be read-only.
                .pragma("temp_store", "MEMORY")
                // Lets a whole page of rows pass from the connection's thread to the caller's at once.
                .row_buffer_size(256)
                .foreign_keys(true)
        });
    options
}

/// Executes one statement on a new connection.
#[cfg(all(test, feature = "simulation"))]
pub(crate) async fn execute(url: &str, statement: &str) -> Result<(), DbErr> {
    let connection = connect(url, 1).await?;
    connection.execute_unprepared(statement).await?;
    connection.close().await
}

#[cfg(test)]
pub(super) type Statements = std::sync::Arc<std::sync::Mutex<Vec<Statement>>>;

/// Recorders of executed statements, each with a part of the database's URL.
#[cfg(test)]
static RECORDED: std::sync::Mutex<Vec<(String, Statements)>> = std::sync::Mutex::new(Vec::new());

/// Records the statements of a store that is opened in a directory afterwards.
#[cfg(test)]
pub(super) fn record_statements(directory: &std::path::Path) -> Statements {
    let statements = Statements::default();
    let recorded = (directory.display().to_string(), statements.clone());
    RECORDED.lock().expect("nobody panics with it").push(recorded);
    statements
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use sea_orm::TransactionTrait;

    use super::*;

    /// Runs on Postgres only. `now()` is constant within a transaction there, so it reveals one that was left
    /// open.
    #[tokio::test]
    async fn a_caller_that_leaves_while_its_transaction_begins_leaves_none()
    -> Result<(), Box<dyn std::error::Error>> {
        let Ok(url) = std::env::var("TRAILER_TEST_POSTGRES_URL") else {
            return Ok(());
        };
        let database = connect(&url, 1).await?;
        let now = async || -> Result<i64, DbErr> {
            let sql = "SELECT (EXTRACT(EPOCH FROM now()) * 1000000)::bigint";
            let statement = Statement::from_string(DbBackend::Postgres, sql);
            let row = database.query_one_raw(statement).await?;
            row.ok_or_else(|| DbErr::RecordNotFound("now".to_owned()))?.try_get_by_index(0)
        };
        let given_up = std::cell::Cell::new(0_u32);
        // On a busy machine a transaction may have begun when it is first looked at.
        for polls in (1..20).cycle().take(1_000).take_while(|_| given_up.get() < 10) {
            let mut begin = Box::pin(database.begin());
            let mut pending = true;
            for _ in 0..polls {
                pending = pending && poll!(&mut begin).is_pending();
                tokio::task::yield_now().await;
            }
            drop(begin);
            given_up.set(given_up.get() + u32::from(pending));
            let (first, second) = (now().await?, now().await?);
            assert!(first < second, "after {polls} polls all are in one transaction");
        }
        assert!(given_up.get() > 0, "each began at once");
        Ok(database.close().await?)
    }
}
