//! The database of a service under test: SQLite in a directory of its own or, if `TRAILER_TEST_POSTGRES_URL`
//! names a server, a new database there.

use std::{env, path::PathBuf, sync::Arc, thread};

use anyhow::Context as _;
use sea_orm::{
    ConnectionTrait as _, Database as Connection, DatabaseConnection, DatabaseTransaction,
    SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait as _,
};
use tempfile::TempDir;

const VARIABLE: &str = "TRAILER_TEST_POSTGRES_URL";

/// A data directory and, on Postgres, a database. Both are removed with the last service that uses them.
#[derive(Debug)]
pub(crate) struct Database {
    directory: TempDir,
    postgres: Option<Postgres>,
}

/// An open transaction that blocks all other writers.
#[derive(Debug)]
pub(crate) struct HeldWriter {
    connection: DatabaseConnection,
    txn: DatabaseTransaction,
}

/// A saved copy of the rows of a database.
#[derive(Debug)]
pub(crate) struct Saved<'a>(&'a Database);

#[derive(Debug)]
struct Postgres {
    server: String,
    name: String,
}

impl Database {
    pub(crate) async fn create() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let postgres = match env::var(VARIABLE) {
            Ok(server) => Some(Postgres::create(server).await?),
            Err(_) => None,
        };
        Ok(Self { directory, postgres })
    }

    /// Copies everything that a service, which has stopped, has stored.
    pub(crate) async fn back_up(&self) -> anyhow::Result<Arc<Self>> {
        let directory = tempfile::tempdir()?;
        let copy = directory.path().join("data");
        std::fs::create_dir(&copy)?;
        for file in std::fs::read_dir(self.data_dir())? {
            let file = file?;
            std::fs::copy(file.path(), copy.join(file.file_name()))?;
        }
        let postgres = match &self.postgres {
            Some(postgres) => Some(postgres.copy().await?),
            None => None,
        };
        Ok(Arc::new(Self { directory, postgres }))
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Ends the connections on which services are notified of each other's commits.
    pub(crate) async fn end_listeners(&self) -> anyhow::Result<()> {
        let Some(postgres) = &self.postgres else {
            return Ok(());
        };
        let listeners = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                         WHERE datname = current_database() AND query LIKE 'LISTEN%'";
        execute(&postgres.url(), listeners).await
    }

    /// Sets the database's clock an hour ahead of the services'; returns false on SQLite, which has none.
    pub(crate) async fn set_clock_ahead(&self) -> anyhow::Result<bool> {
        let Some(postgres) = &self.postgres else {
            return Ok(false);
        };
        let ahead = "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql \
                     AS 'SELECT pg_catalog.clock_timestamp() + interval ''1 hour'''";
        // System functions are found first unless the search path says otherwise.
        let first = format!("ALTER DATABASE {} SET search_path = public, pg_catalog", postgres.name);
        for statement in [ahead, &first] {
            execute(&postgres.url(), statement).await?;
        }
        Ok(true)
    }

    /// Saves a copy of all rows in another schema. Works on Postgres only.
    pub(crate) async fn save(&self) -> anyhow::Result<Saved<'_>> {
        let save = "CREATE SCHEMA saved; DO $$ DECLARE name text; BEGIN \
                    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP \
                    EXECUTE format('CREATE TABLE saved.%I AS TABLE public.%I', name, name); END LOOP; END $$";
        self.execute(save).await?;
        Ok(Saved(self))
    }

    /// Returns the number of rows of a table.
    pub(crate) async fn count(&self, table: &str) -> anyhow::Result<i64> {
        let connection = Connection::connect(self.connect_url()).await?;
        let statement = Statement::from_string(
            connection.get_database_backend(),
            format!("SELECT COUNT(*) FROM {table}"),
        );
        let row = connection.query_one_raw(statement).await?.context("a count")?;
        let count = row.try_get_by_index(0)?;
        connection.close().await?;
        Ok(count)
    }

    /// Runs a statement in the catalogue's database.
    pub(crate) async fn execute(&self, statement: &str) -> anyhow::Result<()> {
        execute(&self.connect_url(), statement).await
    }

    fn connect_url(&self) -> String {
        let file = || format!("sqlite://{}", self.data_dir().join("catalogue.sqlite").display());
        self.url().unwrap_or_else(file)
    }

    /// Blocks all other writers until it is released.
    pub(crate) async fn hold_writer(&self) -> anyhow::Result<HeldWriter> {
        /// The advisory lock that all writers to a Postgres database take.
        const WRITE_LOCK: i64 = 0x7472_6169_6c65_7201;
        let connection = Connection::connect(self.connect_url()).await?;
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        let txn = if self.postgres.is_some() {
            let txn = connection.begin().await?;
            txn.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({WRITE_LOCK})")).await?;
            txn
        } else {
            connection.begin_with_options(options).await?
        };
        Ok(HeldWriter { connection, txn })
    }

    /// Returns the URL of the Postgres database; `None` on SQLite.
    pub(crate) fn url(&self) -> Option<String> {
        self.postgres.as_ref().map(Postgres::url)
    }
}

impl Saved<'_> {
    /// Breaks all connections and restores the saved rows, like a failover to a replica that lagged.
    pub(crate) async fn fail_over(self) -> anyhow::Result<()> {
        let fail_over = "DO $$ DECLARE name text; BEGIN \
                         PERFORM pg_terminate_backend(pid) FROM pg_stat_activity \
                         WHERE datname = current_database() AND pid <> pg_backend_pid(); \
                         FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'saved' LOOP \
                         EXECUTE format('DELETE FROM public.%I', name); \
                         EXECUTE format('INSERT INTO public.%I SELECT * FROM saved.%I', name, name); \
                         END LOOP; END $$";
        self.0.execute(fail_over).await
    }
}

impl HeldWriter {
    pub(crate) async fn release(self) -> anyhow::Result<()> {
        self.txn.rollback().await?;
        Ok(self.connection.close().await?)
    }
}

impl Postgres {
    async fn create(server: String) -> anyhow::Result<Self> {
        let name = new_name();
        execute(&server, &format!("CREATE DATABASE {name}")).await?;
        Ok(Self { server, name })
    }

    async fn copy(&self) -> anyhow::Result<Self> {
        let name = new_name();
        execute(&self.server, &format!("CREATE DATABASE {name} TEMPLATE {}", self.name)).await?;
        Ok(Self { server: self.server.clone(), name })
    }

    /// Returns the server's URL with this database in place of the one that it names.
    fn url(&self) -> String {
        let (address, query) = self.server.split_once('?').unwrap_or((&self.server, ""));
        let host = address.find("://").map_or(0, |scheme| scheme + 3);
        let path = address[host..].find('/').map_or(address.len(), |slash| host + slash);
        let separator = if query.is_empty() { "" } else { "?" };
        format!("{}/{}{separator}{query}", &address[..path], self.name)
    }
}

fn new_name() -> String {
    format!("trailer_{}", uuid::Uuid::new_v4().simple())
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let (server, statement) = (self.server.clone(), format!("DROP DATABASE {} WITH (FORCE)", self.name));
        let dropping = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(execute(&server, &statement))
        });
        if !dropping.join().is_ok_and(|dropped| dropped.is_ok()) {
            eprintln!("the database {} stays behind", self.name);
        }
    }
}

async fn execute(server: &str, statement: &str) -> anyhow::Result<()> {
    let connection = Connection::connect(server).await.context("no Postgres answers")?;
    connection.execute_unprepared(statement).await?;
    Ok(connection.close().await?)
}
