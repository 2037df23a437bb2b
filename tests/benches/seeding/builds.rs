//! Builds in the queue, as many as are wanted.

use sea_orm::{ConnectionTrait as _, DatabaseConnection, DbBackend, Statement};

use super::execute;

/// Copies the first image of a catalogue on SQLite so many times, each with a build of its own in the queue.
pub(crate) async fn multiply_builds(database: &DatabaseConnection, copies: usize) -> anyhow::Result<()> {
    let numbered = format!(
        "CREATE TEMP TABLE copies AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {copies}) \
         SELECT i, randomblob(16) AS image, randomblob(16) AS build FROM n"
    );
    execute(database, &numbered).await?;
    let first = "CREATE TEMP TABLE first AS SELECT id AS image, latest_build AS build FROM images ORDER BY id LIMIT 1";
    execute(database, first).await?;
    execute(database, "BEGIN").await?;
    for (table, of_first, own) in [
        (
            "builds",
            "id = (SELECT build FROM first)",
            &[
                ("id", "copies.build"),
                ("image", "copies.image"),
                ("round", "round + i"),
                ("repository", "repository || '-' || i"),
            ][..],
        ),
        ("build_records", "build = (SELECT build FROM first)", &[("build", "copies.build")]),
        ("configurations", "image = (SELECT image FROM first)", &[("image", "copies.image")]),
        (
            "image_texts",
            "image = (SELECT image FROM first)",
            &[("row", "row + 1000000 + i"), ("image", "copies.image")],
        ),
        (
            "image_references",
            "image = (SELECT image FROM first)",
            &[("repository", "repository || '-' || i"), ("image", "copies.image")],
        ),
        (
            "images",
            "id = (SELECT image FROM first)",
            &[
                ("id", "copies.image"),
                ("latest_build", "copies.build"),
                ("repository", "repository || '-' || i"),
                ("image_name", "image_name || i"),
            ],
        ),
    ] {
        let sql = format!("SELECT name FROM pragma_table_info('{table}')");
        let mut names = Vec::new();
        for row in database.query_all_raw(Statement::from_string(DbBackend::Sqlite, sql)).await? {
            names.push(row.try_get_by_index::<String>(0)?);
        }
        let values: Vec<String> = names
            .iter()
            .map(|name| {
                let own = own.iter().find(|(column, _)| column == name);
                own.map_or_else(|| format!("p.\"{name}\""), |(_, value)| (*value).to_owned())
            })
            .collect();
        let columns: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        let copy = format!(
            "INSERT INTO {table} ({}) SELECT {} FROM {table} p, copies WHERE p.{of_first}",
            columns.join(", "),
            values.join(", ")
        );
        execute(database, &copy).await?;
    }
    execute(database, "COMMIT").await?;
    execute(database, "PRAGMA user_version = 0").await
}
