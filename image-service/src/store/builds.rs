//! Builds: the queue, what is decided about it, and the histories.

use std::sync::Arc;

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};
use uuid::Uuid;

use super::{
    Committed, Store, apply,
    entity::{build, image},
    images, rows,
};
use crate::{
    access::Sight,
    build::{Build, BuildId, State},
    dispatch::{self, Decision, Event, Policy, Rows},
    error::{Error, Resource},
    image::ImageId,
    timestamp::Timestamp,
};

const HELD: [State; 3] = [State::Claimed, State::Running, State::Publishing];

impl Store {
    /// Decides what `event` does to a build and writes it; `None` when there is no such build.
    pub(crate) async fn decide(
        &self,
        id: BuildId,
        event: &Event,
        policy: &Policy,
        now: Timestamp,
    ) -> Result<Option<(Decision, Committed)>, Error> {
        let txn = self.write().await?;
        let Some(row) = build::Entity::find_by_id(id.0).lock_exclusive().one(&txn).await? else {
            return Ok(None);
        };
        let rows = Rows { build: rows::build_from_row(row)?, configuration: None };
        let decision = dispatch::decide(rows, event, policy, now).map_err(Error::Refused)?;
        let committed = apply(&txn, &decision, now).await?;
        txn.commit().await?;
        Ok(Some((decision, committed)))
    }

    /// Gives the head of the queue to a worker that has a free slot; `None` when either is missing.
    pub(crate) async fn claim(
        &self,
        worker: &str,
        session: Uuid,
        policy: &Policy,
        now: Timestamp,
    ) -> Result<Option<(Decision, Committed)>, Error> {
        if !self.has_queued().await? {
            return Ok(None);
        }
        let txn = self.write().await?;
        let Some(slots) = super::workers::slots_of_session(&txn, worker, session).await? else {
            return Err(Error::SessionLost);
        };
        if held_by(&txn, worker).await? >= u64::from(slots.unsigned_abs()) {
            return Ok(None);
        }
        let Some(head) = build::Entity::find()
            .filter(build::Column::State.eq(rows::state_to_code(State::Queued)))
            .order_by_asc(build::Column::QueuedAt)
            .order_by_asc(build::Column::Id)
            .limit(1)
            .lock_exclusive()
            .one(&txn)
            .await?
        else {
            return Ok(None);
        };
        let build = rows::build_from_row(head)?;
        let configuration = images::configuration(&txn, build.image, build.configuration_revision).await?;
        let rows = Rows { build, configuration: Some(Arc::new(configuration)) };
        let event = Event::Claim { worker: worker.to_owned() };
        let decision = dispatch::decide(rows, &event, policy, now).map_err(Error::Refused)?;
        let committed = apply(&txn, &decision, now).await?;
        txn.commit().await?;
        Ok(Some((decision, committed)))
    }

    /// Whether anything is queued, read without waiting for the writer.
    async fn has_queued(&self) -> Result<bool, DbErr> {
        let queued = build::Entity::find()
            .select_only()
            .column(build::Column::Id)
            .filter(build::Column::State.eq(rows::state_to_code(State::Queued)))
            .limit(1)
            .into_tuple::<Uuid>()
            .one(&self.reader)
            .await?;
        Ok(queued.is_some())
    }

    /// The builds whose lease is over, or whose cancel was requested before `cancelled_before`.
    pub(crate) async fn overdue(
        &self,
        now: Timestamp,
        cancelled_before: Timestamp,
    ) -> Result<Vec<Build>, Error> {
        let found = held()
            .filter(
                Condition::any()
                    .add(build::Column::LeaseExpiresAt.lte(now.micros()))
                    .add(build::Column::CancelRequestedAt.lte(cancelled_before.micros())),
            )
            .all(&self.reader)
            .await?;
        Ok(found.into_iter().map(rows::build_from_row).collect::<Result<_, _>>()?)
    }

    /// One build whose image is in sight.
    pub(crate) async fn build(&self, sight: &Sight, id: BuildId) -> Result<Build, Error> {
        build_in_sight(&self.reader, sight, id).await
    }

    /// The builds of an image that is in sight, the newest first, with numbers below `before`.
    pub(crate) async fn builds(
        &self,
        sight: &Sight,
        image: ImageId,
        before: Option<i64>,
        limit: u64,
    ) -> Result<Vec<Build>, Error> {
        let txn = self.reader.begin().await?;
        require_in_sight(&txn, sight, image, Resource::Image).await?;
        let mut query = build::Entity::find()
            .filter(build::Column::Image.eq(image.0))
            .order_by_desc(build::Column::Number)
            .limit(limit);
        if let Some(number) = before {
            query = query.filter(build::Column::Number.lt(number));
        }
        let found = query.all(&txn).await?;
        txn.commit().await?;
        Ok(found.into_iter().map(rows::build_from_row).collect::<Result<_, _>>()?)
    }

    /// How many queued builds are before this one.
    pub(crate) async fn queued_before(&self, of: &Build) -> Result<u64, Error> {
        let earlier = Condition::any().add(build::Column::QueuedAt.lt(of.queued_at.micros())).add(
            Condition::all()
                .add(build::Column::QueuedAt.eq(of.queued_at.micros()))
                .add(build::Column::Id.lt(of.id.0)),
        );
        Ok(build::Entity::find()
            .filter(build::Column::State.eq(rows::state_to_code(State::Queued)))
            .filter(earlier)
            .count(&self.reader)
            .await?)
    }
}

pub(super) async fn one(txn: &DatabaseTransaction, id: Uuid) -> Result<Build, DbErr> {
    let row = build::Entity::find_by_id(id)
        .lock_exclusive()
        .one(txn)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("a build".to_owned()))?;
    rows::build_from_row(row)
}

/// The build of an image that is not final yet.
pub(super) async fn active_of(txn: &DatabaseTransaction, image: ImageId) -> Result<Option<Build>, DbErr> {
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

pub(super) async fn build_in_sight(
    db: &impl ConnectionTrait,
    sight: &Sight,
    id: BuildId,
) -> Result<Build, Error> {
    let row = build::Entity::find_by_id(id.0).one(db).await?.ok_or(Error::NotFound(Resource::Build))?;
    require_in_sight(db, sight, ImageId(row.image), Resource::Build).await?;
    Ok(rows::build_from_row(row)?)
}

/// Fails unless the image is in sight; then what was asked for, `missing`, does not exist for the caller.
async fn require_in_sight(
    db: &impl ConnectionTrait,
    sight: &Sight,
    id: ImageId,
    missing: Resource,
) -> Result<(), Error> {
    let creator = image::Entity::find_by_id(id.0)
        .select_only()
        .column(image::Column::Creator)
        .filter(image::Column::Deleted.eq(false))
        .into_tuple::<String>()
        .one(db)
        .await?;
    match creator {
        Some(creator) if sight.includes(&creator) => Ok(()),
        Some(_) | None => Err(Error::NotFound(missing)),
    }
}
