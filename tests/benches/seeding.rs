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
use uuid::Uuid;

use crate::{
    client,
    service::{self, Service},
};

/// The words of its text are for the images to replace.
const WORDS: &str = "wordsofthisimage";
const NAME: &str = "Nameofthisimage";
/// Grows with what is written here.
const VERSION: &str = "1";
/// How many images one statement writes.
const BATCH: u64 = 250;
/// 2026-01-01, in microseconds. The images were updated a second after one another.
const EPOCH: i64 = 1_767_225_600_000_000;

/// Created half of the images.
pub(crate) const HALF: &str = "half";
/// Sees 10,000 of a million images: one half it has created, the other was granted.
pub(crate) const ONE_IN_100: &str = "tenthousand";
/// Sees ten images.
pub(crate) const TEN: &str = "ten";

/// Words that are looked for.
pub(crate) mod term {
    pub(crate) const IN_20_IMAGES: &str = "xylophone";
    pub(crate) const IN_ONE_OF_10: &str = "scikit-learn";
    pub(crate) const IN_THE_OLDEST_10TH: &str = "legacyrunner";
    pub(crate) const IN_ALL: &str = "ubuntu";
    pub(crate) const IN_NONE: &str = "zzqxjv";
    /// In none, but every three characters of it are in all.
    pub(crate) const HOSTILE: &str = "hostile";
    pub(crate) const TWO_IN_ALL: &str = "os";
    pub(crate) const TWO_IN_20: &str = "é8";
    pub(crate) const TWO_IN_NONE: &str = "ñ7";
    pub(crate) const ONE_IN_NONE: &str = "ж";
}

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
            Some(url) => Ok(Database::connect(url).await?),
            None => open(&self.file()).await,
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
        for first in (0..self.images).step_by(BATCH as usize) {
            let numbers = first..self.images.min(first + BATCH);
            for statement in self.statements(&pattern, numbers, database.get_database_backend()) {
                execute(&database, &statement).await?;
            }
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
        numbers: std::ops::Range<u64>,
        backend: DbBackend,
    ) -> Vec<String> {
        let mut images = String::new();
        let mut configurations = String::new();
        let mut texts = String::new();
        let mut references = String::new();
        let mut grants = String::new();
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
            let _ = write!(texts, "{comma}({},{id},'{text}')", number + 1);
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
            insert("image_texts (\"row\", image, text)", texts),
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

/// What an image is like, by its number.
#[derive(Debug)]
struct Seeded {
    number: u64,
    /// In the order of updates, from the oldest.
    place: u64,
    images: u64,
}

impl Seeded {
    fn of(number: u64, images: u64) -> Self {
        // The numbers of images have few prime factors, so this is a permutation that looks like none.
        Self { number, place: number.wrapping_mul(7_368_787) % images, images }
    }

    fn mixed(&self, salt: u64) -> u64 {
        fastrand::Rng::with_seed(self.number * 64 + salt).u64(..)
    }

    fn name(&self) -> String {
        const KINDS: [&str; 5] = ["Python", "Rust", "Node", "Postgres", "Go"];
        format!("{} workspace {:07}", KINDS[(self.mixed(0) % 5) as usize], self.mixed(1) % 10_000_000)
    }

    fn creator(&self) -> String {
        match self.number % 200 {
            1 => ONE_IN_100.to_owned(),
            even if even % 2 == 0 => HALF.to_owned(),
            _ => format!("user-{}", self.mixed(2) % 1_000),
        }
    }

    /// A template, a failed one, a cancelled one, or a finished one.
    fn status(&self) -> i32 {
        match self.mixed(3) % 100 {
            0 => 0,
            1..=3 => 6,
            4..=7 => 4,
            _ => 3,
        }
    }

    fn enabled(&self) -> bool {
        !self.mixed(4).is_multiple_of(100)
    }

    fn pulled(&self) -> bool {
        self.mixed(5).is_multiple_of(10)
    }

    fn artifact(&self) -> String {
        format!(
            "{{\"image_id\":\"sha256:{:064x}\",\"size_bytes\":104857600,\"worker\":\"w1\",\"finished_at\":{EPOCH},\"configuration_revision\":1,\"build\":\"{}\"}}",
            self.number,
            id(self.number)
        )
    }

    fn granted_to(&self) -> Vec<String> {
        let mut subjects = vec![format!("team-{}", self.mixed(6) % 5_000)];
        if self.number % 200 == 3 {
            subjects.push(ONE_IN_100.to_owned());
        }
        if self.number % (self.images / 10) == 5 {
            subjects.push(TEN.to_owned());
        }
        subjects
    }

    /// About 400 characters of a Dockerfile's, and what is looked for.
    fn words(&self) -> String {
        let mut words = String::from("hos ost sti til ile");
        let mut add = |word: &str| {
            words.push(' ');
            words.push_str(word);
        };
        if self.mixed(7).is_multiple_of(10) {
            add(term::IN_ONE_OF_10);
        }
        if self.place < self.images / 10 {
            add(term::IN_THE_OLDEST_10TH);
        }
        if self.number % (self.images / 20) == 7 {
            add(term::IN_20_IMAGES);
            add(term::TWO_IN_20);
        }
        let mut random = fastrand::Rng::with_seed(self.number);
        for _ in 0..50 {
            add(&word(random.u64(0..3_000)));
        }
        words
    }
}

/// One of 3,000 words.
fn word(number: u64) -> String {
    let mut random = fastrand::Rng::with_seed(number);
    (0..random.usize(4..10)).map(|_| random.lowercase()).collect()
}

/// The id of an image of a seeded catalogue: a UUID of version 7.
pub(crate) fn id(number: u64) -> Uuid {
    let mut random = fastrand::Rng::with_seed(number);
    let milliseconds = 1_767_225_600_000 + number;
    uuid::Builder::from_unix_timestamp_millis(
        milliseconds,
        &random.u128(..).to_be_bytes()[..10].try_into().expect("ten"),
    )
    .into_uuid()
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
pub(crate) async fn open(file: &Path) -> anyhow::Result<DatabaseConnection> {
    let mut options = sea_orm::ConnectOptions::new(format!("sqlite://{}", file.display()));
    options.max_connections(1).sqlx_logging(false);
    Ok(Database::connect(options).await?)
}

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
            &[("id", "copies.build"), ("image", "copies.image"), ("round", "round + i")][..],
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
