//! The queue's driver: brings events to `dispatch::decide` by way of the store, and what was decided to the workers.
//!
//! The rows are the queue; nothing is queued in memory. Two tasks serve it: the dispatcher, which gives the head of the
//! queue to whoever has a free slot, and the clock, which ends what is overdue.

use std::{
    collections::VecDeque,
    error::Error as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::telling::Telling;
use crate::{
    build::BuildId,
    dispatch::{Decision, Event, Policy, ToWorker},
    error::Error,
    signals::Signals,
    store::{CLAIMED_AT_ONCE, DispatchStore},
    workers::Workers,
};

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
    /// Names the catalogue to its workers.
    catalogue: Uuid,
    /// What is to be decided. As many wait here as sessions may: each has only so much on its way.
    asked: Mutex<VecDeque<Asked>>,
    /// Whose it is decides for all who wait.
    turn: tokio::sync::Mutex<()>,
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
        Self {
            store,
            signals,
            workers: Workers::default(),
            times,
            telling: Telling::new(),
            catalogue,
            asked: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
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

    /// Decides what an event does to a build, writes it, and tells whom it concerns. A build that is gone takes no event:
    /// `false`.
    ///
    /// Whatever waits to be decided while a transaction is under way is decided together in the next one.
    pub(crate) async fn handle(&self, build: BuildId, event: impl Into<Arc<Event>>) -> Result<bool, Error> {
        let (answer, mut answered) = oneshot::channel();
        self.asked().push_back(Asked { build, event: event.into(), answer });
        loop {
            tokio::select! {
                biased;
                // Who decided for others went away in the middle of it.
                answered = &mut answered => return answered.unwrap_or(Err(Error::Busy)),
                // In turn, so that who is asked for last is decided last.
                _turn = self.turn.lock() => self.decide_asked().await,
            }
        }
    }

    /// Decides what waits, or some of it.
    async fn decide_asked(&self) {
        let (answers, events): (Vec<_>, Vec<_>) = {
            let mut asked = self.asked();
            let some = asked.len().min(Self::DECIDED_AT_ONCE);
            asked.drain(..some).map(|asked| (asked.answer, (asked.build, asked.event))).unzip()
        };
        match self.store.decide(&events).await {
            Ok((decided, committed)) => {
                for (answer, decided) in answers.into_iter().zip(decided) {
                    // Whoever has asked may be gone; the others are told all the same.
                    let _ = answer.send(decided.map(|decision| self.tell(decision)));
                }
                self.signals.announce(&committed);
            }
            // One of them cannot be decided, which must not keep the others from it.
            Err(error) if events.len() > 1 && !matches!(error, Error::Busy) => {
                for (answer, event) in answers.into_iter().zip(events) {
                    let _ = answer.send(self.decide_one(event).await);
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

    async fn decide_one(&self, event: (BuildId, Arc<Event>)) -> Result<bool, Error> {
        let (decided, committed) = self.store.decide(&[event]).await?;
        let decided = decided.into_iter().next().unwrap_or(Ok(None))?;
        let is_decided = self.tell(decided);
        self.signals.announce(&committed);
        Ok(is_decided)
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
        self.deliver(decision.messages);
        true
    }

    fn asked(&self) -> MutexGuard<'_, VecDeque<Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
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
                self.handle(build.id, Event::Abandoned { attempt: build.attempt }).await?;
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

    /// Ends what is overdue: one that cannot be ended must not keep the others from it.
    async fn end(&self, build: BuildId, event: Event) {
        if let Err(error) = self.handle(build, event).await {
            tracing::warn!(%build, %error, source = ?error.source(), "cannot end what is overdue");
        }
    }
}
