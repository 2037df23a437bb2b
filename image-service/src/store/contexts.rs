//! Uploaded archives of build contexts, in chunks that are written one at a time.

use std::time::Duration;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, IntoActiveModel,
    PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait, Set,
    sea_query::{Expr, ExprTrait, IntoTableRef, Query, SimpleExpr},
};
use uuid::Uuid;

use super::{
    Store,
    entity::{build, configuration, context, context_chunk, image},
    queue,
    transaction::WriteTransaction,
    usage,
};
use crate::{
    access::Principal,
    build::Build,
    build_context::{ContextDigest, FilePaths, Inspected, KeptContext},
    dispatch::Attempt,
    error::{Error, Violations},
    image::{Configuration, ImageId, UsageChange},
    timestamp::Timestamp,
    turns::Turn,
};

impl Store {
    /// Begins an upload and returns its id.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes of the caller wait.
    pub(crate) async fn begin_context(&self, caller: &Principal) -> Result<Uuid, Error> {
        let row = context::Model {
            upload: Uuid::now_v7(),
            digest: None,
            uploader: caller.subject().to_owned(),
            size_bytes: 0,
            paths: Vec::new(),
            used_at: self.now(&self.reader).await?,
        };
        let upload = row.upload;
        let txn = self.write(Turn::Caller(caller)).await?;
        context::Entity::insert(row.into_active_model()).exec_without_returning(&txn).await?;
        txn.commit().await?;
        Ok(upload)
    }

    /// Appends a chunk to an upload.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes of the caller wait,
    /// [`Error::CreatorQuotaExceeded`] if its archives have too many bytes, and [`Error::Busy`] if the upload
    /// has expired.
    pub(crate) async fn append_context(
        &self,
        caller: &Principal,
        upload: Uuid,
        number: i64,
        bytes: Vec<u8>,
    ) -> Result<(), Error> {
        let txn = self.write(Turn::Caller(caller)).await?;
        let now = self.now(&txn).await?;
        if touch(&txn, upload, now).await? == 0 {
            return Err(Error::Busy);
        }
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        let grown = Expr::col(context::Column::SizeBytes).add(size);
        let received = context::Entity::update_many().col_expr(context::Column::SizeBytes, grown);
        txn.defer(received.filter(context::Column::Upload.eq(upload)));
        usage::charge(&txn, self, caller.subject(), UsageChange::of_context(size)).await?;
        let row = context_chunk::Model { upload, number, bytes };
        context_chunk::Entity::insert(row.into_active_model()).exec_without_returning(&txn).await?;
        txn.commit().await
    }

    /// Completes an upload of `chunks` chunks. If the same archive is kept already, that one is returned
    /// instead.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes of the caller wait, and [`Error::Busy`] if the
    /// upload has expired.
    pub(crate) async fn finish_context(
        &self,
        caller: &Principal,
        upload: Uuid,
        found: &Inspected,
        chunks: i64,
    ) -> Result<KeptContext, Error> {
        let txn = self.write(Turn::Caller(caller)).await?;
        let now = self.now(&txn).await?;
        let kept_chunks = context_chunk::Entity::find()
            .filter(context_chunk::Column::Upload.eq(upload))
            .count(&txn)
            .await?;
        if i64::try_from(kept_chunks).ok() != Some(chunks) {
            // The upload has expired and was deleted, at least in part.
            return Err(Error::Busy);
        }
        if let Some(kept) = kept(&txn, &found.digest).await? {
            expire(&txn, upload).await?;
            // Unlike `touch`, this revives an archive that was given up.
            let used =
                context::ActiveModel { used_at: Set(now), upload: Set(kept.upload), ..Default::default() };
            context::Entity::update(used).exec(&txn).await?;
            txn.commit().await?;
            return Ok(KeptContext { used_at: now, ..kept });
        }
        let row = context::Model {
            upload,
            digest: Some(found.digest.clone()),
            uploader: caller.subject().to_owned(),
            size_bytes: found.size_bytes,
            paths: found.paths.clone().into_stored(),
            used_at: now,
        };
        context::Entity::update(row.clone().into_active_model().reset_all()).exec(&txn).await?;
        txn.commit().await?;
        Ok(row.into())
    }

    /// Abandons an upload, which the next round of garbage collection deletes.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn give_up_context(&self, upload: Uuid) -> Result<(), Error> {
        let txn = self.write(Turn::Background).await?;
        expire(&txn, upload).await?;
        txn.commit().await
    }

    /// Returns the archive with this digest, if it is kept, and marks it as used now.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many writes of the caller wait.
    pub(crate) async fn use_context(
        &self,
        caller: &Principal,
        digest: &ContextDigest,
    ) -> Result<Option<KeptContext>, Error> {
        let txn = self.write(Turn::Caller(caller)).await?;
        let now = self.now(&txn).await?;
        let Some(kept) = kept(&txn, digest).await? else {
            return Ok(None);
        };
        touch(&txn, kept.upload, now).await?;
        txn.commit().await?;
        Ok(Some(KeptContext { used_at: now, ..kept }))
    }

    /// Returns the archive that an attempt builds from, if the worker holds the attempt.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn context_of(
        &self,
        worker: &str,
        attempt: Attempt,
    ) -> Result<Option<KeptContext>, Error> {
        let txn = self.read().await?;
        let Some(row) = build::Entity::find_by_id(attempt.build).one(&txn).await? else {
            return Ok(None);
        };
        let build = Build::from(row);
        if !build.is_attempt_of(worker, attempt.number) || build.workspace.is_some() {
            return Ok(None);
        }
        let key = (build.image, build.configuration_revision);
        let named = configuration::Entity::find_by_id(key).one(&txn).await?.and_then(|row| row.archive);
        let digest = named.and_then(|named| ContextDigest::parse(&named).ok());
        match digest {
            Some(digest) => Ok(kept(&txn, &digest).await?),
            None => Ok(None),
        }
    }

    /// Checks that the archive that a configuration names is kept and has its Dockerfile, if it names one.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Invalid`] if it is not, or has not.
    pub(crate) async fn require_archive(&self, configuration: &Configuration) -> Result<(), Error> {
        named(&self.reader, configuration).await?;
        Ok(())
    }

    /// Returns a chunk of an archive; `None` after the last.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn context_chunk(&self, upload: Uuid, number: i64) -> Result<Option<Vec<u8>>, Error> {
        let chunk = context_chunk::Entity::find_by_id((upload, number)).one(&self.reader).await?;
        Ok(chunk.map(|chunk| chunk.bytes))
    }

    /// Deletes part of an unused archive or stalled upload, and reports whether there may be more.
    ///
    /// An archive is unused if it was not used for `retain` and no configuration in use names it.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn purge_contexts(&self, retain: Duration) -> Result<bool, Error> {
        /// Longest pause between two chunks of an upload.
        const UNFINISHED: Duration = Duration::from_secs(600);
        const AT_ONCE: u64 = 16;
        let now = self.now(&self.reader).await?;
        let unused_since = |long: Duration| context::Column::UsedAt.lt(now.before(long));
        let is_whole = context::Column::Digest.is_not_null();
        let unfinished =
            Condition::all().add(is_whole.clone().not()).add(unused_since(UNFINISHED.min(retain)));
        let unused = Condition::all().add(is_whole).add(unused_since(retain)).add(is_named().not());
        let due = context::Entity::find()
            .filter(Condition::any().add(unfinished).add(unused))
            .order_by_asc(context::Column::UsedAt)
            .one(&self.reader)
            .await?;
        let Some(due) = due else {
            return Ok(false);
        };
        let txn = self.write(Turn::Background).await?;
        let still = context::Entity::update_many()
            .col_expr(context::Column::Digest, Expr::value(None::<String>))
            .filter(context::Column::Upload.eq(due.upload))
            .filter(context::Column::UsedAt.eq(due.used_at))
            .filter(Condition::any().add(context::Column::Digest.is_null()).add(is_named().not()))
            .exec(&txn)
            .await?;
        if still.rows_affected == 0 {
            // It was used or named in the meantime.
            return Ok(true);
        }
        let numbers = context_chunk::Entity::find()
            .select_only()
            .column(context_chunk::Column::Number)
            .filter(context_chunk::Column::Upload.eq(due.upload))
            .limit(AT_ONCE)
            .into_tuple::<i64>()
            .all(&txn)
            .await?;
        if numbers.is_empty() {
            context::Entity::delete_by_id(due.upload).exec(&txn).await?;
            let released = UsageChange::of_context(-due.size_bytes);
            usage::charge(&txn, self, &due.uploader, released).await?;
        } else {
            context_chunk::Entity::delete_many()
                .filter(context_chunk::Column::Upload.eq(due.upload))
                .filter(context_chunk::Column::Number.is_in(numbers))
                .exec(&txn)
                .await?;
            // Nothing may be appended to an upload that is being deleted.
            touch(&txn, due.upload, Timestamp::from_micros(0)).await?;
        }
        txn.commit().await?;
        Ok(true)
    }
}

/// Checks that the archive that a configuration names is kept and has its Dockerfile, and marks it as used now.
pub(super) async fn require(
    txn: &impl ConnectionTrait,
    configuration: &Configuration,
    now: Timestamp,
) -> Result<(), Error> {
    if let Some(kept) = named(txn, configuration).await? {
        touch(txn, kept.upload, now).await?;
    }
    Ok(())
}

/// Returns the archive that a configuration names, if it names one.
///
/// # Errors
///
/// Returns [`Error::Invalid`] if the archive is not kept, or does not have the Dockerfile.
pub(super) async fn named(
    db: &impl ConnectionTrait,
    configuration: &Configuration,
) -> Result<Option<KeptContext>, Error> {
    let Some(archive) = configuration.archive() else {
        return Ok(None);
    };
    let unknown = || {
        let rule = "must be the digest of an archive that was uploaded and is still kept";
        Error::Invalid(Violations::one("image.config.dockerfile.archive", rule))
    };
    let digest = ContextDigest::parse(archive).map_err(|_| unknown())?;
    let row = by_digest(db, &digest).await?.ok_or_else(unknown)?;
    if let Some(path) = configuration.dockerfile_in_archive()
        && !FilePaths::from_stored(row.paths.clone()).may_have_dockerfile(path)
    {
        let rule = format!("must be the path of a file in the archive: it has no {path:?}");
        return Err(Error::Invalid(Violations::one("image.config.dockerfile.dockerfile_path", rule)));
    }
    Ok(Some(row.into()))
}

/// Marks the archives that an image's configurations have named as used until now.
pub(super) fn touch_named(txn: &WriteTransaction, image: ImageId, now: Timestamp) {
    let named = configuration::Entity::find()
        .select_only()
        .column(configuration::Column::Archive)
        .filter(configuration::Column::Image.eq(image))
        .filter(configuration::Column::Archive.is_not_null())
        .into_query();
    txn.defer(
        context::Entity::update_many()
            .col_expr(context::Column::UsedAt, Expr::value(now))
            .filter(context::Column::Digest.in_subquery(named)),
    );
}

async fn kept(db: &impl ConnectionTrait, digest: &ContextDigest) -> Result<Option<KeptContext>, DbErr> {
    Ok(by_digest(db, digest).await?.map(KeptContext::from))
}

async fn by_digest(
    db: &impl ConnectionTrait,
    digest: &ContextDigest,
) -> Result<Option<context::Model>, DbErr> {
    context::Entity::find().filter(context::Column::Digest.eq(digest.clone())).one(db).await
}

impl From<context::Model> for KeptContext {
    fn from(row: context::Model) -> Self {
        let context::Model { upload, size_bytes, used_at, .. } = row;
        Self { upload, size_bytes, used_at }
    }
}

/// Marks an upload as used and returns 1, or returns 0 if it is gone or being deleted.
async fn touch(db: &impl ConnectionTrait, upload: Uuid, now: Timestamp) -> Result<u64, DbErr> {
    let touched = context::Entity::update_many()
        .col_expr(context::Column::UsedAt, Expr::value(now))
        .filter(context::Column::Upload.eq(upload))
        .filter(context::Column::UsedAt.ne(Timestamp::from_micros(0)))
        .exec(db)
        .await?;
    Ok(touched.rows_affected)
}

async fn expire(db: &impl ConnectionTrait, upload: Uuid) -> Result<(), DbErr> {
    touch(db, upload, Timestamp::from_micros(0)).await?;
    Ok(())
}

/// Matches archives that a configuration in use names.
fn is_named() -> SimpleExpr {
    let of_archive = Expr::col((configuration::Entity, configuration::Column::Archive))
        .equals((context::Entity, context::Column::Digest));
    exists(configuration::Entity, Condition::all().add(of_archive).add(is_in_use()))
}

/// Matches configurations that an image has now, or that an active build was queued with.
pub(super) fn is_in_use() -> SimpleExpr {
    let is_of = |(image, revision): (Expr, Expr)| {
        Condition::all()
            .add(image.equals((configuration::Entity, configuration::Column::Image)))
            .add(revision.equals((configuration::Entity, configuration::Column::Revision)))
    };
    let of_image = |column| Expr::col((image::Entity, column));
    let current = is_of((of_image(image::Column::Id), of_image(image::Column::ConfigurationRevision)));
    let of_build = |column| Expr::col((build::Entity, column));
    let active = is_of((of_build(build::Column::Image), of_build(build::Column::ConfigurationRevision)));
    exists(image::Entity, current).or(exists(build::Entity, active.add(queue::is_active())))
}

fn exists(table: impl IntoTableRef, condition: Condition) -> SimpleExpr {
    Expr::exists(Query::select().expr(Expr::value(1)).from(table).cond_where(condition).take())
}
