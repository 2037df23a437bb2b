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
use tempfile::TempDir;

use self::{
    database::{copy_database, drop_indexes, has_database, url_of, write_unsafely},
    images::{EPOCH, Seeded},
};
use crate::{
    client,
    service::{self, Service},
};

mod builds;
mod database;
mod images;

pub(crate) use self::{
    builds::{copy_history, history_on_postgres, multiply_builds},
    database::{execute, new_database, open, open_file},
    images::{HALF, TEN, TEN_THOUSAND, creator, id, term},
};

/// The words of the pattern's text that the images replace.
const WORDS: &str = "wordsofthisimage";
const NAME: &str = "Nameofthisimage";
/// Grows with every change of what is written here, and of the schema.
const VERSION: &str = "2";
/// The file that says that a data directory is complete, and of which version.
const COMPLETE: &str = "complete";
/// How many images one statement writes.
const BATCH: u64 = 250;

/// A catalogue with this many images.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) images: u64,
    pub(crate) data: PathBuf,
    /// Its database's URL, on Postgres.
    pub(crate) url: Option<String>,
}

/// A copy of a catalogue, which may be written to. Its files go when it is dropped, and a database with the next copy.
#[derive(Debug)]
pub(crate) struct CatalogueCopy {
    pub(crate) data: TempDir,
    pub(crate) url: Option<String>,
}

/// The rows that image-service wrote of the image that the others are like.
#[derive(Debug)]
struct Pattern {
    configuration: String,
    /// The memory of the index that its row counts for it.
    index_bytes: i64,
}

impl Catalogue {
    /// Opens the catalogue on SQLite that is kept in `target/bench`, and writes it where there is none.
    pub(crate) async fn on_sqlite(images: u64) -> anyhow::Result<Self> {
        let data = service::kept(&format!("sqlite-{images}"))?;
        let catalogue = Self { images, data, url: None };
        if is_complete(&catalogue.data) {
            return Ok(catalogue);
        }
        std::fs::remove_dir_all(&catalogue.data)?;
        catalogue.make().await?;
        set_complete(&catalogue.data)?;
        Ok(catalogue)
    }

    /// Opens the catalogue on the server at `server`, and writes it where there is none.
    pub(crate) async fn on_postgres(server: &str, images: u64) -> anyhow::Result<Self> {
        let name = database_name(images);
        let data = service::kept(&format!("postgres-{images}"))?;
        if has_database(server, &name).await? {
            return Ok(Self { images, data, url: Some(url_of(server, &name)) });
        }
        let unfinished = format!("{name}_unfinished");
        let url = new_database(server, &unfinished).await?;
        Self { images, data: data.clone(), url: Some(url) }.make().await?;
        let connection = Database::connect(server).await?;
        execute(&connection, &format!("ALTER DATABASE {unfinished} RENAME TO {name}")).await?;
        connection.close().await?;
        Ok(Self { images, data, url: Some(url_of(server, &name)) })
    }

    pub(crate) async fn service(&self) -> anyhow::Result<Service> {
        Service::start(&self.data, self.url.as_deref(), &[]).await
    }

    /// Its database's name in the tables that are printed.
    pub(crate) fn database(&self) -> &'static str {
        if self.url.is_some() { "Postgres" } else { "SQLite" }
    }

    /// Copies it.
    pub(crate) async fn copy(&self) -> anyhow::Result<CatalogueCopy> {
        let data = tempfile::tempdir_in(service::kept("runs")?)?;
        copy(&self.data, data.path())?;
        let url = match &self.url {
            Some(url) => Some(copy_database(url, &database_name(self.images), "bench_copy").await?),
            None => None,
        };
        Ok(CatalogueCopy { data, url })
    }

    async fn connect(&self) -> anyhow::Result<DatabaseConnection> {
        match &self.url {
            Some(url) => open(url).await,
            None => open_file(&self.data.join(service::DATABASE)).await,
        }
    }

    async fn make(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        // The schema and the pattern are the service's own.
        let service = self.service().await?;
        let mut image = client::image(NAME, &format!("FROM ubuntu:24.04\nRUN echo {WORDS}\n"));
        image.template = true;
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        service.admin().images.create_image(request).await?;
        service.end().await?;

        let database = self.connect().await?;
        let backend = database.get_database_backend();
        let pattern = Pattern::read(&database).await?;
        if backend == DbBackend::Sqlite {
            write_unsafely(&database).await?;
        }
        self.write(&database, &pattern).await?;
        if backend == DbBackend::Sqlite {
            execute(&database, "PRAGMA journal_mode = WAL").await?;
        } else {
            execute(&database, "VACUUM ANALYZE").await?;
        }
        database.close().await?;
        eprintln!("    {} images written in {:.0} s", self.images, begun.elapsed().as_secs_f64());
        Ok(())
    }

    /// Writes the images in the place of the pattern.
    async fn write(&self, database: &DatabaseConnection, pattern: &Pattern) -> anyhow::Result<()> {
        let indexes = drop_indexes(database).await?;
        for table in ["grants", "image_references", "configurations", "images", "changes"] {
            execute(database, &format!("DELETE FROM {table}")).await?;
        }
        execute(database, "BEGIN").await?;
        for first in (0..self.images).step_by(BATCH as usize) {
            let numbers = first..self.images.min(first + BATCH);
            for statement in self.statements(pattern, numbers, database.get_database_backend()) {
                execute(database, &statement).await?;
            }
        }
        let revisions = format!(
            "UPDATE catalogue SET revision = {0}, compacted_revision = {0}, compacted_nonce = nonce",
            self.images
        );
        execute(database, &revisions).await?;
        count_bytes(database).await?;
        execute(database, "COMMIT").await?;
        for statement in indexes {
            execute(database, &statement).await?;
        }
        Ok(())
    }

    fn statements(
        &self,
        pattern: &Pattern,
        numbers: impl Iterator<Item = u64>,
        backend: DbBackend,
    ) -> [String; 4] {
        let (mut images, mut configurations) = (String::new(), String::new());
        let (mut references, mut grants) = (String::new(), String::new());
        let (yes, no) = if backend == DbBackend::Sqlite { ("1", "0") } else { ("true", "false") };
        let truth = |value: bool| if value { yes } else { no };
        let id_of = |number: u64| match backend {
            DbBackend::Sqlite => format!("x'{}'", id(number).simple()),
            DbBackend::Postgres | DbBackend::MySql | _ => format!("'{}'", id(number)),
        };
        for number in numbers {
            let seeded = Seeded::of(number, self.images);
            let (words, name, repository) = (seeded.words(), seeded.name(), seeded.repository());
            let (id, revision) = (id_of(number), seeded.place + 1);
            let updated_at = EPOCH + seeded.place as i64 * 1_000_000;
            let created_at = EPOCH - (self.images - number) as i64 * 1_000_000;
            let is_template = seeded.is_template();
            let (artifact, artifact_image) = if is_template {
                ("NULL".to_owned(), "NULL".to_owned())
            } else {
                (format!("'{}'", seeded.artifact()), format!("'{}'", seeded.artifact_image()))
            };
            let comma = if images.is_empty() { "" } else { "," };
            let _ = write!(
                images,
                "{comma}({id},'{name}','For {words:.60}','{creator}',{status},'','{repository}','latest',{no},{template},{no},{enabled},{pulled},1,{artifact},{artifact_image},{created_at},{updated_at},{revision},{revision},NULL,{no},{index_bytes})",
                creator = seeded.creator(),
                status = seeded.status(),
                template = truth(is_template),
                enabled = truth(seeded.enabled()),
                pulled = truth(seeded.pulled()),
                index_bytes = pattern.index_bytes + words.len() as i64,
            );
            let configuration = pattern.configuration.replace(WORDS, &words);
            let _ = write!(configurations, "{comma}({id},1,'{configuration}',NULL,'ubuntu:24.04')");
            let _ = write!(references, "{comma}('{repository}','latest',{id})");
            for subject in seeded.granted_to() {
                let comma = if grants.is_empty() { "" } else { "," };
                let _ = write!(grants, "{comma}({id},'{}',{yes},{no},{no})", grantee(&subject));
            }
        }
        let insert = |into: &str, values: String| format!("INSERT INTO {into} VALUES {values}");
        [
            insert(
                "images (id, name, description, creator, status, status_message, repository, tag, reference_given, template, snapshot, enabled, pulled, configuration_revision, artifact_json, artifact_image, created_at, updated_at, revision, edit_revision, latest_build, deleted, index_bytes)",
                images,
            ),
            insert("configurations (image, revision, json, archive, base)", configurations),
            insert("image_references (repository, tag, image)", references),
            insert("grants (image, grantee, \"view\", modify, \"delete\")", grants),
        ]
    }
}

impl Pattern {
    async fn read(database: &DatabaseConnection) -> anyhow::Result<Self> {
        let one = async |sql: &str| {
            let statement = Statement::from_string(database.get_database_backend(), sql);
            database.query_one_raw(statement).await?.context("the pattern's row")
        };
        Ok(Self {
            configuration: one("SELECT json FROM configurations").await?.try_get_by_index(0)?,
            index_bytes: one("SELECT index_bytes FROM images").await?.try_get_by_index(0)?,
        })
    }
}

/// Its name on a Postgres server.
fn database_name(images: u64) -> String {
    format!("bench_{VERSION}_{images}")
}

/// Returns how the table of grants names a subject.
pub(crate) fn grantee(subject: &str) -> String {
    format!("subject:{subject}")
}

/// Brings the sums that quotas are checked against in line with the images.
pub(crate) async fn count_bytes(database: &DatabaseConnection) -> anyhow::Result<()> {
    for statement in [
        "DELETE FROM creators",
        "INSERT INTO creators (subject, images, index_bytes) SELECT creator, COUNT(*), SUM(index_bytes) FROM images GROUP BY creator",
        "UPDATE catalogue SET index_bytes = (SELECT SUM(index_bytes) FROM images)",
    ] {
        execute(database, statement).await?;
    }
    Ok(())
}

/// Copies the files of a data directory that no service has open.
pub(crate) fn copy(data: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(data)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn is_complete(data: &Path) -> bool {
    std::fs::read_to_string(data.join(COMPLETE)).is_ok_and(|version| version == VERSION)
}

fn set_complete(data: &Path) -> anyhow::Result<()> {
    Ok(std::fs::write(data.join(COMPLETE), VERSION)?)
}
