//! Catalogues with many images, written straight into the database.
//!
//! What is written of each image is what image-service itself wrote of one like it, with other words: [`Pattern`] is read from a
//! catalogue in which one was created by a call. Everything else follows from the image's number, so that every run and both
//! databases have the same images.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context as _;
use proto::images as api;
use sea_orm::{ConnectionTrait as _, Database, DatabaseConnection, DbBackend, Statement};

use self::images::{EPOCH, Seeded};
use crate::{
    client,
    service::{self, Service},
};

mod builds;
mod images;

pub(crate) use self::{
    builds::multiply_builds,
    images::{HALF, ONE_IN_100, TEN, id, term},
};

/// The words of its text are for the images to replace.
const WORDS: &str = "wordsofthisimage";
const NAME: &str = "Nameofthisimage";
/// Grows with what is written here.
const VERSION: &str = "1";
/// How many images one statement writes.
const BATCH: u64 = 250;
/// The eras of Postgres, as image-service is done with them after a while.
const ERAS: &str = "INSERT INTO eras (era, since, until, images) SELECT era, \
    COALESCE(LAG(MAX(updated_at)) OVER (ORDER BY era), -9223372036854775808), MAX(updated_at), COUNT(*) \
    FROM images JOIN image_texts ON image = id WHERE era IS NOT NULL GROUP BY era";
/// A catalogue with this many images.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) images: u64,
    pub(crate) data: PathBuf,
    /// Its database's, on Postgres.
    pub(crate) url: Option<String>,
}

/// Rows of an image, as image-service writes them.
#[derive(Debug)]
struct Pattern {
    configuration: String,
    text: String,
}

impl Catalogue {
    /// On SQLite: kept, and made when there is none.
    pub(crate) async fn on_sqlite(images: u64) -> anyhow::Result<Self> {
        let data = service::kept(&format!("sqlite-{images}"))?;
        let catalogue = Self { images, data, url: None };
        let complete = catalogue.data.join("complete");
        if std::fs::read_to_string(&complete).is_ok_and(|version| version == VERSION) {
            return Ok(catalogue);
        }
        std::fs::remove_dir_all(&catalogue.data)?;
        catalogue.make().await?;
        std::fs::write(complete, VERSION)?;
        Ok(catalogue)
    }

    /// In a new database of the server at `server`, which ends with the script that has started it.
    pub(crate) async fn on_postgres(server: &str, images: u64) -> anyhow::Result<Self> {
        let url = Some(new_database(server, &format!("bench_{images}")).await?);
        let data = service::kept(&format!("postgres-{images}"))?;
        let catalogue = Self { images, data, url };
        catalogue.make().await?;
        Ok(catalogue)
    }

    pub(crate) async fn service(&self, flags: &[&str]) -> anyhow::Result<Service> {
        Service::start(&self.data, self.url.as_deref(), flags).await
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.data.join("catalogue.sqlite")
    }

    async fn connect(&self) -> anyhow::Result<DatabaseConnection> {
        match &self.url {
            Some(url) => open(url).await,
            None => open_file(&self.file()).await,
        }
    }

    async fn make(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        // The schema and the pattern are the service's own.
        let service = self.service(&[]).await?;
        let mut image = client::image(NAME, &format!("FROM ubuntu:24.04\nRUN echo {WORDS}\n"));
        image.template = true;
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        service.admin().images.create_image(request).await?;
        service.end().await?;

        let database = self.connect().await?;
        let pattern = Pattern::read(&database).await?;
        if database.get_database_backend() == DbBackend::Sqlite {
            // It is thrown away if it is not completed.
            for pragma in ["journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000"] {
                execute(&database, &format!("PRAGMA {pragma}")).await?;
            }
        }
        let later = self.unindex(&database).await?;
        for table in ["grants", "image_references", "image_texts", "configurations", "images", "changes"] {
            execute(&database, &format!("DELETE FROM {table}")).await?;
        }
        execute(&database, "BEGIN").await?;
        let is_postgres = database.get_database_backend() == DbBackend::Postgres;
        let step = if is_postgres { images::between_updates(self.images) } else { 1 };
        for first in (0..self.images).step_by(BATCH as usize) {
            let all = first..self.images.min(first + BATCH);
            let numbers = all.map(|position| position * step % self.images);
            for statement in self.statements(&pattern, numbers, database.get_database_backend()) {
                execute(&database, &statement).await?;
            }
        }
        if is_postgres {
            execute(&database, ERAS).await?;
        }
        execute(&database, "COMMIT").await?;
        let update = format!("UPDATE catalogue SET revision = {0}, compacted_revision = {0}", self.images);
        execute(&database, &update).await?;
        let written = begun.elapsed();
        for statement in later {
            execute(&database, &statement).await?;
        }
        if database.get_database_backend() == DbBackend::Sqlite {
            execute(&database, "PRAGMA journal_mode = WAL").await?;
        } else {
            execute(&database, "VACUUM ANALYZE").await?;
        }
        database.close().await?;
        // What it derives from this, it derives when it starts.
        self.service(&[]).await?.end().await?;
        eprintln!(
            "    {} images in {:.0} s, of which {:.0} s to write the rows",
            self.images,
            begun.elapsed().as_secs_f64(),
            written.as_secs_f64()
        );
        Ok(())
    }

    /// Takes away the indexes, which are faster built afterwards; answers what builds them.
    async fn unindex(&self, database: &DatabaseConnection) -> anyhow::Result<Vec<String>> {
        let backend = database.get_database_backend();
        let tables = "('images', 'grants', 'image_texts', 'configurations', 'image_references')";
        let sql = if backend == DbBackend::Sqlite {
            format!(
                "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name IN {tables}"
            )
        } else {
            format!(
                "SELECT indexname::text, indexdef FROM pg_indexes WHERE tablename IN {tables} AND indexdef NOT LIKE 'CREATE UNIQUE%'"
            )
        };
        let mut later = Vec::new();
        for row in database.query_all_raw(Statement::from_string(backend, sql)).await? {
            let (name, definition): (String, String) = (row.try_get_by_index(0)?, row.try_get_by_index(1)?);
            execute(database, &format!("DROP INDEX {name}")).await?;
            later.push(definition);
        }
        if backend == DbBackend::Sqlite {
            // Its index is made anew by the service, for it says to be of another version.
            later.push("PRAGMA user_version = 0".to_owned());
        }
        Ok(later)
    }

    fn statements(
        &self,
        pattern: &Pattern,
        numbers: impl Iterator<Item = u64>,
        backend: DbBackend,
    ) -> Vec<String> {
        let mut images = String::new();
        let mut configurations = String::new();
        let mut texts = String::new();
        let mut references = String::new();
        let mut grants = String::new();
        let has_eras = backend == DbBackend::Postgres;
        let truth = |value: bool| match (backend, value) {
            (DbBackend::Sqlite, value) => if value { "1" } else { "0" }.to_owned(),
            (_, value) => value.to_string(),
        };
        let id_of = |number: u64| match backend {
            DbBackend::Sqlite => format!("x'{}'", id(number).simple()),
            DbBackend::Postgres | DbBackend::MySql | _ => format!("'{}'", id(number)),
        };
        for number in numbers {
            let seeded = Seeded::of(number, self.images);
            let words = seeded.words();
            let (id, revision, updated_at) =
                (id_of(number), seeded.place + 1, EPOCH + seeded.place as i64 * 1_000_000);
            let created_at = EPOCH - (self.images - number) as i64 * 1_000_000;
            let (name, creator, status) = (seeded.name(), seeded.creator(), seeded.status());
            let artifact = if status == 3 { format!("'{}'", seeded.artifact()) } else { "NULL".to_owned() };
            let artifact_image =
                if status == 3 { format!("'sha256:{number:064x}'") } else { "NULL".to_owned() };
            let comma = if images.is_empty() { "" } else { "," };
            let _ = write!(
                images,
                "{comma}({id},'{name}','For {words:.60}','{creator}',{status},'','trailer/image-{number}','latest','trailer/image-{number}:latest',{f},{template},{f},{enabled},{pulled},1,{artifact},{artifact_image},{created_at},{updated_at},{revision},{revision},NULL,{f})",
                f = truth(false),
                template = truth(status == 0),
                enabled = truth(seeded.enabled()),
                pulled = truth(seeded.pulled()),
            );
            let configuration = pattern.configuration.replace(WORDS, &words);
            let text =
                pattern.text.replace(&NAME.to_lowercase(), &name.to_lowercase()).replace(WORDS, &words);
            let _ = write!(configurations, "{comma}({id},1,'{configuration}',NULL,'ubuntu:24.04')");
            let era = if has_eras {
                seeded.era().map_or_else(|| ",NULL".to_owned(), |era| format!(",{era}"))
            } else {
                String::new()
            };
            let _ = write!(texts, "{comma}({},{id},'{text}'{era})", number + 1);
            let _ = write!(references, "{comma}('trailer/image-{number}','latest',{id})");
            for subject in seeded.granted_to() {
                let comma = if grants.is_empty() { "" } else { "," };
                let _ = write!(grants, "{comma}({id},'{subject}',{},{1},{1})", truth(true), truth(false));
            }
        }
        let insert = |into: &str, values: String| format!("INSERT INTO {into} VALUES {values}");
        vec![
            insert(
                "images (id, name, description, creator, status, status_message, repository, tag, image_name, reference_given, template, snapshot, enabled, pulled, configuration_revision, artifact_json, artifact_image, created_at, updated_at, revision, edit_revision, latest_build, deleted)",
                images,
            ),
            insert("configurations (image, revision, json, archive, base)", configurations),
            insert(
                &format!("image_texts (\"row\", image, text{})", if has_eras { ", era" } else { "" }),
                texts,
            ),
            insert("image_references (repository, tag, image)", references),
            insert("grants (image, subject, \"view\", modify, \"delete\")", grants),
        ]
    }
}

impl Pattern {
    async fn read(database: &DatabaseConnection) -> anyhow::Result<Self> {
        let one = async |sql: &str| -> anyhow::Result<String> {
            let statement = Statement::from_string(database.get_database_backend(), sql);
            let row = database.query_one_raw(statement).await?.context("the pattern's row")?;
            Ok(row.try_get_by_index(0)?)
        };
        Ok(Self {
            configuration: one("SELECT json FROM configurations").await?,
            text: one("SELECT text FROM image_texts").await?,
        })
    }
}

pub(crate) async fn execute(database: &DatabaseConnection, statement: &str) -> anyhow::Result<()> {
    let shown: String = statement.chars().take(200).collect();
    database.execute_unprepared(statement).await.with_context(|| shown)?;
    Ok(())
}

/// The URL of a new database of the server at `server`.
pub(crate) async fn new_database(server: &str, name: &str) -> anyhow::Result<String> {
    let connection = Database::connect(server).await?;
    execute(&connection, &format!("CREATE DATABASE {name}")).await?;
    connection.close().await?;
    Ok(server.replacen("/postgres?", &format!("/{name}?"), 1))
}

/// The database in a file.
pub(crate) async fn open_file(file: &Path) -> anyhow::Result<DatabaseConnection> {
    open(&format!("sqlite://{}", file.display())).await
}

/// A database by one connection, so that all statements are of the transaction that one has begun.
async fn open(url: &str) -> anyhow::Result<DatabaseConnection> {
    let mut options = sea_orm::ConnectOptions::new(url);
    options.max_connections(1).sqlx_logging(false);
    Ok(Database::connect(options).await?)
}
