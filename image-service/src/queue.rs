//! The driver of the queue: passes events to `dispatch::decide` through the store, and the decisions to the
//! workers.
//!
//! The rows are the queue; no build is queued in memory. Three tasks serve it: one decides events, the
//! dispatcher assigns the head of the queue to free slots, and the clock ends what is overdue.

use std::{error::Error as _, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{metrics::QueueMetrics, retries::Retries};
use crate::{
    build::BuildId,
    dispatch::{CLAIM_BATCH, Decision, DispatchStore, Event, Policy, ToWorker},
    error::Error,
    signals::Signals,
    worker_registry::Workers,
};

mod metrics;
mod retries;

/// The times that workers have to keep.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Times {
    /// Interval between the heartbeats of a worker.
    pub(crate) heartbeat: Duration,
    /// Time without contact after which a worker stops its work by itself.
    pub(crate) stop_after: Duration,
}

#[derive(Debug)]
pub(crate) struct Queue {
    store: Arc<dyn DispatchStore>,
    signals: Arc<Signals>,
    workers: Workers,
    times: Times,
    metrics: QueueMetrics,
    retries: Retries,
    /// Identifier of the catalogue for its workers.
    catalogue_id: Uuid,
    to_decide: mpsc::Sender<PendingEvent>,
    /// Receiving end of `to_decide`, held by the task that decides.
    pending_events: Mutex<mpsc::Receiver<PendingEvent>>,
}

/// An event that waits for a decision.
#[derive(Debug)]
struct PendingEvent {
    build: BuildId,
    event: Arc<Event>,
    answer: oneshot::Sender<Result<bool, Error>>,
}

impl Queue {
    /// Maximum delay of a build by a lost hint.
    const POLL: Duration = Duration::from_secs(1);
    /// Maximum number of events that are decided in one transaction.
    const DECISION_BATCH: usize = 32;
    /// Maximum delay until the end of a lease is noticed.
    const CLOCK: Duration = Duration::from_millis(500);

    pub(crate) fn new(
        store: Arc<dyn DispatchStore>,
        signals: Arc<Signals>,
        times: Times,
        catalogue_id: Uuid,
    ) -> Self {
        let (to_decide, pending_events) = mpsc::channel(2 * Self::DECISION_BATCH);
        Self {
            store,
            signals,
            workers: Workers::default(),
            times,
            metrics: QueueMetrics::new(),
            retries: Retries::default(),
            catalogue_id,
            to_decide,
            pending_events: Mutex::new(pending_events),
        }
    }

    /// Takes over the queue from a service that was away, so that workers could not extend their leases.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub(crate) async fn begin(&self) -> Result<(), Error> {
        self.store.renew_leases().await
    }

    pub(crate) fn policy(&self) -> &Policy {
        self.store.policy()
    }

    pub(crate) fn catalogue_id(&self) -> Uuid {
        self.catalogue_id
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    pub(crate) fn store(&self) -> &dyn DispatchStore {
        self.store.as_ref()
    }

    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Wakes the dispatcher because a worker may have a free slot.
    pub(crate) fn slot_freed(&self) {
        self.signals.slot_freed();
    }

    /// Waits until an event of a build is decided by [`decide`](Self::decide) and its messages are sent.
    ///
    /// Returns false if the build no longer exists.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Refused`] if the event is refused, [`Error::Draining`] after a shutdown, and
    /// [`Error::Busy`] if the store is busy.
    pub(crate) async fn handle(&self, build: BuildId, event: impl Into<Arc<Event>>) -> Result<bool, Error> {
        let (answer, answered) = oneshot::channel();
        let pending_events = PendingEvent { build, event: event.into(), answer };
        // Both fail only after shutdown.
        self.to_decide.send(pending_events).await.map_err(|_| Error::Draining)?;
        answered.await.map_err(|_| Error::Draining)?
    }

    /// Decides events until shutdown. Events that arrive during a transaction are decided together in the
    /// next one.
    pub(crate) async fn decide(&self, shutdown: CancellationToken) {
        let mut pending_events = self.pending_events.lock().await;
        loop {
            let mut some = Vec::new();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = pending_events.recv_many(&mut some, Self::DECISION_BATCH) => {}
            }
            self.decide_together(some).await;
        }
        pending_events.close();
        while pending_events.try_recv().is_ok() {}
    }

    async fn decide_together(&self, pending_events: Vec<PendingEvent>) {
        let (answers, events): (Vec<_>, Vec<_>) = pending_events
            .into_iter()
            .map(|pending_events| (pending_events.answer, (pending_events.build, pending_events.event)))
            .unzip();
        // A caller may be gone; the other callers are answered all the same.
        match self.store.decide(&events).await {
            Ok((decided, committed)) => {
                for (answer, decided) in answers.into_iter().zip(decided) {
                    let _ = answer.send(decided.map(|decision| self.publish(decision)));
                }
                self.signals.announce(&committed);
            }
            // One of the events cannot be decided, which must not affect the other events.
            Err(error) if events.len() > 1 && !matches!(error, Error::Busy) => {
                for (answer, (build, event)) in answers.into_iter().zip(events) {
                    Box::pin(self.decide_together(vec![PendingEvent { build, event, answer }])).await;
                }
            }
            Err(error) => {
                let mut error = Some(error);
                for answer in answers {
                    let _ = answer.send(Err(error.take().unwrap_or(Error::Busy)));
                }
            }
        }
    }

    /// Publishes a durable decision, if there is one, and reports whether there is.
    ///
    /// Sends its messages to the workers, and updates the metrics, the signals and the retries.
    fn publish(&self, decision: Option<Decision>) -> bool {
        let Some(decision) = decision else {
            return false;
        };
        if let Some(build) = decision.build.as_ref().filter(|build| build.state.is_final()) {
            self.metrics.ended(build);
            self.signals.end_build(build.image);
        }
        if let Some(build) = decision.build.as_ref().filter(|build| build.not_before.is_some()) {
            self.retries.add(Instant::now() + self.policy().backoff(build.failures));
        }
        self.deliver(decision.messages);
        true
    }

    /// Sends messages once their decision is durable.
    pub(crate) fn deliver(&self, messages: Vec<(String, ToWorker)>) {
        for (worker, message) in messages {
            self.workers.send(&worker, message);
        }
    }

    /// Assigns queued builds to free slots until shutdown.
    pub(crate) async fn dispatch(&self, shutdown: CancellationToken) {
        let mut poll = interval(Self::POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.signals.queue_changed() => {}
                _ = poll.tick() => {}
                () = self.retries.due() => {}
            }
            if let Err(error) = self.fill().await {
                tracing::warn!(%error, source = ?error.source(), "cannot dispatch");
            }
        }
    }

    /// Claims builds until all slots are taken, or the queue has nothing for the free slots.
    async fn fill(&self) -> Result<(), Error> {
        loop {
            let ready = self.workers.ready(self.policy().offline_after);
            if ready.is_empty() {
                return Ok(());
            }
            let (decisions, committed) = self.store.claim(&ready).await?;
            // Under a limit on running builds, the next claim may find those of other requesters.
            let is_all = match self.policy().max_running {
                None => decisions.len() < CLAIM_BATCH,
                Some(_) => decisions.is_empty(),
            };
            let mut left = Vec::new();
            for Decision { build, messages, .. } in decisions {
                let trace = build.as_ref().and_then(|build| self.metrics.claimed(build));
                let is_assigned = messages.into_iter().all(|(name, message)| {
                    let worker = ready.iter().find(|worker| worker.name == name);
                    worker.is_some_and(|worker| self.workers.assign(worker, message.in_trace(trace.clone())))
                });
                left.extend(build.filter(|_| !is_assigned));
            }
            self.signals.announce(&committed);
            // The workers of these builds have begun to drain or have disconnected since they were chosen.
            for build in left {
                self.end(build.id, Event::Abandoned { attempt: build.attempt }).await;
            }
            if is_all {
                return Ok(());
            }
        }
    }

    /// Ends leases and deadlines that are over, until shutdown.
    pub(crate) async fn clock(&self, shutdown: CancellationToken) {
        let mut tick = interval(Self::CLOCK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = tick.tick() => {}
            }
            if let Err(error) = self.end_overdue().await {
                tracing::warn!(%error, source = ?error.source(), "cannot read overdue builds");
            }
        }
    }

    async fn end_overdue(&self) -> Result<(), Error> {
        for (build, reason) in self.store.waiting_too_long().await? {
            self.end(build, Event::Waited { reason }).await;
        }
        for build in self.store.overdue().await? {
            let worker_online = build
                .worker
                .as_deref()
                .is_some_and(|worker| self.workers.is_online(worker, self.policy().offline_after));
            if let Some(worker) = build.worker.as_deref().filter(|_| worker_online) {
                // The worker has not stopped what it should have. Its next heartbeat says whether it takes
                // more.
                self.workers.pause(worker);
            }
            self.end(build.id, Event::Tick { worker_online }).await;
        }
        Ok(())
    }

    /// Ends an attempt or a wait. A failure is only logged, so that it does not affect other builds.
    async fn end(&self, build: BuildId, event: Event) {
        if let Err(error) = self.handle(build, event).await {
            tracing::warn!(%build, %error, source = ?error.source(), "cannot end an overdue attempt or build");
        }
    }
}
