//! Builds: the queue, what is decided about it, and the histories.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait, ExprTrait, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect, QueryTrait, Statement, sea_query::Expr,
};
use uuid::Uuid;

use super::{
    Store,
    entity::{build, catalogue},
    rows, workers,
    writing::Writing,
};
use crate::{
    build::{Build, BuildId, BuildInView, Pending, PendingReason, State},
    dispatch::Policy,
    error::{Error, Resource},
    image::ImageId,
    timestamp::Timestamp,
};

const HELD: [State; 3] = [State::Claimed, State::Running, State::Publishing];

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
        let queued =
            || build::Entity::find().filter(build::Column::State.eq(rows::state_to_code(State::Queued)));
        let depth = queued().count(&self.reader).await?;
        let oldest = queued()
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
    build::Entity::find()
        .filter(build::Column::State.eq(rows::state_to_code(State::Queued)))
        .filter(earlier)
        .select_only()
        .column(Id)
        .limit(Pending::MOST_BEFORE)
        .count(db)
        .await
}

/// Returns the first queued builds of each set of requirements, at most `limit` of each, without those that back off.
pub(super) async fn first_of_each(
    db: &impl ConnectionTrait,
    limit: usize,
    now: Timestamp,
) -> Result<Vec<Build>, DbErr> {
    // Every step is one search of the index, however many builds require the same.
    let queued = rows::state_to_code(State::Queued);
    let keys = format!(
        "WITH RECURSIVE keys (key) AS (SELECT MIN(requirements_key) FROM builds WHERE state = {queued} UNION ALL \
         SELECT (SELECT MIN(requirements_key) FROM builds WHERE state = {queued} AND requirements_key > key) \
         FROM keys WHERE key IS NOT NULL) "
    );
    // As `Build::is_backing_off` has it. Those that do are few: a worker has failed each of them within the last seconds.
    let (now, latest) = (now.micros(), now.after(Build::MAX_BACKOFF).micros());
    let of_one = |what: &str| {
        format!(
            "(SELECT {what} FROM builds first WHERE first.state = {queued} AND first.requirements_key = key \
             AND (first.not_before IS NULL OR first.not_before <= {now} OR first.not_before > {latest}) \
             ORDER BY first.round, first.queued_at, first.id LIMIT {limit})"
        )
    };
    // Postgres would look through all builds for each key, and SQLite has no LATERAL.
    let sql = if db.get_database_backend() == DbBackend::Postgres {
        format!("{keys}SELECT builds.* FROM keys CROSS JOIN LATERAL {} builds", of_one("first.*"))
    } else {
        format!("{keys}SELECT builds.* FROM keys JOIN builds ON builds.id IN {}", of_one("first.id"))
    };
    let first = Statement::from_string(db.get_database_backend(), sql);
    let first = build::Entity::find().from_raw_sql(first).all(db).await?;
    first.into_iter().map(rows::build_from_row).collect()
}

/// The round that the next build of a requester is in: the one after that of its last, unless the queue is further.
///
/// A build that was cancelled before any worker took it has used no turn.
pub(super) async fn next_round(db: &impl ConnectionTrait, requester: &str) -> Result<i64, DbErr> {
    let used = Condition::any()
        .add(build::Column::State.eq(rows::state_to_code(State::Queued)))
        .add(build::Column::Attempt.gt(0));
    let last = build::Entity::find()
        .select_only()
        .column(build::Column::Round)
        .filter(build::Column::RequestedBy.eq(requester))
        .filter(used)
        .order_by_desc(build::Column::Round)
        .limit(1)
        .into_query();
    let rounds = catalogue::Entity::find_by_id(1)
        .select_only()
        .column(catalogue::Column::Round)
        .expr_as(Expr::SubQuery(None, Box::new(last.into())), "last")
        .into_tuple::<(i64, Option<i64>)>()
        .one(db)
        .await?;
    let (of_queue, last) = rounds.unwrap_or_default();
    Ok(last.map_or(of_queue, |last| Ord::max(of_queue, last + 1)))
}

/// Fails when a requester has as many builds in the queue as it may have.
pub(super) async fn require_room(
    db: &impl ConnectionTrait,
    requester: &str,
    policy: &Policy,
) -> Result<(), Error> {
    let Some(limit) = policy.max_pending else {
        return Ok(());
    };
    let last_one = build::Entity::find()
        .select_only()
        .column(build::Column::Id)
        .filter(build::Column::RequestedBy.eq(requester))
        // As the index has it.
        .filter(Expr::cust(format!("state = {}", rows::state_to_code(State::Queued))))
        .offset(limit.saturating_sub(1))
        .limit(1)
        .into_tuple::<Uuid>()
        .one(db)
        .await?;
    if last_one.is_some() { Err(Error::TooManyPendingBuilds { limit }) } else { Ok(()) }
}

/// Notes that the queue has come to a round.
pub(super) fn reach_round(txn: &Writing, round: i64) {
    txn.later(
        catalogue::Entity::update_many()
            .col_expr(catalogue::Column::Round, Expr::value(round))
            .filter(catalogue::Column::Round.lt(round)),
    );
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
    build::Entity::find()
        .filter(build::Column::Image.eq(image.0))
        .filter(build::Column::State.lt(rows::state_to_code(State::Succeeded)))
        .one(txn)
        .await?
        .map(rows::build_from_row)
        .transpose()
}

/// The builds that some worker holds.
pub(super) fn held() -> sea_orm::Select<build::Entity> {
    build::Entity::find().filter(build::Column::State.is_in(HELD.map(rows::state_to_code)))
}

pub(super) async fn held_by(db: &impl ConnectionTrait, worker: &str) -> Result<u64, DbErr> {
    held().filter(build::Column::Worker.eq(worker)).count(db).await
}

pub(super) async fn one_build(db: &impl ConnectionTrait, id: BuildId) -> Result<Build, Error> {
    let row = build::Entity::find_by_id(id.0).one(db).await?.ok_or(Error::NotFound(Resource::Build))?;
    Ok(rows::build_from_row(row)?)
}
