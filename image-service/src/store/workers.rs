//! Workers and the sessions that speak for them.

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, ExprTrait,
    FromQueryResult, IdenStatic, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, QueryTrait, Select,
    Set,
    sea_query::{CaseStatement, Expr, Func, JoinType, SelectStatement},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Effects, Hint, Store, builds,
    entity::{build, worker},
    hints, queue, rows,
};
use crate::{
    build::{Build, PendingReason},
    dispatch::{Candidate, Connected, Hello, Policy, WithheldAbility},
    error::{Error, Resource},
    image::Capability,
    request::Request,
    timestamp::Timestamp,
    turns::Turn,
};

/// What is known of a worker that has ever connected.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WorkerRow {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) slots: i32,
    pub(crate) slots_taken: i64,
    pub(crate) engine_version: String,
    pub(crate) capabilities: BTreeSet<Capability>,
    /// Whether a connection speaks for it, and it has been heard of lately.
    pub(crate) online: bool,
    pub(crate) connected_at: Timestamp,
    pub(crate) heard_at: Timestamp,
    /// Whether an operator wants it to get no more builds.
    pub(crate) drained: bool,
    /// Whether it takes no more builds by itself.
    pub(crate) draining: bool,
    #[serde(default)]
    pub(crate) protocol_version: i32,
    /// Why it gets no builds at all; empty when it takes some.
    #[serde(default)]
    pub(crate) unsupported_reason: String,
    #[serde(default)]
    pub(crate) withheld: Vec<WithheldAbility>,
    /// What an operator has to know of its engine; empty when there is nothing.
    #[serde(default)]
    pub(crate) engine_warning: String,
}

impl WorkerRow {
    /// Whether more builds may go to it.
    pub(crate) fn takes_builds(&self) -> bool {
        !self.drained && !self.draining
    }
}

impl Store {
    /// Says whether a worker gets no more builds.
    pub(crate) async fn drain_worker(
        &self,
        request: &Request,
        name: &str,
        drained: bool,
    ) -> Result<(WorkerRow, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let mut row = worker::Entity::find_by_id(name)
            .lock_exclusive()
            .one(&write.txn)
            .await?
            .ok_or(Error::NotFound(Resource::Worker))?;
        if row.drained != drained {
            let mut change = row.into_active_model();
            change.drained = Set(drained);
            row = change.update(&write.txn).await?;
            write.effects.committed.queue_moved = true;
            hints::send(&write.txn, Hint::QueueMoved);
        }
        let slots_taken = i64::try_from(builds::held_by(&write.txn, name).await?).unwrap_or(i64::MAX);
        let answer = from_row(row, slots_taken, &self.policy, write.now)?;
        write.finish(Ok(answer)).await
    }

    /// Writes what a worker says of itself, and which session speaks for it.
    ///
    /// # Errors
    ///
    /// [`Error::WorkerConnected`] while a session of another process speaks for it and was heard of lately.
    pub(super) async fn record_worker(&self, hello: &Hello, session: Option<Uuid>) -> Result<(), Error> {
        let txn = self.write(Turn::Dispatch).await?;
        let now = self.now(&txn).await?;
        let known = worker::Entity::find_by_id(&hello.name).lock_exclusive().one(&txn).await?;
        if known
            .as_ref()
            .is_some_and(|known| known.instance != hello.instance && is_online(known, &self.policy, now))
        {
            return Err(Error::WorkerConnected(hello.name.clone()));
        }
        let row = worker::Model {
            name: hello.name.clone(),
            labels_json: rows::to_json(&hello.labels)?,
            slots: hello.slots,
            engine_version: hello.engine_version.clone(),
            capabilities_json: rows::to_json(&hello.capabilities)?,
            instance: hello.instance.clone(),
            session,
            connected_at: now.micros(),
            heard_at: now.micros(),
            drained: known.as_ref().is_some_and(|known| known.drained),
            draining: false,
            protocol_version: hello.protocol_version,
            unsupported_reason: hello.unsupported_reason.clone(),
            withheld_json: rows::to_json(&hello.withheld)?,
            engine_warning: hello.engine_warning.clone(),
            held_since: 0,
        };
        let row = row.into_active_model().reset_all();
        if known.is_some() {
            row.update(&txn).await?;
        } else {
            worker::Entity::insert(row).exec_without_returning(&txn).await?;
        }
        txn.commit().await?;
        Ok(())
    }

    /// The next workers by name.
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<WorkerRow>, Error> {
        let now = self.now(&self.reader).await?;
        Ok(all(&self.reader, after, limit, &self.policy, now).await?)
    }
}

/// The next workers by name.
pub(super) async fn all(
    db: &impl ConnectionTrait,
    after: Option<&str>,
    limit: u64,
    policy: &Policy,
    now: Timestamp,
) -> Result<Vec<WorkerRow>, DbErr> {
    let mut query = worker::Entity::find().order_by_asc(worker::Column::Name).limit(limit);
    if let Some(name) = after {
        query = query.filter(worker::Column::Name.gt(name));
    }
    let query = with_slots_taken(query);
    let mut workers = Vec::new();
    for row in db.query_all(&query).await? {
        let slots_taken = row.try_get::<Option<i64>>("", TAKEN)?.unwrap_or(0);
        workers.push(from_row(worker::Model::from_query_result(&row, "")?, slots_taken, policy, now)?);
    }
    Ok(workers)
}

pub(super) fn from_row(
    row: worker::Model,
    slots_taken: i64,
    policy: &Policy,
    now: Timestamp,
) -> Result<WorkerRow, DbErr> {
    Ok(WorkerRow {
        online: is_online(&row, policy, now),
        slots_taken,
        labels: rows::from_json(&row.labels_json)?,
        capabilities: rows::from_json(&row.capabilities_json)?,
        name: row.name,
        slots: row.slots,
        engine_version: row.engine_version,
        connected_at: Timestamp::from_micros(row.connected_at),
        heard_at: Timestamp::from_micros(row.heard_at),
        drained: row.drained,
        draining: row.draining,
        protocol_version: row.protocol_version,
        unsupported_reason: row.unsupported_reason,
        withheld: rows::from_json(&row.withheld_json)?,
        engine_warning: row.engine_warning,
    })
}

/// Returns why a queued build is still there: that it backs off, or else by the worker that is nearest to taking it.
pub(super) async fn pending_reason(
    db: &impl ConnectionTrait,
    build: &Build,
    policy: &Policy,
    now: Timestamp,
) -> Result<PendingReason, DbErr> {
    const NEAREST: &str = "nearest";
    const BY_NEARNESS: [PendingReason; 4] = [
        PendingReason::Dispatching,
        PendingReason::AllSlotsTaken,
        PendingReason::WorkersDraining,
        PendingReason::WorkersUnsupported,
    ];
    if build.is_backing_off(now) {
        return Ok(PendingReason::BackingOff);
    }
    let requirements = &build.requirements;
    let column = |column: worker::Column| Expr::col((worker::Entity, column));
    let is_draining = column(worker::Column::Drained).or(column(worker::Column::Draining));
    let is_unsupported = column(worker::Column::UnsupportedReason).ne("");
    let nearness = CaseStatement::new()
        .case(is_unsupported, 3)
        .case(is_draining, 2)
        .case(has_free_slot().not(), 1)
        .finally(0);
    // Workers are many, but of few kinds.
    let mut kinds = worker::Entity::find()
        .select_only()
        .columns([worker::Column::LabelsJson, worker::Column::CapabilitiesJson])
        .filter(is_online_as_of(policy, now))
        .group_by(worker::Column::LabelsJson)
        .group_by(worker::Column::CapabilitiesJson);
    if !requirements.worker.is_empty() {
        kinds = kinds.filter(worker::Column::Name.eq(&requirements.worker));
    }
    let mut kinds = beside_held(kinds);
    kinds.expr_as(Func::min(nearness), NEAREST);
    let kinds = db.query_all(&kinds).await?;
    if kinds.is_empty() && requirements.worker.is_empty() {
        return Ok(PendingReason::NoWorkerOnline);
    }
    let mut nearest = BY_NEARNESS.len();
    for kind in kinds {
        let labels = rows::from_json(&kind.try_get::<String>("", worker::Column::LabelsJson.as_str())?)?;
        let capabilities =
            rows::from_json(&kind.try_get::<String>("", worker::Column::CapabilitiesJson.as_str())?)?;
        if requirements.fit(&requirements.worker, &labels, &capabilities) {
            let nearness = usize::try_from(kind.try_get::<i32>("", NEAREST)?).unwrap_or(usize::MAX);
            nearest = Ord::min(nearest, nearness);
        }
    }
    Ok(BY_NEARNESS.get(nearest).copied().unwrap_or(PendingReason::NoSuitableWorker))
}

/// Whether a worker is connected and has been heard of lately.
pub(super) async fn is_online_now(
    db: &impl ConnectionTrait,
    name: &str,
    policy: &Policy,
    now: Timestamp,
) -> Result<bool, DbErr> {
    let row = worker::Entity::find_by_id(name).one(db).await?;
    Ok(row.is_some_and(|row| is_online(&row, policy, now)))
}

fn is_online(row: &worker::Model, policy: &Policy, now: Timestamp) -> bool {
    row.session.is_some() && policy.is_recent(Timestamp::from_micros(row.heard_at), now)
}

/// The same, as databases are asked.
fn is_online_as_of(policy: &Policy, now: Timestamp) -> Condition {
    let recent = policy.recent(now);
    Condition::all()
        .add(worker::Column::Session.is_not_null())
        .add(worker::Column::HeardAt.between(recent.start().micros(), recent.end().micros()))
}

/// Returns whether a build is queued and one of the connected workers may have a free slot.
pub(super) async fn may_claim(db: &impl ConnectionTrait, connected: &[Connected]) -> Result<bool, DbErr> {
    let names = connected.iter().map(|worker| worker.name.as_str());
    // The last round, because on Postgres many a dead entry may lie before the first one.
    let last = queue::queued().select_only().column_as(build::Column::Round.max(), "last").into_query();
    let workers = takes_builds()
        .select_only()
        .column(worker::Column::Name)
        .filter(worker::Column::Name.is_in(names))
        .filter(Expr::SubQuery(None, Box::new(last.into())).is_not_null())
        .filter(
            slots_taken(Expr::col((worker::Entity, worker::Column::HeldSince)))
                .lt(worker::Column::Slots.into_expr()),
        )
        .limit(1);
    Ok(db.query_one(&workers.into_query()).await?.is_some())
}

/// Returns the workers that a queued build may go to or wait for: the connected ones, and those that are online at other replicas.
///
/// A session that speaks for its worker no more has no free slot.
pub(super) async fn candidates(
    db: &impl ConnectionTrait,
    connected: &[Connected],
    policy: &Policy,
    now: Timestamp,
) -> Result<Vec<Candidate>, DbErr> {
    let names = connected.iter().map(|worker| worker.name.as_str());
    let is_elsewhere = is_online_as_of(policy, now).add(worker::Column::Draining.eq(false));
    let reached = Condition::any().add(worker::Column::Name.is_in(names)).add(is_elsewhere);
    // What lies in the future is of before a clock was put back.
    let held_since = CaseStatement::new()
        .case(Expr::col((worker::Entity, worker::Column::HeldSince)).gt(now.micros()), 0)
        .finally(Expr::col((worker::Entity, worker::Column::HeldSince)));
    let query = takes_builds()
        .expr_as(slots_taken(held_since.into()), TAKEN)
        .filter(reached)
        .order_by_asc(worker::Column::Name)
        .into_query();
    let mut candidates = Vec::new();
    for row in db.query_all(&query).await? {
        let taken = row.try_get::<i64>("", TAKEN)?;
        let row = worker::Model::from_query_result(&row, "")?;
        let is_connected =
            connected.iter().any(|worker| worker.name == row.name && Some(worker.session) == row.session);
        let free_slots = usize::try_from(i64::from(row.slots) - taken).unwrap_or(0);
        candidates.push(Candidate {
            labels: rows::from_json(&row.labels_json)?,
            capabilities: rows::from_json(&row.capabilities_json)?,
            free_slots: if is_connected { free_slots } else { 0 },
            name: row.name,
        });
    }
    Ok(candidates)
}

/// Selects the workers that operators let take builds, and whose engines can.
fn takes_builds() -> Select<worker::Entity> {
    worker::Entity::find()
        .filter(worker::Column::Drained.eq(false))
        .filter(worker::Column::UnsupportedReason.eq(""))
}

/// Counts the builds that a worker holds, all of which were claimed at `held_since` or later.
///
/// On Postgres the entries of those that it has held before may lie in the index, dead, for as long as some transaction may see them.
fn slots_taken(held_since: Expr) -> Expr {
    let of_worker =
        Expr::col((build::Entity, build::Column::Worker)).equals((worker::Entity, worker::Column::Name));
    let held = queue::held()
        .select_only()
        .expr(Expr::cust("COUNT(*)"))
        .filter(of_worker)
        .filter(Expr::col((build::Entity, build::Column::ClaimedAt)).gte(held_since))
        .into_query();
    Expr::SubQuery(None, Box::new(held.into()))
}

const TAKEN: &str = "taken";
const HELD: &str = "held";

/// The same workers, and how many builds each of them holds, unless it is none.
fn with_slots_taken(workers: Select<worker::Entity>) -> SelectStatement {
    let mut workers = beside_held(workers);
    workers.expr_as(Expr::col((HELD, TAKEN)), TAKEN);
    workers
}

/// The same workers, beside those that hold builds.
fn beside_held(workers: Select<worker::Entity>) -> SelectStatement {
    let held = queue::held()
        .select_only()
        .column(build::Column::Worker)
        .column_as(Expr::cust("COUNT(*)"), TAKEN)
        .group_by(build::Column::Worker)
        .into_query();
    let of_worker = Expr::col((HELD, build::Column::Worker)).equals((worker::Entity, worker::Column::Name));
    let mut workers = workers.into_query();
    workers.join_subquery(JoinType::LeftJoin, held, HELD, of_worker);
    workers
}

/// Whether a worker [beside what it holds](beside_held) holds less than it has slots for.
fn has_free_slot() -> Expr {
    Expr::from(Func::coalesce([Expr::col((HELD, TAKEN)), Expr::value(0)]))
        .lt(Expr::col((worker::Entity, worker::Column::Slots)))
}

pub(super) async fn held_by(db: &impl ConnectionTrait, name: &str) -> Result<Vec<Build>, DbErr> {
    queue::held()
        .filter(build::Column::Worker.eq(name))
        .all(db)
        .await?
        .into_iter()
        .map(rows::build_from_row)
        .collect()
}
