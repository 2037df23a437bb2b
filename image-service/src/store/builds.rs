//! Builds: the queue, what is decided about it, and the histories.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, ExprTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, sea_query::Expr,
};
use uuid::Uuid;

use super::{Store, entity::build, queue, rows, workers, writing::Writing};
use crate::{
    build::{Build, BuildId, BuildInView, Pending, PendingReason, State},
    dispatch::Policy,
    error::{Error, Resource},
    image::ImageId,
    timestamp::Timestamp,
};

impl Store {
    /// Reads one build.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is none.
    pub(crate) async fn build(&self, id: BuildId) -> Result<BuildInView, Error> {
        let txn = self.read().await?;
        let build = one_build(&txn, id).await?;
        let now = self.now(&txn).await?;
        let build = in_view(&txn, build, &self.policy, now).await?;
        txn.commit().await?;
        Ok(build)
    }

    /// Reads the builds of an image with numbers below `before`, the newest first.
    pub(crate) async fn builds(
        &self,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<BuildInView>, Error> {
        let txn = self.read().await?;
        let mut query = build::Entity::find()
            .filter(build::Column::Image.eq(image.0))
            .order_by_desc(build::Column::Number)
            .limit(limit);
        if let Some(number) = before {
            query = query.filter(build::Column::Number.lt(number));
        }
        let now = self.now(&txn).await?;
        let mut builds = Vec::new();
        for row in query.all(&txn).await? {
            let build = rows::build_from_row(row)?;
            builds.push(in_view(&txn, build, &self.policy, now).await?);
        }
        txn.commit().await?;
        Ok(builds)
    }
}

impl Store {
    /// How many builds are in the queue, and for how long the oldest.
    pub(crate) async fn queue_load(&self) -> Result<(u64, Duration), Error> {
        let depth = queue::queued().count(&self.reader).await?;
        let oldest = queue::queued()
            .select_only()
            .column(build::Column::QueuedAt)
            .order_by_asc(build::Column::QueuedAt)
            .limit(1)
            .into_tuple::<i64>()
            .one(&self.reader)
            .await?;
        let now = self.now(&self.reader).await?;
        let waits = oldest.map_or(0, |oldest| now.micros().saturating_sub(oldest));
        Ok((depth, Duration::from_micros(u64::try_from(waits).unwrap_or(0))))
    }
}

/// A build as callers see it: with why it is pending, while it is.
pub(super) async fn in_view(
    db: &impl ConnectionTrait,
    build: Build,
    policy: &Policy,
    now: Timestamp,
) -> Result<BuildInView, DbErr> {
    let pending = match build.state {
        State::Queued => Some(pending(db, &build, policy, now).await?),
        State::Claimed => Some(Pending { reason: PendingReason::Dispatching, queue_position: 0 }),
        State::Running | State::Publishing | State::Succeeded | State::Failed | State::Cancelled => None,
    };
    let worker_offline = match build.worker.as_deref().filter(|_| build.state.is_held()) {
        Some(worker) => !workers::is_online_now(db, worker, policy, now).await?,
        None => false,
    };
    Ok(BuildInView { build, pending, worker_offline })
}

async fn pending(
    db: &impl ConnectionTrait,
    build: &Build,
    policy: &Policy,
    now: Timestamp,
) -> Result<Pending, DbErr> {
    let before = queued_before(db, build).await?;
    let reason = workers::pending_reason(db, build, policy, now).await?;
    Ok(Pending { reason, queue_position: i64::try_from(before).unwrap_or(i64::MAX).saturating_add(1) })
}

/// How many queued builds are before this one, counted to [`Pending::MOST_BEFORE`].
async fn queued_before(db: &impl ConnectionTrait, of: &Build) -> Result<u64, DbErr> {
    use build::Column::{Id, QueuedAt, Round};
    let turn = Expr::tuple([Round, QueuedAt, Id].map(Expr::col));
    let (round, queued_at, id) = of.turn();
    let earlier =
        turn.lt(Expr::tuple([Expr::value(round), Expr::value(queued_at.micros()), Expr::value(id.0)]));
    queue::queued().filter(earlier).select_only().column(Id).limit(Pending::MOST_BEFORE).count(db).await
}

pub(super) async fn one(txn: &Writing, id: Uuid) -> Result<Build, DbErr> {
    let row = build::Entity::find_by_id(id)
        .lock_exclusive()
        .one(txn)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("a build".to_owned()))?;
    rows::build_from_row(row)
}

/// The build of an image that is not final yet.
pub(super) async fn active_of(txn: &Writing, image: ImageId) -> Result<Option<Build>, DbErr> {
    queue::active()
        .filter(build::Column::Image.eq(image.0))
        .one(txn)
        .await?
        .map(rows::build_from_row)
        .transpose()
}

pub(super) async fn held_by(db: &impl ConnectionTrait, worker: &str) -> Result<u64, DbErr> {
    queue::held().filter(build::Column::Worker.eq(worker)).count(db).await
}

pub(super) async fn one_build(db: &impl ConnectionTrait, id: BuildId) -> Result<Build, Error> {
    let row = build::Entity::find_by_id(id.0).one(db).await?.ok_or(Error::NotFound(Resource::Build))?;
    Ok(rows::build_from_row(row)?)
}
