//! The database: one method, one transaction. The only place that knows sea-orm.
//!
//! SQLite or Postgres, with the same promises: no two transactions write at once, so a decision is committed upon the rows that
//! it was made from, and revisions are in the order of commits. On SQLite there is one writer, whose transactions begin
//! IMMEDIATE; on Postgres every writing transaction begins with a lock that all replicas share. Readers never wait for
//! writers. Whatever a method has returned survives a power cut (`synchronous=FULL` on SQLite). Times that are stored, and the
//! present that they are compared with, are of one clock: the database's on Postgres, whichever replica asks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use sea_orm::{
    AccessMode, ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseConnection, DatabaseTransaction,
    DbBackend, DbErr, EntityTrait, IntoActiveModel, IsolationLevel, QueryFilter, QuerySelect, QueryTrait,
    RuntimeErr, Set, SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait,
    sqlx::Error as SqlxError,
};
use uuid::Uuid;

use crate::{
    build::{Build, BuildId, Happening, Record},
    dispatch::{Decision, Policy, ToWorker},
    error::Error,
    image::{Artifact, ImageId, Status},
    timestamp::Timestamp,
};

#[cfg(all(test, feature = "simulation"))]
pub(crate) use self::connecting::execute;
use self::writing::Writing;
pub(crate) use self::{
    changed::{Changes, KnownGrants, SharedImage, With},
    changes::{Change, Revision},
    contexts::KeptContext,
    dispatching::{CLAIMED_AT_ONCE, Decided, DispatchStore},
    edits::{BatchOutcome, BatchTarget, SnapshotOrder, WithBuild},
    hints::Hint,
    histories::Excerpt,
    listing::Page,
    workers::WorkerRow,
};

mod builds;
mod changed;
mod changes;
mod connecting;
mod contexts;
mod dispatching;
mod edits;
mod entity;
mod grants;
mod hints;
mod histories;
mod images;
mod index;
mod listing;
mod made;
mod migration;
mod references;
mod retention;
mod rows;
mod texts;
mod workers;
mod write;
mod writing;

/// A handle to the catalogue's database.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    reader: DatabaseConnection,
    /// A pool of one: whoever writes waits here for its turn.
    writer: DatabaseConnection,
    /// A pool of one, for nobody but who asks whether the database answers: it waits for no other.
    asked: DatabaseConnection,
    history: Uuid,
    policy: Policy,
    bounds: listing::Bounds,
    /// Stands for the clock.
    #[cfg(all(test, feature = "simulation"))]
    clock: Option<std::sync::Arc<std::sync::atomic::AtomicI64>>,
}

/// What else a committed transaction calls for: the feed and the watchers of builds read on.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    /// The images that changed, so that the change log has new rows.
    pub(crate) changed: BTreeSet<ImageId>,
    /// The builds whose histories have grown.
    pub(crate) recorded: Vec<BuildId>,
    /// A build is in the queue, or has left a slot.
    pub(crate) queue_moved: bool,
}

/// What a committed write calls for.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    pub(crate) committed: Committed,
    /// To which worker to send what.
    pub(crate) messages: Vec<(String, ToWorker)>,
}

impl Store {
    const READERS: u32 = 8;
    /// The lock of all who write to a Postgres database.
    const WRITE_LOCK: i64 = 0x7472_6169_6c65_7201;

    /// Opens the database at a `postgres://` URL, or else the one in the data directory, creating or migrating it where needed.
    pub(crate) async fn open(data_dir: &Path, url: Option<&str>, policy: Policy) -> Result<Self, DbErr> {
        let url = url.map_or_else(
            || format!("sqlite://{}?mode=rwc", data_dir.join("catalogue.sqlite").display()),
            ToOwned::to_owned,
        );
        let writer = connecting::connect(&url, 1).await?;
        connecting::migrate(&writer).await?;
        if writer.get_database_backend() == DbBackend::Sqlite {
            index::renew(&writer).await?;
        }
        let reader = connecting::connect(&url, Self::READERS).await?;
        let asked = connecting::connect(&url, 1).await?;
        let catalogue = entity::catalogue::Entity::find_by_id(1)
            .one(&reader)
            .await?
            .ok_or_else(|| DbErr::RecordNotFound("catalogue".to_owned()))?;
        Ok(Self {
            reader,
            writer,
            asked,
            history: catalogue.history,
            policy,
            bounds: listing::Bounds::DEFAULT,
            #[cfg(all(test, feature = "simulation"))]
            clock: None,
        })
    }

    /// Goes by another clock than the database's.
    #[cfg(all(test, feature = "simulation"))]
    pub(crate) fn with_clock(self, clock: std::sync::Arc<std::sync::atomic::AtomicI64>) -> Self {
        Self { clock: Some(clock), ..self }
    }

    /// The row of a build.
    #[cfg(all(test, feature = "simulation"))]
    pub(crate) async fn row(&self, id: BuildId) -> Result<Option<Build>, DbErr> {
        let row = entity::build::Entity::find_by_id(id.0).one(&self.reader).await?;
        row.map(rows::build_from_row).transpose()
    }

    /// Names this database. One that was restored from a backup has the same name, and is told by the nonces of its revisions.
    pub(crate) fn history(&self) -> Uuid {
        self.history
    }

    /// The times and limits of dispatch.
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Waits for what is under way and closes the connections.
    pub(crate) async fn close(self) -> Result<(), DbErr> {
        self.asked.close().await?;
        self.reader.close().await?;
        self.writer.close().await
    }

    /// Fails unless the database answers.
    pub(crate) async fn ask(&self) -> Result<(), Error> {
        Ok(self.asked.ping().await?)
    }

    fn backend(&self) -> DbBackend {
        self.reader.get_database_backend()
    }

    /// Begins a transaction that no other writes beside.
    async fn write(&self) -> Result<Writing, DbErr> {
        if self.backend() == DbBackend::Postgres {
            let txn = self.writer.begin().await?;
            txn.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({})", Self::WRITE_LOCK)).await?;
            return Ok(Writing::new(txn));
        }
        begin_immediate(&self.writer).await
    }

    /// Ends a transaction that has changed images.
    async fn commit(&self, txn: Writing, committed: &Committed) -> Result<(), DbErr> {
        if self.backend() == DbBackend::Sqlite && !committed.changed.is_empty() {
            index::follow(&txn, &committed.changed).await?;
        }
        txn.commit().await
    }

    /// The present, by the clock that all who share the database have in common: its own on Postgres, this machine's on SQLite.
    async fn now(&self, db: &impl ConnectionTrait) -> Result<Timestamp, DbErr> {
        #[cfg(all(test, feature = "simulation"))]
        if let Some(clock) = &self.clock {
            return Ok(Timestamp::from_micros(clock.load(std::sync::atomic::Ordering::Relaxed)));
        }
        if self.backend() != DbBackend::Postgres {
            return Ok(Timestamp::now());
        }
        // The time of the transaction would be that from before it waited for its turn.
        let sql = "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint";
        let row = db
            .query_one_raw(Statement::from_string(DbBackend::Postgres, sql))
            .await?
            .ok_or_else(|| DbErr::RecordNotFound("the time".to_owned()))?;
        Ok(Timestamp::from_micros(row.try_get_by_index(0)?))
    }

    /// Begins a transaction that reads everything as of one moment.
    async fn read(&self) -> Result<DatabaseTransaction, DbErr> {
        if self.backend() == DbBackend::Postgres {
            let (isolation, access) = (IsolationLevel::RepeatableRead, AccessMode::ReadOnly);
            return self.reader.begin_with_config(Some(isolation), Some(access)).await;
        }
        self.reader.begin().await
    }
}

/// Begins a transaction on SQLite that is the one that writes from the beginning.
async fn begin_immediate(writer: &DatabaseConnection) -> Result<Writing, DbErr> {
    let options = TransactionOptions {
        sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
        ..TransactionOptions::default()
    };
    Ok(Writing::new(writer.begin_with_options(options).await?))
}

/// What was decided about one build, all together.
struct Moved<'a> {
    build: &'a Build,
    records: Vec<&'a Record>,
    artifact: Option<&'a Artifact>,
}

/// Writes what was decided about builds, and what follows from it for their images.
async fn apply<'a>(
    txn: &Writing,
    decisions: impl IntoIterator<Item = &'a Decision>,
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), Error> {
    let mut all: BTreeMap<BuildId, Moved<'a>> = BTreeMap::new();
    for decision in decisions {
        let Some(build) = &decision.build else {
            continue;
        };
        let moved = Moved { build, records: Vec::new(), artifact: None };
        let moved = all.entry(build.id).or_insert(moved);
        moved.build = build;
        moved.records.extend(&decision.records);
        moved.artifact = decision.artifact.as_ref().or(moved.artifact);
    }
    for moved in all.values() {
        let row = rows::build_to_row(moved.build)?.into_active_model().reset_all();
        txn.later(entity::build::Entity::update(row).validate()?);
        record(txn, moved, committed)?;
    }
    // Only a state that a build has entered says anything of its image.
    let is_state = |record: &&Record| matches!(record.happening, Happening::State { .. });
    all.retain(|_, moved| moved.records.iter().any(is_state));
    if all.is_empty() {
        return Ok(());
    }
    let ids = all.values().map(|moved| moved.build.image.0);
    let images = entity::image::Entity::find().filter(entity::image::Column::Id.is_in(ids)).all(txn).await?;
    let mut images: HashMap<Uuid, entity::image::Model> =
        images.into_iter().map(|row| (row.id, row)).collect();
    let mut kept = Vec::with_capacity(all.len());
    for moved in all.into_values() {
        let image = images
            .remove(&moved.build.image.0)
            .ok_or_else(|| DbErr::RecordNotFound("the image of a build".to_owned()))?;
        if !image.deleted {
            kept.push((image, moved));
        } else if moved.build.state.is_final() {
            purge(txn, moved.build.image, now);
        }
    }
    follow_builds(txn, &mut kept, now, committed).await?;
    let ended = kept.iter().filter(|(_, moved)| moved.build.state.is_final());
    references::settle(txn, ended.map(|(image, _)| image)).await
}

/// Appends what has happened to the history of a build.
fn record(txn: &Writing, moved: &Moved<'_>, committed: &mut Committed) -> Result<(), DbErr> {
    let Moved { build, records, artifact } = moved;
    if let (Some(first), Some(last)) = (records.first(), records.last()) {
        let chunk = entity::build_record::Model {
            build: build.id.0,
            first_sequence: first.sequence,
            last_sequence: last.sequence,
            json: rows::to_json(&records)?,
        };
        txn.later(entity::build_record::Entity::insert(chunk.into_active_model()));
        committed.recorded.push(build.id);
        hints::send(txn, Hint::Recorded(build.id));
    }
    if !build.state.is_held() {
        committed.queue_moved = true;
        hints::send(txn, Hint::QueueMoved);
    }
    if let Some(artifact) = artifact {
        made::remember(txn, artifact);
    }
    Ok(())
}

/// Brings images to where their latest builds stand.
async fn follow_builds(
    txn: &Writing,
    images: &mut [(entity::image::Model, Moved<'_>)],
    now: Timestamp,
    committed: &mut Committed,
) -> Result<(), DbErr> {
    let changed: Vec<_> = images
        .iter_mut()
        .filter_map(|(image, moved)| {
            let status = rows::status_to_code(Status::of(moved.build.kind, moved.build.state));
            let message = moved.build.message();
            let is_latest = image.latest_build == Some(moved.build.id.0);
            (is_latest && (image.status != status || image.status_message != message)).then(|| {
                image.status = status;
                image.status_message = message;
                (image, moved.artifact)
            })
        })
        .collect();
    let nobody = BTreeSet::new();
    let changes = changed.iter().map(|(image, _)| (ImageId(image.id), image.creator.as_str(), &nobody));
    let logged = changes::log_all(txn, &changes.collect::<Vec<_>>(), now).await?;
    for ((image, artifact), logged) in changed.into_iter().zip(logged) {
        image.revision = logged.revision;
        image.updated_at = logged.at.micros();
        if let Some(artifact) = artifact {
            image.artifact_json = Some(rows::to_json(artifact)?);
            image.artifact_image = Some(artifact.image_id.clone());
        }
        let row = entity::image::ActiveModel {
            id: Set(image.id),
            revision: Set(image.revision),
            status: Set(image.status),
            status_message: Set(image.status_message.clone()),
            updated_at: Set(image.updated_at),
            artifact_json: Set(image.artifact_json.clone()),
            artifact_image: Set(image.artifact_image.clone()),
            ..Default::default()
        };
        txn.later(entity::image::Entity::update(row).validate()?);
        committed.changed.insert(ImageId(image.id));
    }
    Ok(())
}

/// Removes all that is left of a deleted image whose work has stopped.
fn purge(txn: &Writing, image: ImageId, now: Timestamp) {
    use entity::{build, build_record, configuration};
    contexts::touch_named(txn, image, now);
    let builds = build::Entity::find()
        .select_only()
        .column(build::Column::Id)
        .filter(build::Column::Image.eq(image.0))
        .into_query();
    txn.later(build_record::Entity::delete_many().filter(build_record::Column::Build.in_subquery(builds)));
    txn.later(build::Entity::delete_many().filter(build::Column::Image.eq(image.0)));
    txn.later(configuration::Entity::delete_many().filter(configuration::Column::Image.eq(image.0)));
    texts::purge(txn, image.0);
    grants::purge(txn, image.0);
    references::purge(txn, image.0);
    txn.later(entity::image::Entity::delete_many().filter(entity::image::Column::Id.eq(image.0)));
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        if is_passing(&error) { Self::Busy } else { Self::Internal(Box::new(error)) }
    }
}

/// Whether the same may work a little later: another process has held a lock for too long (SQLITE_BUSY, or Postgres'
/// lock_not_available), two were in each other's way, this process was too slow in the middle of a transaction, or the database has
/// gone and comes back.
fn is_passing(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))
    | DbErr::Conn(RuntimeErr::SqlxError(error))) = error
    else {
        return matches!(error, DbErr::ConnectionAcquire(_));
    };
    let SqlxError::Database(error) = error.as_ref() else {
        return matches!(
            error.as_ref(),
            SqlxError::Io(_) | SqlxError::PoolTimedOut | SqlxError::PoolClosed | SqlxError::WorkerCrashed
        );
    };
    error.code().is_some_and(|code| {
        matches!(
            code.as_ref(),
            "5" | "261"
                | "517"
                | "55P03"
                | "57014"
                | "40P01"
                | "40001"
                | "57P01"
                | "57P02"
                | "57P03"
                | "25P03"
                | "53300"
        ) || code.len() == 5 && code.starts_with("08")
    })
}
