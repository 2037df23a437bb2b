//! Where a service under test keeps its catalogue: SQLite in a directory of its own, or, when `TRAILER_TEST_POSTGRES_URL` names a
//! server, a database of its own there.

use std::{env, path::PathBuf, sync::Arc, thread};

use anyhow::Context as _;
use sea_orm::{
    ConnectionTrait as _, Database as Connection, DatabaseConnection, DatabaseTransaction,
    SqliteTransactionMode, TransactionOptions, TransactionTrait as _,
};
use tempfile::TempDir;

const VARIABLE: &str = "TRAILER_TEST_POSTGRES_URL";

/// A data directory, and a database beside it on Postgres. Both go with the last service that uses them.
#[derive(Debug)]
pub(crate) struct Database {
    directory: TempDir,
    postgres: Option<Postgres>,
}

/// A transaction that no other can write beside.
#[derive(Debug)]
pub(crate) struct HeldWriter {
    connection: DatabaseConnection,
    txn: DatabaseTransaction,
}

/// The rows of a database as they were.
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

    /// A copy of all that a service has kept, which has ended.
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

    /// Ends the connections on which services hear of each other's commits.
    pub(crate) async fn end_listeners(&self) -> anyhow::Result<()> {
        let Some(postgres) = &self.postgres else {
            return Ok(());
        };
        let listeners = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                         WHERE datname = current_database() AND query LIKE 'LISTEN%'";
        execute(&postgres.url(), listeners).await
    }

    /// Sets the clock of the database an hour ahead of the services'; false on SQLite, which has none.
    pub(crate) async fn set_clock_ahead(&self) -> anyhow::Result<bool> {
        let Some(postgres) = &self.postgres else {
            return Ok(false);
        };
        let ahead = "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql \
                     AS 'SELECT pg_catalog.clock_timestamp() + interval ''1 hour'''";
        // What is of the system is found first unless the path says otherwise.
        let first = format!("ALTER DATABASE {} SET search_path = public, pg_catalog", postgres.name);
        for statement in [ahead, &first] {
            execute(&postgres.url(), statement).await?;
        }
        Ok(true)
    }

    /// Keeps the rows of all tables as they are, beside them. On Postgres alone.
    pub(crate) async fn save(&self) -> anyhow::Result<Saved<'_>> {
        let save = "CREATE SCHEMA saved; DO $$ DECLARE name text; BEGIN \
                    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP \
                    EXECUTE format('CREATE TABLE saved.%I AS TABLE public.%I', name, name); END LOOP; END $$";
        self.execute(save).await?;
        Ok(Saved(self))
    }

    /// Runs a statement in the catalogue's database.
    pub(crate) async fn execute(&self, statement: &str) -> anyhow::Result<()> {
        execute(&self.connect_url(), statement).await
    }

    fn connect_url(&self) -> String {
        let file = || format!("sqlite://{}", self.data_dir().join("catalogue.sqlite").display());
        self.url().unwrap_or_else(file)
    }

    /// Keeps everybody else from writing, until it is released.
    pub(crate) async fn hold_writer(&self) -> anyhow::Result<HeldWriter> {
        /// The lock of all who write to a Postgres database.
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

    /// None on SQLite.
    pub(crate) fn url(&self) -> Option<String> {
        self.postgres.as_ref().map(Postgres::url)
    }
}

impl Saved<'_> {
    /// Breaks all connections and brings back what was saved, as a failover does to a server that has received no more.
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

    /// The server's URL with this database in the place of the one that it names.
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
