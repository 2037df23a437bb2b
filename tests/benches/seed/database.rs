//! Databases that the benchmarks write to directly, bypassing the service.

use std::path::Path;

use anyhow::Context as _;
use sea_orm::{ConnectionTrait as _, Database, DatabaseConnection, DbBackend, Statement};

pub(crate) async fn execute(database: &DatabaseConnection, statement: &str) -> anyhow::Result<()> {
    let shown: String = statement.chars().take(200).collect();
    database.execute_unprepared(statement).await.with_context(|| shown)?;
    Ok(())
}

/// Creates a database on the server at `server`, replacing any of that name; returns its URL.
pub(crate) async fn new_database(server: &str, name: &str) -> anyhow::Result<String> {
    let connection = Database::connect(server).await?;
    execute(&connection, &format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
    execute(&connection, &format!("CREATE DATABASE {name}")).await?;
    connection.close().await?;
    Ok(url_of(server, name))
}

/// Copies the database `name` at `url` to `copy`, replacing any of that name; returns its URL.
pub(super) async fn copy_database(url: &str, name: &str, copy: &str) -> anyhow::Result<String> {
    let connection = Database::connect(url.replacen(name, "postgres", 1)).await?;
    execute(&connection, &format!("DROP DATABASE IF EXISTS {copy} WITH (FORCE)")).await?;
    execute(&connection, &format!("CREATE DATABASE {copy} TEMPLATE {name}")).await?;
    connection.close().await?;
    Ok(url.replacen(name, copy, 1))
}

pub(super) async fn has_database(server: &str, name: &str) -> anyhow::Result<bool> {
    let connection = Database::connect(server).await?;
    let sql = format!("SELECT 1 FROM pg_database WHERE datname = '{name}'");
    let found = connection.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
    connection.close().await?;
    Ok(found.is_some())
}

pub(super) fn url_of(server: &str, name: &str) -> String {
    server.replacen("/postgres?", &format!("/{name}?"), 1)
}

/// Opens the SQLite database in a file.
pub(crate) async fn open_file(file: &Path) -> anyhow::Result<DatabaseConnection> {
    open(&format!("sqlite://{}", file.display())).await
}

/// Opens a database with a single connection, so that a transaction covers all statements.
pub(crate) async fn open(url: &str) -> anyhow::Result<DatabaseConnection> {
    let mut options = sea_orm::ConnectOptions::new(url);
    options.max_connections(1).sqlx_logging(false);
    Ok(Database::connect(options).await?)
}

/// Speeds up writes to a file that is discarded unless it is completed, at the cost of durability.
pub(super) async fn write_unsafely(database: &DatabaseConnection) -> anyhow::Result<()> {
    for pragma in ["journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000"] {
        execute(database, &format!("PRAGMA {pragma}")).await?;
    }
    Ok(())
}

/// Drops the indexes, which are faster to build after the inserts; returns their definitions.
pub(super) async fn drop_indexes(database: &DatabaseConnection) -> anyhow::Result<Vec<String>> {
    let backend = database.get_database_backend();
    let tables = "('images', 'grants', 'configurations', 'image_references')";
    let sql = if backend == DbBackend::Sqlite {
        format!(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name IN {tables}"
        )
    } else {
        format!(
            "SELECT indexname::text, indexdef FROM pg_indexes WHERE tablename IN {tables} AND indexdef NOT LIKE 'CREATE UNIQUE%'"
        )
    };
    let mut definitions = Vec::new();
    for row in database.query_all_raw(Statement::from_string(backend, sql)).await? {
        let (name, definition): (String, String) = (row.try_get_by_index(0)?, row.try_get_by_index(1)?);
        execute(database, &format!("DROP INDEX {name}")).await?;
        definitions.push(definition);
    }
    Ok(definitions)
}
