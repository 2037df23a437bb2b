//! Queries of builds, and builds as callers see them.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, ExprTrait, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, sea_query::Expr,
};

use super::{
    Store,
    entity::{build, worker},
    queue, required,
    transaction::WriteTransaction,
    workers,
};
use crate::{
    build::{Build, BuildId, BuildInView, Pending, PendingReason, State},
    dispatch::{Policy, RunningBuilds, pending_reason},
    error::{Error, Refusal, Resource},
    image::ImageId,
    timestamp::Timestamp,
};

impl Store {
    /// Returns a build as callers see it.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is none.
    pub(crate) async fn build(&self, id: BuildId) -> Result<BuildInView, Error> {
        let txn = self.read().await?;
        let build = one(&txn, id).await?;
        let now = self.now(&txn).await?;
        let build = in_view(&txn, build, &self.policy, now).await?;
        txn.commit().await?;
        Ok(build)
    }

    /// Returns the builds of an image with numbers below `before`, newest first.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn builds(
        &self,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<BuildInView>, Error> {
        let txn = self.read().await?;
        let mut query = build::Entity::find()
            .filter(build::Column::Image.eq(image))
            .order_by_desc(build::Column::Number)
            .limit(limit);
        if let Some(number) = before {
            query = query.filter(build::Column::Number.lt(number));
        }
        let now = self.now(&txn).await?;
        let builds = query.into_model().all(&txn).await?;
        let builds = all_in_view(&txn, builds, &self.policy, now).await?;
        txn.commit().await?;
        Ok(builds)
    }

    /// Returns those of the builds that exist.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn builds_by_id(
        &self,
        ids: impl IntoIterator<Item = BuildId>,
    ) -> Result<HashMap<BuildId, Build>, Error> {
        let ids: Vec<_> = ids.into_iter().collect();
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let found = build::Entity::find().filter(build::Column::Id.is_in(ids)).all(&self.reader).await?;
        Ok(found.into_iter().map(|row| (row.id, row.into())).collect())
    }

    /// Returns a build as callers would see it if it were queued now.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn queued_in_view(&self, mut build: Build) -> Result<BuildInView, Error> {
        build.round = queue::next_round(&self.reader, &build.requester.subject).await?;
        self.build_in_view(build).await
    }

    /// Returns a build as callers would see it in this state.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn build_in_view(&self, build: Build) -> Result<BuildInView, Error> {
        let txn = self.read().await?;
        let now = self.now(&txn).await?;
        let build = in_view(&txn, build, &self.policy, now).await?;
        txn.commit().await?;
        Ok(build)
    }

    /// Returns the error for a build that is `meant` and is not the latest one of an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn other_build(&self, meant: Option<BuildId>, image: ImageId) -> Result<Error, Error> {
        Ok(other_build(&self.reader, meant, image).await?)
    }

    /// Returns the number of queued builds and the age of the oldest.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn queue_load(&self) -> Result<(u64, Duration), Error> {
        let load = queue::queued()
            .select_only()
            .expr_as(Expr::cust("COUNT(*)"), "depth")
            .column_as(build::Column::QueuedAt.min(), "oldest")
            .into_tuple::<(i64, Option<Timestamp>)>()
            .one(&self.reader)
            .await?;
        let (depth, oldest) = load.unwrap_or_default();
        let now = self.now(&self.reader).await?;
        let waits = oldest.map_or(0, |oldest| now.micros().saturating_sub(oldest.micros()));
        let count = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok((count(depth), Duration::from_micros(count(waits))))
    }
}

/// Returns the error for a build that is `meant` and is not the latest one of an image: there is no such build of this
/// image, or another one is the latest.
pub(super) async fn other_build(
    db: &impl ConnectionTrait,
    meant: Option<BuildId>,
    image: ImageId,
) -> Result<Error, DbErr> {
    let Some(meant) = meant else { return Ok(Error::NotFound(Resource::Image(image))) };
    let row = build::Entity::find_by_id(meant).one(db).await?;
    let is_of_image = row.is_some_and(|row| row.image == image);
    Ok(if is_of_image {
        Error::Refused(Refusal::OtherBuild)
    } else {
        Error::NotFound(Resource::Build(meant))
    })
}

/// Returns the worker that holds a build, if any.
fn holder(build: &Build) -> Option<&str> {
    build.worker.as_deref().filter(|_| build.state.is_held())
}

/// Returns a build as callers see it.
pub(super) async fn in_view(
    db: &impl ConnectionTrait,
    build: Build,
    policy: &Policy,
    now: Timestamp,
) -> Result<BuildInView, DbErr> {
    let all = all_in_view(db, vec![build], policy, now).await?;
    required(all.into_iter().next(), "a build")
}

/// Returns builds as callers see them: each with the reason why it is pending, if it is.
async fn all_in_view(
    db: &impl ConnectionTrait,
    builds: Vec<Build>,
    policy: &Policy,
    now: Timestamp,
) -> Result<Vec<BuildInView>, DbErr> {
    let holders: BTreeSet<&str> = builds.iter().filter_map(holder).collect();
    let is_queued = builds.iter().any(|build| build.state == State::Queued);
    let concerned = if is_queued {
        Some(workers::reached(&[], policy, now))
    } else {
        let of_these = worker::Column::Name.is_in(holders.iter().copied());
        (!holders.is_empty()).then(|| worker::Entity::find().filter(of_these))
    };
    let workers = match concerned {
        Some(concerned) => workers::read(db, concerned, policy, now).await?,
        None => Vec::new(),
    };
    let running = if is_queued { queue::running(db, policy).await? } else { RunningBuilds::default() };
    let mut all = Vec::with_capacity(builds.len());
    for build in builds {
        let pending = match build.state {
            State::Queued => Some(Pending {
                reason: pending_reason(&build, &workers, &running, now),
                queue_position: queued_before(db, &build).await?.saturating_add(1),
            }),
            State::Claimed => Some(Pending { reason: PendingReason::Dispatching, queue_position: 0 }),
            State::Running | State::Publishing | State::Succeeded | State::Failed | State::Cancelled => None,
        };
        let is_online = |name| workers.iter().any(|worker| worker.name == name && worker.online);
        let worker_offline = holder(&build).is_some_and(|name| !is_online(name));
        all.push(BuildInView { build, pending, worker_offline });
    }
    Ok(all)
}

/// Counts the queued builds ahead of this one, up to [`Pending::MOST_BEFORE`].
async fn queued_before(db: &impl ConnectionTrait, build: &Build) -> Result<i64, DbErr> {
    use build::Column::{Id, QueuedAt, Round};
    let turn = Expr::tuple([Round, QueuedAt, Id].map(Expr::col));
    let (round, queued_at, id) = build.turn();
    let earlier = turn.lt(Expr::tuple([Expr::value(round), Expr::value(queued_at), Expr::value(id)]));
    let before = queue::queued().filter(earlier).select_only().column(Id).limit(Pending::MOST_BEFORE);
    Ok(i64::try_from(before.count(db).await?).unwrap_or(i64::MAX))
}

/// Returns the active build of an image, if any.
pub(super) async fn active_of(txn: &WriteTransaction, image: ImageId) -> Result<Option<Build>, DbErr> {
    queue::active().filter(build::Column::Image.eq(image)).into_model().one(txn).await
}

pub(super) async fn held_by(db: &impl ConnectionTrait, worker: &str) -> Result<Vec<Build>, DbErr> {
    queue::held().filter(build::Column::Worker.eq(worker)).into_model().all(db).await
}

pub(super) async fn one(db: &impl ConnectionTrait, id: BuildId) -> Result<Build, Error> {
    Ok(build::Entity::find_by_id(id).one(db).await?.ok_or(Error::NotFound(Resource::Build(id)))?.into())
}
