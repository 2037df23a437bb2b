//! The database: one method, one transaction. The only place that knows sea-orm.
//!
//! On SQLite there is one writer, whose transactions begin IMMEDIATE, so that a decision is committed upon the rows that
//! it was made from; and a pool of readers, which never wait for it. Whatever a method has returned survives a power cut
//! (`synchronous=FULL`).

use std::{path::Path, time::Duration};

use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectOptions, ConnectionTrait, Database, DatabaseConnection,
    DatabaseTransaction, DbErr, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, QuerySelect,
    QueryTrait, Set, SqliteTransactionMode, TransactionOptions, TransactionTrait,
    sea_query::Expr,
    sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous},
};
use sea_orm_migration::MigratorTrait;
use uuid::Uuid;

use crate::{
    build::{Build, BuildId},
    dispatch::Decision,
    error::Error,
    image::{ImageId, Status},
    timestamp::Timestamp,
};

pub(crate) use self::{changes::Change, histories::Excerpt, workers::WorkerRow};

mod builds;
mod changes;
mod entity;
mod histories;
mod images;
mod migration;
mod rows;
mod workers;

/// A handle to the catalogue's database.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    reader: DatabaseConnection,
    writer: DatabaseConnection,
    history: Uuid,
}

/// What else a committed transaction calls for: the feed and the watchers of a build read on.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    /// The image changed, so the change log has a new row.
    pub(crate) image_changed: bool,
    /// The build's history has grown.
    pub(crate) recorded: Option<BuildId>,
    /// The build is back in the queue, or has left a slot.
    pub(crate) queue_moved: bool,
}

impl Store {
    const READERS: u32 = 8;
    const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

    /// Opens the database in the data directory, creating or migrating it where needed.
    pub(crate) async fn open(data_dir: &Path) -> Result<Self, DbErr> {
        let url = format!("sqlite://{}?mode=rwc", data_dir.join("catalogue.sqlite").display());
        let writer = Database::connect(options(&url, 1)).await?;
        migration::Migrator::up(&writer, None).await?;
        let reader = Database::connect(options(&url, Self::READERS)).await?;
        let catalogue = entity::catalogue::Entity::find_by_id(1)
            .one(&reader)
            .await?
            .ok_or_else(|| DbErr::RecordNotFound("catalogue".to_owned()))?;
        Ok(Self { reader, writer, history: catalogue.history })
    }

    /// Names this history of revisions: another database, or a restored one, has another.
    pub(crate) fn history(&self) -> Uuid {
        self.history
    }

    /// Waits for what is under way and closes the files.
    pub(crate) async fn close(self) -> Result<(), DbErr> {
        self.reader.close().await?;
        self.writer.close().await
    }

    async fn write(&self) -> Result<DatabaseTransaction, DbErr> {
        self.writer
            .begin_with_options(TransactionOptions {
                sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
                ..TransactionOptions::default()
            })
            .await
    }
}

fn options(url: &str, connections: u32) -> ConnectOptions {
    let mut options = ConnectOptions::new(url);
    options.max_connections(connections).sqlx_logging(false).map_sqlx_sqlite_opts(|sqlite| {
        sqlite
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Store::BUSY_TIMEOUT)
            .foreign_keys(true)
    });
    options
}

/// Takes the next revision. Its row is the lock that makes the order of revisions the order of commits.
async fn next_revision(txn: &impl ConnectionTrait) -> Result<i64, DbErr> {
    use entity::catalogue::{Column, Entity};
    let updated = Entity::update_many()
        .col_expr(Column::Revision, Expr::col(Column::Revision).add(1))
        .exec_with_returning(txn)
        .await?;
    updated.first().map(|row| row.revision).ok_or_else(|| DbErr::RecordNotFound("catalogue".to_owned()))
}

/// Writes what was decided about a build, and what follows from it for the image.
async fn apply(txn: &DatabaseTransaction, decision: &Decision, now: Timestamp) -> Result<Committed, DbErr> {
    let mut committed = Committed::default();
    let Some(build) = &decision.build else {
        return Ok(committed);
    };
    rows::build_to_row(build)?.into_active_model().reset_all().update(txn).await?;
    if let (Some(first), Some(last)) = (decision.records.first(), decision.records.last()) {
        let chunk = entity::build_record::Model {
            build: build.id.0,
            first_sequence: first.sequence,
            last_sequence: last.sequence,
            json: rows::to_json(&decision.records)?,
        };
        entity::build_record::Entity::insert(chunk.into_active_model()).exec_without_returning(txn).await?;
        committed.recorded = Some(build.id);
    }
    committed.queue_moved = !build.state.is_held();
    let image = entity::image::Entity::find_by_id(build.image.0)
        .one(txn)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("the image of a build".to_owned()))?;
    if image.deleted {
        if build.state.is_final() {
            purge(txn, build.image).await?;
        }
        return Ok(committed);
    }
    committed.image_changed = follow_build(txn, image, build, decision, now).await?;
    Ok(committed)
}

/// Brings an image to where its latest build stands; whether that changed anything.
async fn follow_build(
    txn: &DatabaseTransaction,
    image: entity::image::Model,
    build: &Build,
    decision: &Decision,
    now: Timestamp,
) -> Result<bool, DbErr> {
    let status = rows::status_to_code(Status::of(build.kind, build.state));
    let message = build.message();
    if image.latest_build != build.id.0 || (image.status == status && image.status_message == message) {
        return Ok(false);
    }
    let revision = log_change(txn, ImageId(image.id), &image.creator).await?;
    let mut row = image.into_active_model();
    row.status = Set(status);
    row.status_message = Set(message);
    row.updated_at = Set(now.micros());
    row.revision = Set(revision);
    if let Some(artifact) = &decision.artifact {
        row.artifact_json = Set(Some(rows::to_json(artifact)?));
    }
    row.update(txn).await?;
    Ok(true)
}

/// Appends a change of an image to the change log, under a new revision.
async fn log_change(txn: &DatabaseTransaction, image: ImageId, creator: &str) -> Result<i64, DbErr> {
    let revision = next_revision(txn).await?;
    let change = entity::change::Model { revision, image: image.0, creator: creator.to_owned() };
    entity::change::Entity::insert(change.into_active_model()).exec_without_returning(txn).await?;
    Ok(revision)
}

/// Removes all that is left of a deleted image whose work has stopped.
async fn purge(txn: &DatabaseTransaction, image: ImageId) -> Result<(), DbErr> {
    use entity::{build, build_record, configuration};
    let builds = build::Entity::find()
        .select_only()
        .column(build::Column::Id)
        .filter(build::Column::Image.eq(image.0))
        .into_query();
    build_record::Entity::delete_many()
        .filter(build_record::Column::Build.in_subquery(builds))
        .exec(txn)
        .await?;
    build::Entity::delete_many().filter(build::Column::Image.eq(image.0)).exec(txn).await?;
    configuration::Entity::delete_many().filter(configuration::Column::Image.eq(image.0)).exec(txn).await?;
    entity::image::Entity::delete_by_id(image.0).exec(txn).await?;
    Ok(())
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        if matches!(error, DbErr::ConnectionAcquire(_)) {
            Self::Busy
        } else {
            Self::Internal(Box::new(error))
        }
    }
}
