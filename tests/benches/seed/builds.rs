//! Seeded builds: in the queue, or finished long ago.

use std::{path::Path, time::Instant};

use anyhow::Context as _;
use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};

use super::{
    copy, count_bytes,
    database::{execute, new_database, open, open_file, write_unsafely},
    is_complete, set_complete,
};
use crate::{
    client,
    service::{self, Service},
};

/// Number of images in the history. Each has `BUILDS_EACH` finished builds, five times what is retained.
const IMAGES: u64 = 100_000;
const BUILDS_EACH: u64 = 100;

/// Copies the first image of a catalogue `copies` times, each with a queued build of its own.
pub(crate) async fn multiply_builds(database: &DatabaseConnection, copies: usize) -> anyhow::Result<()> {
    let numbered = match database.get_database_backend() {
        DbBackend::Sqlite => format!(
            "CREATE TEMP TABLE copies AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {copies}) \
             SELECT i, randomblob(16) AS image, randomblob(16) AS build FROM n"
        ),
        DbBackend::Postgres | DbBackend::MySql | _ => format!(
            "CREATE TEMP TABLE copies AS SELECT i, gen_random_uuid() AS image, gen_random_uuid() AS build \
             FROM generate_series(1, {copies}) i"
        ),
    };
    execute(database, &numbered).await?;
    remember_first(database).await?;
    execute(database, "BEGIN").await?;
    for (table, of_first, own) in [
        (
            "builds",
            "id = (SELECT build FROM first)",
            &[
                ("id", "copies.build"),
                ("image", "copies.image"),
                ("round", "p.round + i"),
                ("repository", "p.repository || '-' || i"),
            ][..],
        ),
        ("build_records", "build = (SELECT build FROM first)", &[("build", "copies.build")]),
        ("configurations", "image = (SELECT image FROM first)", &[("image", "copies.image")]),
        (
            "image_references",
            "image = (SELECT image FROM first)",
            &[("repository", "p.repository || '-' || i"), ("image", "copies.image")],
        ),
        (
            "images",
            "id = (SELECT image FROM first)",
            &[
                ("id", "copies.image"),
                ("latest_build", "copies.build"),
                ("repository", "p.repository || '-' || i"),
            ],
        ),
    ] {
        copy_rows(database, table, "copies", of_first, own).await?;
    }
    count_bytes(database).await?;
    execute(database, "COMMIT").await
}

/// Copies ten million finished builds into an empty data directory.
///
/// The original is kept in `target/bench` and written first if it is missing.
pub(crate) async fn copy_history(to: &Path) -> anyhow::Result<()> {
    let data = service::kept("history")?;
    if !is_complete(&data) {
        std::fs::remove_dir_all(&data)?;
        std::fs::create_dir(&data)?;
        queue_one(&data, None).await?;
        let database = open_file(&data.join(service::DATABASE)).await?;
        write_unsafely(&database).await?;
        write_history(&database).await?;
        execute(&database, "PRAGMA journal_mode = WAL").await?;
        database.close().await?;
        set_complete(&data)?;
    }
    copy(&data, to)
}

/// Writes ten million finished builds into a new database on the server at `server`; returns its URL.
pub(crate) async fn history_on_postgres(data: &Path, server: &str) -> anyhow::Result<String> {
    let url = new_database(server, "bench_history").await?;
    queue_one(data, Some(&url)).await?;
    let database = open(&url).await?;
    write_history(&database).await?;
    execute(&database, "VACUUM ANALYZE").await?;
    database.close().await?;
    Ok(url)
}

/// Queues the build that the history is copied from.
async fn queue_one(data: &Path, url: Option<&str>) -> anyhow::Result<()> {
    let service = Service::start(data, url, &[]).await?;
    service.admin().create(client::image("History", "FROM scratch")).await?;
    service.end().await
}

async fn write_history(database: &DatabaseConnection) -> anyhow::Result<()> {
    let begun = Instant::now();
    let is_postgres = database.get_database_backend() == DbBackend::Postgres;
    let (image, build, numbers) = if is_postgres {
        (
            "lpad(to_hex(i), 32, '0')::uuid",
            "(lpad(to_hex(i), 16, '0') || lpad(to_hex(n), 16, '0'))::uuid",
            format!("SELECT n FROM generate_series(1, {BUILDS_EACH}) n"),
        )
    } else {
        (
            "unhex(printf('%032x', i))",
            "unhex(printf('%016x%016x', i, n))",
            format!(
                "WITH RECURSIVE all_n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM all_n WHERE n < {BUILDS_EACH}) SELECT n FROM all_n"
            ),
        )
    };
    let range = |first: u64, last: u64| {
        if is_postgres {
            format!("SELECT i FROM generate_series({first}, {last}) i")
        } else {
            format!(
                "WITH RECURSIVE all_i(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM all_i WHERE i < {last}) SELECT i FROM all_i"
            )
        }
    };
    remember_first(database).await?;
    // The first image's build is finished too, so that the history leaves nothing in the queue.
    execute(database, "UPDATE builds SET state = 5, started_at = queued_at, finished_at = queued_at").await?;
    execute(database, "UPDATE images SET status = 3").await?;
    execute(database, &format!("CREATE TEMP TABLE numbers AS {numbers}")).await?;
    const STEP: u64 = 10_000;
    for first in (1..=IMAGES).step_by(STEP as usize) {
        let images = range(first, first + STEP - 1);
        let latest = build.replace("n)", &format!("{BUILDS_EACH})"));
        let step = format!(
            "CREATE TEMP TABLE step AS SELECT i, {image} AS image, {latest} AS latest FROM ({images}) AS range"
        );
        let builds = format!(
            "CREATE TEMP VIEW step_builds AS SELECT i, n, image, {build} AS build FROM step, numbers"
        );
        for statement in ["BEGIN", &step, &builds] {
            execute(database, statement).await?;
        }
        let own_repository = ("repository", "p.repository || '-' || i");
        for (table, from, of_first, own) in [
            (
                "builds",
                "step_builds",
                "id = (SELECT build FROM first)",
                &[
                    ("id", "step_builds.build"),
                    ("image", "step_builds.image"),
                    ("number", "step_builds.n"),
                    ("requested_by", "'user-' || (i % 1000)"),
                    ("requester_json", "'{\"subject\":\"user-' || (i % 1000) || '\",\"roles\":[]}'"),
                    ("creator", "'user-0'"),
                    own_repository,
                ][..],
            ),
            (
                "build_records",
                "step_builds",
                "build = (SELECT build FROM first)",
                &[("build", "step_builds.build")],
            ),
            ("configurations", "step", "image = (SELECT image FROM first)", &[("image", "step.image")]),
            (
                "image_references",
                "step",
                "image = (SELECT image FROM first)",
                &[own_repository, ("image", "step.image")],
            ),
            (
                "images",
                "step",
                "id = (SELECT image FROM first)",
                &[("id", "step.image"), own_repository, ("latest_build", "step.latest")],
            ),
        ] {
            copy_rows(database, table, from, of_first, own).await?;
        }
        for statement in ["DROP VIEW step_builds", "DROP TABLE step", "COMMIT"] {
            execute(database, statement).await?;
        }
    }
    count_bytes(database).await?;
    eprintln!(
        "    {} finished builds written in {:.0} s",
        IMAGES * BUILDS_EACH,
        begun.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Stores the ids of the image and the build to copy in a temporary table of this connection.
async fn remember_first(database: &DatabaseConnection) -> anyhow::Result<()> {
    let first = "CREATE TEMP TABLE first AS SELECT id AS image, latest_build AS build FROM images ORDER BY id LIMIT 1";
    execute(database, first).await
}

/// Copies rows of a table once for each row of `from`, overriding the columns in `own`.
async fn copy_rows(
    database: &DatabaseConnection,
    table: &str,
    from: &str,
    of_first: &str,
    own: &[(&str, &str)],
) -> anyhow::Result<()> {
    let names = columns(database, table).await.with_context(|| table.to_owned())?;
    let values: Vec<String> = names
        .iter()
        .map(|name| {
            let own = own.iter().find(|(column, _)| column == name);
            own.map_or_else(|| format!("p.\"{name}\""), |(_, value)| (*value).to_owned())
        })
        .collect();
    let columns: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    let copy = format!(
        "INSERT INTO {table} ({}) SELECT {} FROM {table} p, {from} WHERE p.{of_first}",
        columns.join(", "),
        values.join(", ")
    );
    execute(database, &copy).await
}

async fn columns(database: &DatabaseConnection, table: &str) -> anyhow::Result<Vec<String>> {
    let backend = database.get_database_backend();
    let sql = match backend {
        DbBackend::Sqlite => format!("SELECT name FROM pragma_table_info('{table}')"),
        DbBackend::Postgres | DbBackend::MySql | _ => format!(
            "SELECT column_name::text FROM information_schema.columns WHERE table_schema = current_schema() AND table_name = '{table}'"
        ),
    };
    let rows = database.query_all_raw(Statement::from_string(backend, sql)).await?;
    rows.iter().map(|row| Ok(row.try_get_by_index(0)?)).collect()
}
