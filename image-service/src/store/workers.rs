//! Workers and their sessions.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, ExprTrait,
    FromQueryResult, IntoActiveModel, QueryFilter, QueryOrder, QueryResult, QuerySelect, QueryTrait, Select,
    sea_query::{CaseStatement, Expr},
};
use uuid::Uuid;

use super::{
    Store,
    entity::{build, worker},
    hints, queue,
    request_transaction::RequestTransaction,
    values::AsJson,
};
use crate::{
    dispatch::{Connected, Hello, Policy, Worker},
    error::{Error, Resource},
    hint::Hint,
    timestamp::Timestamp,
    turns::Turn,
};

impl Store {
    /// Records a worker's report and session.
    ///
    /// # Errors
    ///
    /// Returns [`Error::WorkerConnected`] if another process of the worker is online.
    pub(super) async fn record_worker(&self, hello: &Hello, session: Option<Uuid>) -> Result<(), Error> {
        let txn = self.write(Turn::Dispatch).await?;
        let now = self.now(&txn).await?;
        let known = worker::Entity::find_by_id(&hello.name).one(&txn).await?;
        if known
            .as_ref()
            .is_some_and(|known| known.instance != hello.instance && known.is_online(&self.policy, now))
        {
            return Err(Error::WorkerConnected(hello.name.clone()));
        }
        let row = worker::Model {
            name: hello.name.clone(),
            labels_json: AsJson(hello.labels.clone()),
            slots: hello.slots,
            engine_version: hello.engine_version.clone(),
            capabilities_json: AsJson(hello.capabilities.clone()),
            pools_json: AsJson(hello.pools.clone()),
            instance: hello.instance.clone(),
            session,
            connected_at: now,
            heard_at: now,
            drained: known.as_ref().is_some_and(|known| known.drained),
            draining: false,
            protocol_version: hello.protocol_version,
            unsupported_reason: hello.unsupported_reason.clone(),
            withheld_json: AsJson(hello.withheld.clone()),
            engine_warning: hello.engine_warning.clone(),
            held_since: Timestamp::from_micros(0),
        };
        let row = row.into_active_model().reset_all();
        if known.is_some() {
            row.update(&txn).await?;
        } else {
            worker::Entity::insert(row).exec_without_returning(&txn).await?;
        }
        txn.commit().await
    }

    /// Returns the next workers in the order of their names.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn workers(&self, after: Option<&str>, limit: u64) -> Result<Vec<Worker>, Error> {
        let now = self.now(&self.reader).await?;
        let mut next = worker::Entity::find().limit(limit);
        if let Some(name) = after {
            next = next.filter(worker::Column::Name.gt(name));
        }
        Ok(read(&self.reader, next, &self.policy, now).await?)
    }

    /// Returns the worker of this name.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is none.
    pub(crate) async fn worker(&self, name: &str) -> Result<Worker, Error> {
        one(&self.reader, name, &self.policy, self.now(&self.reader).await?).await
    }
}

impl RequestTransaction<'_> {
    /// Drains a worker, or lets it get builds again.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is no such worker.
    pub(crate) async fn drain(&mut self, worker: &str, drained: bool) -> Result<Worker, Error> {
        let changed = worker::Entity::update_many()
            .col_expr(worker::Column::Drained, Expr::value(drained))
            .filter(worker::Column::Name.eq(worker))
            .filter(worker::Column::Drained.ne(drained))
            .exec(&self.txn)
            .await?;
        if changed.rows_affected > 0 {
            self.effects.committed.queue_changed = true;
            hints::send(&self.txn, Hint::QueueChanged);
        }
        one(&self.txn, worker, self.store.policy(), self.now).await
    }
}

async fn one(
    db: &impl ConnectionTrait,
    name: &str,
    policy: &Policy,
    now: Timestamp,
) -> Result<Worker, Error> {
    let found = read(db, worker::Entity::find_by_id(name), policy, now).await?;
    found.into_iter().next().ok_or_else(|| Error::NotFound(Resource::Worker(name.to_owned())))
}

/// Returns workers in the order of their names, each with its number of taken slots.
pub(super) async fn read(
    db: &impl ConnectionTrait,
    workers: Select<worker::Entity>,
    policy: &Policy,
    now: Timestamp,
) -> Result<Vec<Worker>, DbErr> {
    const TAKEN: &str = "taken";
    // A time in the future was written before a clock was set back.
    let held_since = CaseStatement::new().case(held_since().gt(now), 0).finally(held_since());
    let query = workers.expr_as(slots_taken(held_since.into()), TAKEN).order_by_asc(worker::Column::Name);
    let rows = db.query_all(&query.into_query()).await?;
    let worker = |row: &QueryResult| {
        let slots_taken = row.try_get("", TAKEN)?;
        let row = worker::Model::from_query_result(row, "")?;
        Ok(Worker {
            online: row.is_online(policy, now),
            slots_taken,
            name: row.name,
            labels: row.labels_json.into_noun(),
            slots: row.slots,
            engine_version: row.engine_version,
            capabilities: row.capabilities_json.into_noun(),
            pools: row.pools_json.into_noun(),
            session: row.session,
            connected_at: row.connected_at,
            heard_at: row.heard_at,
            drained: row.drained,
            draining: row.draining,
            protocol_version: row.protocol_version,
            unsupported_reason: row.unsupported_reason,
            withheld: row.withheld_json.into_noun(),
            engine_warning: row.engine_warning,
        })
    };
    rows.iter().map(worker).collect()
}

/// Selects the workers that are online or among `connected`.
pub(super) fn reached(connected: &[Connected], policy: &Policy, now: Timestamp) -> Select<worker::Entity> {
    let recent = policy.recent(now);
    let online = Condition::all()
        .add(worker::Column::Session.is_not_null())
        .add(worker::Column::HeardAt.between(*recent.start(), *recent.end()));
    worker::Entity::find().filter(Condition::any().add(is_one_of(connected)).add(online))
}

fn is_one_of(connected: &[Connected]) -> Expr {
    worker::Column::Name.is_in(connected.iter().map(|worker| worker.name.as_str()))
}

impl worker::Model {
    fn is_online(&self, policy: &Policy, now: Timestamp) -> bool {
        self.session.is_some() && policy.is_recent(self.heard_at, now)
    }
}

/// Reports whether a build is queued and one of the connected workers may have a free slot.
pub(super) async fn may_claim(db: &impl ConnectionTrait, connected: &[Connected]) -> Result<bool, DbErr> {
    // Look up the last round, because on Postgres many dead index entries may precede the first.
    let last = queue::queued().select_only().column_as(build::Column::Round.max(), "last").into_query();
    let workers = worker::Entity::find()
        .select_only()
        .column(worker::Column::Name)
        .filter(is_one_of(connected))
        .filter(worker::Column::Drained.eq(false))
        .filter(worker::Column::UnsupportedReason.eq(""))
        .filter(Expr::SubQuery(None, Box::new(last.into())).is_not_null())
        .filter(slots_taken(held_since()).lt(worker::Column::Slots.into_expr()))
        .limit(1);
    Ok(db.query_one(&workers.into_query()).await?.is_some())
}

fn held_since() -> Expr {
    Expr::col((worker::Entity, worker::Column::HeldSince))
}

/// Counts the builds that a worker holds, given that none was claimed before `held_since`.
///
/// The bound skips the index entries of builds that it held before: on Postgres, dead ones stay while a
/// transaction may see them.
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
