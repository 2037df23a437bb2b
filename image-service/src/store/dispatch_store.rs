//! Implementation of [`DispatchStore`] on the database.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use async_trait::async_trait;
use sea_orm::{ColumnTrait, Condition, EntityTrait, QueryFilter, QueryOrder, QuerySelect, sea_query::Expr};
use uuid::Uuid;

use super::{
    Store, builds,
    decisions::apply,
    entity::{build, worker},
    images, queue, required, workers,
};
use crate::{
    build::{Build, BuildId, PendingReason},
    dispatch::{
        self, CLAIM_BATCH, Committed, Connected, Decision, DecisionResult, DispatchStore, Event, Hello,
        Placement, Policy, Rows, candidates, pending_reason, place,
    },
    error::Error,
    timestamp::Timestamp,
    turns::Turn,
};

#[async_trait]
impl DispatchStore for Store {
    fn policy(&self) -> &Policy {
        &self.policy
    }

    async fn decide(
        &self,
        events: &[(BuildId, Arc<Event>)],
    ) -> Result<(Vec<DecisionResult>, Committed), Error> {
        let txn = self.write(Turn::Dispatch).await?;
        let now = self.now(&txn).await?;
        let ids: BTreeSet<BuildId> = events.iter().map(|(id, _)| *id).collect();
        let found = build::Entity::find().filter(build::Column::Id.is_in(ids)).lock_exclusive();
        let found: Vec<Build> = found.into_model().all(&txn).await?;
        let mut builds: HashMap<_, _> = found.into_iter().map(|build| (build.id, build)).collect();
        let mut decided = Vec::with_capacity(events.len());
        for (id, event) in events {
            let Some(build) = builds.get_mut(id) else {
                decided.push(Ok(None));
                continue;
            };
            let rows = Rows { build: build.clone(), configuration: None };
            let decision = dispatch::decide(rows, event, &self.policy, now).map_err(Error::Refused);
            if let Ok(Decision { build: Some(changed), .. }) = &decision {
                build.clone_from(changed);
            }
            decided.push(decision.map(Some));
        }
        let mut committed = Committed::default();
        apply(&txn, decided.iter().flatten().flatten(), now, &mut committed).await?;
        txn.commit().await?;
        Ok((decided, committed))
    }

    async fn claim(&self, workers: &[Connected]) -> Result<(Vec<Decision>, Committed), Error> {
        let mut committed = Committed::default();
        // Check first, without waiting for the writer: mostly there is nothing to do.
        if !workers::may_claim(&self.reader, workers).await? {
            return Ok((Vec::new(), committed));
        }
        let txn = self.write(Turn::Dispatch).await?;
        let now = self.now(&txn).await?;
        let reached = workers::reached(workers, &self.policy, now);
        let reached = workers::read(&txn, reached, &self.policy, now).await?;
        let candidates = candidates(reached, workers);
        let free_slots = candidates.iter().map(|candidate| candidate.free_slots).sum::<usize>();
        let limit = free_slots.min(CLAIM_BATCH);
        if limit == 0 {
            return Ok((Vec::new(), committed));
        }
        let mut running = queue::running(&txn, &self.policy).await?;
        let head = queue::head(&txn, &running, limit).await?;
        let mut placements = place(&head.builds, &candidates, &mut running.clone(), now, limit);
        if placements.len() < limit && !head.is_whole {
            // The head is full of builds that no worker can take now, and these must not hold up the ones
            // behind them.
            let first = queue::first_of_groups(&txn, &running, limit, now).await?;
            placements = place(&first, &candidates, &mut running, now, limit);
        }
        if placements.is_empty() {
            return Ok((Vec::new(), committed));
        }
        queue::take_turns(&txn, &head, &placements);
        let named =
            placements.iter().map(|Placement { build, .. }| (build.image, build.configuration_revision));
        let configurations = images::configurations(&txn, named).await?;
        let mut decisions = Vec::with_capacity(placements.len());
        for Placement { build, worker } in placements {
            let configuration = configurations.get(&(build.image, build.configuration_revision));
            let configuration = required(configuration, "a configuration")?;
            let rows = Rows { build, configuration: Some(Arc::clone(configuration)) };
            let event = Event::Claim { worker };
            decisions.push(dispatch::decide(rows, &event, &self.policy, now).map_err(Error::Refused)?);
        }
        apply(&txn, &decisions, now, &mut committed).await?;
        txn.commit().await?;
        Ok((decisions, committed))
    }

    async fn overdue(&self) -> Result<Vec<Build>, Error> {
        let now = self.now(&self.reader).await?;
        let cancelled_before = now.before(self.policy.stop_timeout);
        let found = queue::held()
            .filter(
                Condition::any()
                    .add(build::Column::LeaseExpiresAt.lte(now))
                    .add(build::Column::CancelRequestedAt.lte(cancelled_before)),
            )
            .into_model()
            .all(&self.reader)
            .await?;
        Ok(found)
    }

    async fn waiting_too_long(&self) -> Result<Vec<(BuildId, PendingReason)>, Error> {
        const AT_ONCE: u64 = 100;
        let now = self.now(&self.reader).await?;
        let before = now.before(self.policy.queue_timeout);
        let found = queue::queued()
            .filter(build::Column::QueuedAt.lte(before))
            .order_by_asc(build::Column::QueuedAt)
            .limit(AT_ONCE)
            .into_model::<Build>()
            .all(&self.reader)
            .await?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let online = workers::reached(&[], &self.policy, now);
        let workers = workers::read(&self.reader, online, &self.policy, now).await?;
        let running = queue::running(&self.reader, &self.policy).await?;
        let waiting = found.iter().map(|build| (build.id, pending_reason(build, &workers, &running, now)));
        Ok(waiting.collect())
    }

    async fn open_session(&self, hello: &Hello, session: Uuid) -> Result<(), Error> {
        self.record_worker(hello, Some(session)).await
    }

    async fn refuse_worker(&self, hello: &Hello) -> Result<(), Error> {
        self.record_worker(hello, None).await
    }

    async fn close_session(&self, name: &str, session: Uuid) -> Result<(), Error> {
        let txn = self.write(Turn::Dispatch).await?;
        worker::Entity::update_many()
            .col_expr(worker::Column::Session, Expr::value(None::<Uuid>))
            .filter(worker::Column::Name.eq(name))
            .filter(worker::Column::Session.eq(session))
            .exec(&txn)
            .await?;
        txn.commit().await
    }

    async fn held_by(&self, name: &str) -> Result<Vec<Build>, Error> {
        Ok(builds::held_by(&self.reader, name).await?)
    }

    async fn heartbeat(&self, name: &str, session: Uuid, draining: bool) -> Result<Vec<Build>, Error> {
        let txn = self.write(Turn::Dispatch).await?;
        let now = self.now(&txn).await?;
        let updated = worker::Entity::update_many()
            .col_expr(worker::Column::HeardAt, Expr::value(now))
            .col_expr(worker::Column::Draining, Expr::value(draining))
            .filter(worker::Column::Name.eq(name))
            .filter(worker::Column::Session.eq(session))
            .exec(&txn)
            .await?;
        if updated.rows_affected == 0 {
            return Err(Error::SessionLost);
        }
        let held = builds::held_by(&txn, name).await?;
        let claimed = held.iter().map(|build| build.claimed_at.unwrap_or(Timestamp::from_micros(0)));
        txn.defer(
            worker::Entity::update_many()
                .col_expr(worker::Column::HeldSince, Expr::value(claimed.min().unwrap_or(now)))
                .filter(worker::Column::Name.eq(name)),
        );
        let extended = held.iter().filter(|build| build.may_go_on(now, self.policy.lease));
        let extended: Vec<BuildId> = extended.map(|build| build.id).collect();
        if !extended.is_empty() {
            let lease_end = now.after(self.policy.lease);
            build::Entity::update_many()
                .col_expr(build::Column::LeaseExpiresAt, Expr::value(lease_end))
                .filter(build::Column::Id.is_in(extended))
                .exec(&txn)
                .await?;
        }
        txn.commit().await?;
        Ok(held)
    }

    async fn renew_leases(&self) -> Result<(), Error> {
        let txn = self.write(Turn::Dispatch).await?;
        let now = self.now(&txn).await?;
        let last_heard = worker::Entity::find()
            .select_only()
            .column(worker::Column::HeardAt)
            .filter(worker::Column::HeardAt.lte(now))
            .order_by_desc(worker::Column::HeardAt)
            .limit(1)
            .into_tuple::<Timestamp>()
            .one(&txn)
            .await?;
        if last_heard.is_some_and(|at| self.policy.is_recent(at, now)) {
            // Other replicas serve, or did a moment ago: workers could have renewed their leases there.
            return Ok(());
        }
        let until = now.after(self.policy.lease);
        build::Entity::update_many()
            .col_expr(build::Column::LeaseExpiresAt, Expr::value(until))
            .filter(queue::is_held())
            .exec(&txn)
            .await?;
        txn.commit().await
    }
}
