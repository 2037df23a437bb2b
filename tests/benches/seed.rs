//! Catalogues with many images, written directly into the database.
//!
//! Each image is a variation of one that image-service itself wrote: [`Pattern`] is read from a catalogue in
//! which one image was created through the API. Everything else is derived from the image's number, so every
//! run and both databases have the same images.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::Context as _;
use proto::images as api;
use sea_orm::{ConnectionTrait as _, Database, DatabaseConnection, DbBackend, QueryResult, Statement};
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
    images::{Contents, HALF, TEN, TEN_THOUSAND, creator, id, term},
};

/// Placeholder in the pattern's text that is replaced in each image.
const WORDS: &str = "wordsofthisimage";
const NAME: &str = "Nameofthisimage";
/// Version of the seeded data, incremented with every change to it or to the schema.
const VERSION: &str = "5";
/// Name of the file that marks a data directory as complete and holds its version.
const COMPLETE: &str = "complete";
/// Number of images written per statement.
const BATCH: u64 = 250;

/// A seeded catalogue.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) images: u64,
    contents: Contents,
    pub(crate) data: PathBuf,
    /// Database URL; `None` on SQLite.
    pub(crate) url: Option<String>,
}

/// A writable copy of a catalogue.
///
/// Its files are removed on drop, and its database when the next copy is made.
#[derive(Debug)]
pub(crate) struct CatalogueCopy {
    pub(crate) data: TempDir,
    pub(crate) url: Option<String>,
}

/// Sizes of a catalogue's texts and grants, in bytes.
#[derive(Copy, Clone, Debug)]
pub(crate) struct StoredBytes {
    /// Size in the database, without indexes.
    pub(crate) stored: f64,
    /// Size counted against the index memory, along with everything else about the images.
    pub(crate) counted: f64,
}

/// The rows that image-service wrote for the image that all others are modelled on.
#[derive(Debug)]
struct Pattern {
    configuration: String,
    /// Index memory counted for the image without its grant; `grant_bytes` is that of the grant.
    index_bytes: i64,
    grant_bytes: i64,
}

impl Catalogue {
    /// Opens the SQLite catalogue kept in `target/bench`, writing it first if it is missing.
    pub(crate) async fn on_sqlite(images: u64) -> anyhow::Result<Self> {
        Self::open(None, images, Contents::Ordinary).await
    }

    /// Opens the catalogue on the server at `server`, writing it first if it is missing.
    pub(crate) async fn on_postgres(server: &str, images: u64) -> anyhow::Result<Self> {
        Self::open(Some(server), images, Contents::Ordinary).await
    }

    /// Opens a catalogue on the Postgres server at `server` or on SQLite, writing it first if missing.
    pub(crate) async fn open(server: Option<&str>, images: u64, contents: Contents) -> anyhow::Result<Self> {
        let kind = if server.is_some() { "postgres" } else { "sqlite" };
        let data = service::kept(&format!("{kind}-{}", name_of(images, contents)))?;
        let mut catalogue = Self { images, contents, data, url: None };
        let Some(server) = server else {
            if !is_complete(&catalogue.data) {
                std::fs::remove_dir_all(&catalogue.data)?;
                catalogue.make().await?;
                set_complete(&catalogue.data)?;
            }
            return Ok(catalogue);
        };
        let name = catalogue.database_name();
        if !has_database(server, &name).await? {
            let unfinished = format!("{name}_unfinished");
            catalogue.url = Some(new_database(server, &unfinished).await?);
            catalogue.make().await?;
            let connection = Database::connect(server).await?;
            execute(&connection, &format!("ALTER DATABASE {unfinished} RENAME TO {name}")).await?;
            connection.close().await?;
        }
        catalogue.url = Some(url_of(server, &name));
        Ok(catalogue)
    }

    /// Returns the name of its database on a Postgres server.
    fn database_name(&self) -> String {
        format!("bench_{VERSION}_{}", name_of(self.images, self.contents))
    }

    pub(crate) async fn service(&self) -> anyhow::Result<Service> {
        Service::start(&self.data, self.url.as_deref(), &[]).await
    }

    /// Returns the kind of its database, as printed in tables.
    pub(crate) fn database(&self) -> &'static str {
        if self.url.is_some() { "Postgres" } else { "SQLite" }
    }

    /// Copies the catalogue, for benchmarks that write to it.
    pub(crate) async fn copy(&self) -> anyhow::Result<CatalogueCopy> {
        let data = tempfile::tempdir_in(service::kept("runs")?)?;
        copy(&self.data, data.path())?;
        let url = match &self.url {
            Some(url) => Some(copy_database(url, &self.database_name(), "bench_copy").await?),
            None => None,
        };
        Ok(CatalogueCopy { data, url })
    }

    pub(crate) async fn bytes(&self) -> anyhow::Result<StoredBytes> {
        let database = self.connect().await?;
        // A grant consists of the image's id, the grantee, and three permissions.
        let stored = "SELECT CAST((SELECT SUM(OCTET_LENGTH(json)) FROM configurations) \
                      + (SELECT SUM(OCTET_LENGTH(grantee) + 19) FROM grants) AS bigint)";
        let stored: i64 = one_row(&database, stored).await?.try_get_by_index(0)?;
        let counted = "SELECT index_bytes FROM catalogue";
        let counted: i64 = one_row(&database, counted).await?.try_get_by_index(0)?;
        database.close().await?;
        Ok(StoredBytes { stored: stored as f64, counted: counted as f64 })
    }

    async fn connect(&self) -> anyhow::Result<DatabaseConnection> {
        match &self.url {
            Some(url) => open(url).await,
            None => open_file(&self.data.join(service::DATABASE)).await,
        }
    }

    async fn make(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        // The service itself creates the schema and the pattern.
        let service = self.service().await?;
        let mut image = client::image(NAME, &format!("FROM ubuntu:24.04\nRUN echo {WORDS}\n"));
        image.template = true;
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        let created = service.admin().images.create_image(request).await?.into_inner();
        let created = created.image.context("an image")?;
        let without_grant = self.connect().await?;
        let index_bytes = one_row(&without_grant, INDEX_BYTES).await?.try_get_by_index(0)?;
        without_grant.close().await?;
        service.admin().grant(&created.id, TEN, &[api::Permission::View]).await?;
        service.end().await?;

        let database = self.connect().await?;
        let backend = database.get_database_backend();
        let pattern = Pattern::read(&database, index_bytes).await?;
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

    /// Replaces the pattern with the seeded images.
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
            let seeded = Seeded::new(number, self.images, self.contents);
            let (words, name, repository) = (seeded.words(), seeded.name(), seeded.repository());
            let granted_to = seeded.granted_to();
            let (id, revision) = (id_of(number), seeded.place + 1);
            let updated_at = EPOCH + seeded.place as i64 * 1_000_000;
            let created_at = EPOCH - (self.images - number) as i64 * 1_000_000;
            let is_template = seeded.is_template();
            let of_artifact =
                |value: String| if is_template { "NULL".to_owned() } else { format!("'{value}'") };
            let artifact = of_artifact(seeded.artifact());
            let artifact_image = of_artifact(seeded.artifact_image());
            let artifact_worker = of_artifact(images::WORKER.to_owned());
            let comma = if images.is_empty() { "" } else { "," };
            let _ = write!(
                images,
                "{comma}({id},'{name}','For {words:.60}','{creator}',{status},'','{repository}','latest',{no},{template},{no},{enabled},{pulled},1,{artifact},{artifact_image},{artifact_worker},{no},{created_at},{updated_at},{revision},{revision},NULL,{no},{index_bytes})",
                creator = seeded.creator(),
                status = seeded.status(),
                template = truth(is_template),
                enabled = truth(seeded.enabled()),
                pulled = truth(seeded.pulled()),
                index_bytes =
                    pattern.index_bytes + words.len() as i64 + pattern.grant_bytes * granted_to.len() as i64,
            );
            let configuration = pattern.configuration.replace(WORDS, &words);
            let _ = write!(configurations, "{comma}({id},1,'{configuration}',NULL,'ubuntu:24.04')");
            let _ = write!(references, "{comma}('{repository}','latest',{id})");
            for subject in granted_to {
                let comma = if grants.is_empty() { "" } else { "," };
                let _ = write!(grants, "{comma}({id},'{}',{yes},{no},{no})", grantee(&subject));
            }
        }
        let insert = |into: &str, values: String| format!("INSERT INTO {into} VALUES {values}");
        [
            insert(
                "images (id, name, description, creator, status, status_message, repository, tag, reference_given, template, snapshot, enabled, pulled, configuration_revision, artifact_json, artifact_image, artifact_worker, artifact_missing, created_at, updated_at, revision, edit_revision, latest_build, deleted, index_bytes)",
                images,
            ),
            insert("configurations (image, revision, json, archive, base)", configurations),
            insert("image_references (repository, tag, image)", references),
            insert("grants (image, grantee, \"view\", modify, \"delete\")", grants),
        ]
    }
}

impl Pattern {
    /// Reads the pattern, whose image counted `index_bytes` before it had its grant.
    async fn read(database: &DatabaseConnection, index_bytes: i64) -> anyhow::Result<Self> {
        let with_grant: i64 = one_row(database, INDEX_BYTES).await?.try_get_by_index(0)?;
        Ok(Self {
            configuration: one_row(database, "SELECT json FROM configurations").await?.try_get_by_index(0)?,
            index_bytes,
            grant_bytes: with_grant - index_bytes,
        })
    }
}

const INDEX_BYTES: &str = "SELECT index_bytes FROM images";

async fn one_row(database: &DatabaseConnection, sql: &str) -> anyhow::Result<QueryResult> {
    let statement = Statement::from_string(database.get_database_backend(), sql);
    database.query_one_raw(statement).await?.context("a row")
}

fn name_of(images: u64, contents: Contents) -> String {
    match contents {
        Contents::Ordinary => images.to_string(),
        Contents::HostileTenth => format!("{images}_hostile"),
    }
}

/// Returns the grantee of a subject, as stored in the `grants` table.
pub(crate) fn grantee(subject: &str) -> String {
    format!("subject:{subject}")
}

/// Recomputes the sums that quotas are checked against.
pub(crate) async fn count_bytes(database: &DatabaseConnection) -> anyhow::Result<()> {
    for statement in [
        "DELETE FROM creators",
        "INSERT INTO creators (subject, images, index_bytes, context_bytes, answer_bytes) \
         SELECT creator, COUNT(*), SUM(index_bytes), 0, 0 FROM images GROUP BY creator",
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
