//! The rows of the queue: queued and held builds, turns of requesters, and the candidates of a claim.
//!
//! Every statement on the queue contains one of the conditions below literally, so that it uses an index
//! without finished builds: a database uses a partial index only if the statement implies its condition,
//! which a bound parameter does not.

use std::iter;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbBackend, DbErr, EntityTrait, ExprTrait, FromQueryResult, IntoActiveModel,
    PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait, Select, Statement, Value,
    sea_query::{Expr, SimpleExpr},
};

use super::{
    Store,
    entity::{build, catalogue, turn},
    request_transaction::RequestTransaction,
    transaction::WriteTransaction,
};
use crate::{
    build::Build,
    dispatch::{Placement, Policy, RunningBuilds},
    error::Error,
    timestamp::Timestamp,
};

/// Matches builds in the queue, as the indexes `builds_queued_…` do.
pub(super) fn is_queued() -> SimpleExpr {
    Expr::cust("builds.state = 1")
}

/// Matches builds that a worker holds, as the index `builds_held_by_worker` does.
pub(super) fn is_held() -> SimpleExpr {
    Expr::cust("builds.state IN (2, 3, 4)")
}

/// Matches builds that are not final, as the index `builds_active_of_image` does.
pub(super) fn is_active() -> SimpleExpr {
    Expr::cust("builds.finished_at IS NULL")
}

pub(super) fn queued() -> Select<build::Entity> {
    build::Entity::find().filter(is_queued())
}

pub(super) fn held() -> Select<build::Entity> {
    build::Entity::find().filter(is_held())
}

pub(super) fn active() -> Select<build::Entity> {
    build::Entity::find().filter(is_active())
}

/// Counts the builds that workers hold, by requester. Counts nothing without a limit.
pub(super) async fn running(db: &impl ConnectionTrait, policy: &Policy) -> Result<RunningBuilds, DbErr> {
    if policy.max_running.is_none() {
        return Ok(RunningBuilds::default());
    }
    let counted = held()
        .select_only()
        .column(build::Column::RequestedBy)
        .expr_as(Expr::cust("COUNT(*)"), "held")
        .group_by(build::Column::RequestedBy)
        .into_tuple::<(String, i64)>()
        .all(db)
        .await?;
    let counted = counted.into_iter().map(|(requester, held)| (requester, u64::try_from(held).unwrap_or(0)));
    Ok(RunningBuilds::new(policy.max_running, counted))
}

/// Matches builds of requesters that are not at their limit; `None` if nobody is.
fn not_of(running: &RunningBuilds) -> Option<SimpleExpr> {
    let at_limit: Vec<&str> = running.at_limit().collect();
    (!at_limit.is_empty()).then(|| build::Column::RequestedBy.is_not_in(at_limit))
}

/// The head of the queue, from which a claim chooses first.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// Current round of the queue.
    pub(super) round: i64,
    /// First builds, in the order of their turns.
    pub(super) builds: Vec<Build>,
    /// Set if the queue has no further builds.
    pub(super) is_whole: bool,
    /// Set if builds of requesters at their limit are left out.
    pub(super) is_filtered: bool,
}

/// Reads the head of the queue, without the builds of requesters at their limit. It has more builds than
/// `limit`, because some may back off or wait for a worker.
pub(super) async fn head(
    db: &impl ConnectionTrait,
    running: &RunningBuilds,
    limit: usize,
) -> Result<Head, DbErr> {
    const REACHED: &str = "reached";
    let read = limit.saturating_mul(2).saturating_add(8);
    // Builds before the first round were claimed. On Postgres their index entries, though dead, stay for as
    // long as a transaction may see them, and every claim would scan them.
    let first_round = of_catalogue(catalogue::Column::FirstRound);
    let query = queued()
        .expr_as(of_catalogue(catalogue::Column::Round), REACHED)
        .filter(Expr::col((build::Entity, build::Column::Round)).gte(first_round))
        .apply_if(not_of(running), |query, others| query.filter(others))
        .order_by_asc(build::Column::Round)
        .order_by_asc(build::Column::QueuedAt)
        .order_by_asc(build::Column::Id)
        .limit(u64::try_from(read).unwrap_or(u64::MAX))
        .into_query();
    let mut head = Head { is_filtered: running.at_limit().next().is_some(), ..Head::default() };
    for row in db.query_all(&query).await? {
        head.round = row.try_get("", REACHED)?;
        head.builds.push(Build::from_query_result(&row, "")?);
    }
    head.is_whole = head.builds.len() < read;
    Ok(head)
}

/// Selects a column of the catalogue's row.
fn of_catalogue(column: catalogue::Column) -> SimpleExpr {
    let row = catalogue::Entity::find_by_id(1).select_only().column(column).into_query();
    Expr::SubQuery(None, Box::new(row.into()))
}

/// Reads the builds of each group that a claim of at most `limit` may place. Skips those that back off, and
/// those of requesters at their limit.
///
/// Builds with equal requirements and the same preferred worker form a group. Of each group this reads the
/// first `limit` builds, and the first `limit` that no longer wait for their preferred worker: a claim cannot
/// place any further behind.
pub(super) async fn first_of_groups(
    db: &impl ConnectionTrait,
    running: &RunningBuilds,
    limit: usize,
    now: Timestamp,
) -> Result<Vec<Build>, DbErr> {
    // Each step is one index search, however many builds a group has.
    const GROUPS: &str = "WITH RECURSIVE keys (key) AS (SELECT MIN(requirements_key) FROM builds WHERE state = 1 UNION ALL \
         SELECT (SELECT MIN(requirements_key) FROM builds WHERE state = 1 AND requirements_key > key) \
         FROM keys WHERE key IS NOT NULL), \
         queued (key, preferred_worker) AS (SELECT key, \
         (SELECT preferred_worker FROM builds WHERE state = 1 AND requirements_key = key LIMIT 1) \
         FROM keys WHERE key IS NOT NULL) ";
    // Mirrors `Build::is_backing_off` and `Build::may_wait_for_cache`. Few back off: a worker failed each of
    // them seconds ago.
    const FIRST: &str = "FROM builds first WHERE first.state = 1 AND first.requirements_key = queued.key \
         AND (first.not_before IS NULL OR first.not_before <= $1 OR first.not_before > $2)";
    const WAITS_NO_MORE: &str = "AND queued.preferred_worker IS NOT NULL \
         AND (COALESCE(first.not_before, first.queued_at) <= $3 OR COALESCE(first.not_before, first.queued_at) > $1)";
    const ORDER: &str = "ORDER BY first.round, first.queued_at, first.id LIMIT $4";
    let at_limit: Vec<&str> = running.at_limit().collect();
    let others = if at_limit.is_empty() {
        String::new()
    } else {
        let parameters: Vec<String> = (5..).take(at_limit.len()).map(|number| format!("${number}")).collect();
        format!("AND first.requested_by NOT IN ({})", parameters.join(", "))
    };
    let of_group = |what: &str| {
        format!(
            "SELECT * FROM (SELECT {what} {FIRST} {others} {ORDER}) a UNION ALL \
             SELECT * FROM (SELECT {what} {FIRST} {others} {WAITS_NO_MORE} {ORDER}) b"
        )
    };
    // Without `LATERAL`, Postgres would scan all builds for each group; SQLite does not have it.
    let sql = if db.get_database_backend() == DbBackend::Postgres {
        let first = of_group("first.*");
        format!("{GROUPS}SELECT builds.* FROM queued CROSS JOIN LATERAL ({first}) builds")
    } else {
        let first = of_group("first.id");
        format!("{GROUPS}SELECT builds.* FROM queued JOIN builds ON builds.id IN ({first})")
    };
    let bounds: [Value; 4] = [
        now.into(),
        now.after(Build::MAX_BACKOFF).into(),
        now.before(Build::MAX_CACHE_WAIT).into(),
        i64::try_from(limit).unwrap_or(i64::MAX).into(),
    ];
    let values = bounds.into_iter().chain(at_limit.into_iter().map(Value::from));
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, values);
    let mut builds: Vec<Build> = build::Entity::find().from_raw_sql(statement).into_model().all(db).await?;
    builds.sort_by_key(Build::turn);
    builds.dedup_by_key(|build| build.id);
    Ok(builds)
}

/// Returns the round of a requester's next build: one after its last, or the queue's if that is later.
///
/// A build that was cancelled before a worker claimed it used no turn.
pub(super) async fn next_round(db: &impl ConnectionTrait, requester: &str) -> Result<i64, DbErr> {
    let reached = || Expr::col((catalogue::Entity, catalogue::Column::Round));
    let taken = turn::Entity::find()
        .select_only()
        .column(turn::Column::Round)
        .filter(
            Expr::col((turn::Entity, turn::Column::Round))
                .equals((catalogue::Entity, catalogue::Column::Round)),
        )
        .filter(turn::Column::Requester.eq(requester))
        .into_query();
    // Earlier rounds no longer count, and on Postgres they may have many dead index entries.
    let queued = queued()
        .select_only()
        .column_as(build::Column::Round.max(), "last")
        .filter(build::Column::RequestedBy.eq(requester))
        .filter(Expr::col((build::Entity, build::Column::Round)).gte(reached()))
        .into_query();
    let rounds = catalogue::Entity::find_by_id(1)
        .select_only()
        .column(catalogue::Column::Round)
        .expr_as(Expr::SubQuery(None, Box::new(taken.into())), "taken")
        .expr_as(Expr::SubQuery(None, Box::new(queued.into())), "queued")
        .into_tuple::<(i64, Option<i64>, Option<i64>)>()
        .one(db)
        .await?;
    let (reached, taken, queued) = rounds.unwrap_or_default();
    let last = taken.into_iter().chain(queued).max();
    Ok(last.map_or(reached, |last| Ord::max(reached, last + 1)))
}

/// Records the turns that the placed builds use, and the round that the queue reaches with them.
///
/// Only turns of the current round are kept: a requester whose last turn was earlier may have the next one
/// now.
pub(super) fn take_turns(txn: &WriteTransaction, head: &Head, placements: &[Placement]) {
    let rounds = placements.iter().map(|placement| placement.build.round);
    let round = rounds.chain(iter::once(head.round)).max().unwrap_or(head.round);
    if round > head.round {
        let first_round = head.builds.first().map_or(round, |build| build.round);
        let mut advance = catalogue::Entity::update_many()
            .col_expr(catalogue::Column::Round, Expr::value(round))
            .filter(catalogue::Column::Id.eq(1));
        if !head.is_filtered {
            advance = advance.col_expr(catalogue::Column::FirstRound, Expr::value(first_round));
        }
        txn.defer(advance);
        txn.defer(turn::Entity::delete_many().filter(turn::Column::Round.eq(head.round)));
    }
    let turns: Vec<_> = placements
        .iter()
        .filter(|placement| placement.build.round == round)
        .map(|placement| turn::Model { round, requester: placement.build.requester.subject.clone() })
        .map(IntoActiveModel::into_active_model)
        .collect();
    if !turns.is_empty() {
        txn.defer(turn::Entity::insert_many(turns).on_conflict_do_nothing());
    }
}

/// Records that a build is in the queue again, in its former round.
pub(super) fn reopen_round(txn: &WriteTransaction, round: i64) {
    txn.defer(
        catalogue::Entity::update_many()
            .col_expr(catalogue::Column::FirstRound, Expr::value(round))
            .filter(catalogue::Column::FirstRound.gt(round)),
    );
}

impl RequestTransaction<'_> {
    /// Checks that the caller may queue another build.
    pub(super) async fn require_room(&self) -> Result<(), Error> {
        self.store.require_storage()?;
        let policy = self.store.policy();
        policy.require_room(pending_of(&self.txn, self.request.caller.subject(), policy).await?)
    }
}

impl Store {
    /// Counts a requester's queued builds, up to its limit. Returns 0 if there is no limit.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn pending_builds(&self, requester: &str) -> Result<u64, Error> {
        Ok(pending_of(&self.reader, requester, &self.policy).await?)
    }
}

pub(super) async fn pending_of(
    db: &impl ConnectionTrait,
    requester: &str,
    policy: &Policy,
) -> Result<u64, DbErr> {
    let Some(limit) = policy.max_pending else {
        return Ok(0);
    };
    let own = queued().select_only().column(build::Column::Round);
    own.filter(build::Column::RequestedBy.eq(requester)).limit(limit).count(db).await
}

#[cfg(test)]
mod tests;
