//! The queue's driver: brings events to `dispatch::decide` by way of the store, and what was decided to the workers.
//!
//! The rows are the queue; no build is queued in memory. Three tasks serve it: one decides what has happened, the dispatcher gives
//! the head of the queue to whoever has a free slot, and the clock ends what is overdue.

use std::{error::Error as _, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{retries::Retries, telling::Telling};
use crate::{
    build::BuildId,
    dispatch::{CLAIMED_AT_ONCE, Decision, DispatchStore, Event, Policy, ToWorker},
    error::Error,
    signals::Signals,
    workers::Workers,
};

mod retries;
mod telling;

/// When a worker counts as what.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Times {
    /// How often workers send heartbeats.
    pub(crate) heartbeat: Duration,
    /// After how much silence a worker stops its work by itself.
    pub(crate) stop_after: Duration,
}

#[derive(Debug)]
pub(crate) struct Queue {
    store: Arc<dyn DispatchStore>,
    signals: Arc<Signals>,
    workers: Workers,
    times: Times,
    telling: Telling,
    retries: Retries,
    /// Names the catalogue to its workers.
    catalogue: Uuid,
    to_decide: mpsc::Sender<Asked>,
    /// Of the task that decides.
    asked: Mutex<mpsc::Receiver<Asked>>,
}

/// An event that is to be decided.
#[derive(Debug)]
struct Asked {
    build: BuildId,
    event: Arc<Event>,
    answer: oneshot::Sender<Result<bool, Error>>,
}

impl Queue {
    /// How long a lost hint can delay a build.
    const POLL: Duration = Duration::from_secs(1);
    /// How many events are decided in one transaction at most.
    const DECIDED_AT_ONCE: usize = 32;
    /// How late the end of a lease can be noticed.
    const CLOCK: Duration = Duration::from_millis(500);

    pub(crate) fn new(
        store: Arc<dyn DispatchStore>,
        signals: Arc<Signals>,
        times: Times,
        catalogue: Uuid,
    ) -> Self {
        let (to_decide, asked) = mpsc::channel(2 * Self::DECIDED_AT_ONCE);
        Self {
            store,
            signals,
            workers: Workers::default(),
            times,
            telling: Telling::new(),
            retries: Retries::default(),
            catalogue,
            to_decide,
            asked: Mutex::new(asked),
        }
    }

    /// Takes the queue over from a service that was away: whatever the workers hold they could not keep alive meanwhile.
    pub(crate) async fn begin(&self) -> Result<(), Error> {
        self.store.renew_leases().await
    }

    pub(crate) fn policy(&self) -> &Policy {
        self.store.policy()
    }

    pub(crate) fn catalogue(&self) -> Uuid {
        self.catalogue
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

    /// A worker may have a free slot.
    pub(crate) fn slot_freed(&self) {
        self.signals.slot_freed();
    }

    /// Waits until [`decide`](Self::decide) has decided what an event does to a build, and has told whom it concerns. A build that is
    /// gone takes no event: `false`.
    pub(crate) async fn handle(&self, build: BuildId, event: impl Into<Arc<Event>>) -> Result<bool, Error> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked { build, event: event.into(), answer };
        // Neither fails before shutdown.
        self.to_decide.send(asked).await.map_err(|_| Error::Draining)?;
        answered.await.map_err(|_| Error::Draining)?
    }

    /// Decides what is asked for, until shutdown. Whatever waits while a transaction is under way is decided together in the next.
    pub(crate) async fn decide(&self, shutdown: CancellationToken) {
        let mut asked = self.asked.lock().await;
        loop {
            let mut some = Vec::new();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = asked.recv_many(&mut some, Self::DECIDED_AT_ONCE) => {}
            }
            self.decide_together(some).await;
        }
        asked.close();
        while asked.try_recv().is_ok() {}
    }

    async fn decide_together(&self, asked: Vec<Asked>) {
        let (answers, events): (Vec<_>, Vec<_>) =
            asked.into_iter().map(|asked| (asked.answer, (asked.build, asked.event))).unzip();
        // Whoever has asked may be gone; the others are told all the same.
        match self.store.decide(&events).await {
            Ok((decided, committed)) => {
                for (answer, decided) in answers.into_iter().zip(decided) {
                    let _ = answer.send(decided.map(|decision| self.tell(decision)));
                }
                self.signals.announce(&committed);
            }
            // One of them cannot be decided, which must not keep the others from it.
            Err(error) if events.len() > 1 && !matches!(error, Error::Busy) => {
                for (answer, (build, event)) in answers.into_iter().zip(events) {
                    Box::pin(self.decide_together(vec![Asked { build, event, answer }])).await;
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

    /// Tells whom a decision concerns, now that it is durable; whether there is one.
    fn tell(&self, decision: Option<Decision>) -> bool {
        let Some(decision) = decision else {
            return false;
        };
        if let Some(build) = decision.build.as_ref().filter(|build| build.state.is_final()) {
            self.telling.ended(build);
            self.signals.end_build(build.image);
        }
        if let Some(build) = decision.build.as_ref().filter(|build| build.not_before.is_some()) {
            self.retries.add(Instant::now() + self.policy().backoff(build.failures));
        }
        self.deliver(decision.messages);
        true
    }

    /// Sends what was decided, now that it is durable.
    pub(crate) fn deliver(&self, messages: Vec<(String, ToWorker)>) {
        for (worker, message) in messages {
            self.workers.send(&worker, message);
        }
    }

    /// Gives queued builds to free slots until shutdown.
    pub(crate) async fn dispatch(&self, shutdown: CancellationToken) {
        let mut poll = interval(Self::POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.signals.queue_moved() => {}
                _ = poll.tick() => {}
                () = self.retries.due() => {}
            }
            if let Err(error) = self.fill().await {
                tracing::warn!(%error, source = ?error.source(), "cannot dispatch");
            }
        }
    }

    /// Claims until all slots are taken, or the queue has nothing for those that are free.
    async fn fill(&self) -> Result<(), Error> {
        loop {
            let ready = self.workers.ready(self.policy().offline_after);
            if ready.is_empty() {
                return Ok(());
            }
            let (decisions, committed) = self.store.claim(&ready).await?;
            let is_all = decisions.len() < CLAIMED_AT_ONCE;
            let mut left = Vec::new();
            for Decision { build, messages, .. } in decisions {
                let trace = build.as_ref().and_then(|build| self.telling.claimed(build));
                let is_assigned = messages.into_iter().all(|(name, message)| {
                    let worker = ready.iter().find(|worker| worker.name == name);
                    worker.is_some_and(|worker| self.workers.assign(worker, message.in_trace(trace.clone())))
                });
                left.extend(build.filter(|_| !is_assigned));
            }
            self.signals.announce(&committed);
            // Their workers have begun to drain, or have gone, since they were chosen.
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
                tracing::warn!(%error, source = ?error.source(), "cannot look for what is overdue");
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
                .is_some_and(|worker| self.workers.is_heard(worker, self.policy().offline_after));
            if let Some(worker) = build.worker.as_deref().filter(|_| worker_online) {
                // It has not stopped what it should have. Its next heartbeat says whether it takes more.
                self.workers.pause(worker);
            }
            self.end(build.id, Event::Tick { worker_online }).await;
        }
        Ok(())
    }

    /// Ends an attempt, or a wait: one that cannot be ended must not keep the others from it.
    async fn end(&self, build: BuildId, event: Event) {
        if let Err(error) = self.handle(build, event).await {
            tracing::warn!(%build, %error, source = ?error.source(), "cannot end an attempt or a wait");
        }
    }
}
