//! One connection of one worker: what it says, and what that does.

use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    access::{Principal, Role},
    build::{Build, State},
    dispatch::{
        Attempt, Event, Hello, KeptAttempt, PROTOCOL_VERSION, Report, Reported, ToWorker, Welcome,
        WorkerEvent,
    },
    error::Error,
    queue::Queue,
};

/// A worker that has been welcomed.
#[derive(Debug)]
pub(crate) struct Session {
    queue: Arc<Queue>,
    worker: String,
    id: Uuid,
    /// What the worker held when it said hello, until it has said something after the welcome.
    unconfirmed: Option<Vec<Attempt>>,
}

/// What a session's owner needs beside it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) session: Session,
    /// The first message to the worker.
    pub(crate) welcome: Welcome,
    /// The messages after it.
    pub(crate) messages: mpsc::Receiver<ToWorker>,
    /// Ends the connection.
    pub(crate) hang_up: CancellationToken,
}

impl Session {
    /// Lets a worker in: it must hold a worker's token of the name that it gives, and speak [`PROTOCOL_VERSION`].
    ///
    /// What it holds beyond the store's knowledge it is told to drop. What the store thinks it holds and it does not is
    /// queued again at its first heartbeat: until then the hello may be one that was on its way for long, of a connection that
    /// the worker has given up since.
    pub(crate) async fn open(queue: Arc<Queue>, caller: &Principal, hello: Hello) -> Result<Opened, Error> {
        caller.require(Role::Worker)?;
        if hello.name != caller.subject() {
            return Err(Error::OtherWorker);
        }
        if hello.protocol_version != PROTOCOL_VERSION {
            let error = Error::ProtocolUnsupported { spoken: hello.protocol_version };
            let refused = Hello { unsupported_reason: error.to_string(), ..hello };
            queue.store().refuse_worker(&refused).await?;
            return Err(error);
        }
        if !hello.unsupported_reason.is_empty() {
            tracing::warn!(
                worker = hello.name,
                reason = hello.unsupported_reason,
                "a worker takes no builds"
            );
        }
        let id = Uuid::new_v4();
        queue.store().open_session(&hello, id).await?;
        // First the line, then the rows: what is decided from here on is sent to this connection.
        let (messages, hang_up) = queue.workers().connect(&hello.name, id);
        let mut session = Self { queue, worker: hello.name, id, unconfirmed: None };
        match session.reconcile(&hello.holds).await {
            Ok(welcome) => {
                session.unconfirmed = Some(hello.holds);
                Ok(Opened { session, welcome, messages, hang_up })
            }
            Err(error) => {
                session.close().await;
                Err(error)
            }
        }
    }

    pub(crate) fn worker(&self) -> &str {
        &self.worker
    }

    async fn reconcile(&self, holds: &[Attempt]) -> Result<Welcome, Error> {
        let assigned = self.queue.store().held_by(&self.worker).await?;
        let keep: Vec<KeptAttempt> = assigned
            .iter()
            .filter(|build| holds.contains(&Attempt::of(build)))
            .map(|build| KeptAttempt {
                attempt: Attempt::of(build),
                acknowledged: build.report_sequence,
                publish_granted: build.state == State::Publishing,
                cancel_requested: build.cancel_requested_at.is_some(),
            })
            .collect();
        let drop =
            holds.iter().filter(|held| keep.iter().all(|kept| kept.attempt != **held)).copied().collect();
        Ok(Welcome { session: self.id.to_string(), keep, drop })
    }

    /// The worker lives: its lease is extended. What it should stop, or may publish, it is told again: a store
    /// that fails after it has committed has told nobody.
    pub(crate) async fn heartbeat(&mut self, number: i64, draining: bool) -> Result<(), Error> {
        let held = match self.extend_lease(draining).await {
            // Not acknowledged: the worker counts on from the last one that was.
            Err(Error::Busy) => {
                tracing::warn!(worker = self.worker, "the store is busy: a heartbeat is not acknowledged");
                return Ok(());
            }
            held => held?,
        };
        let is_first = self.unconfirmed.take().is_some();
        let workers = self.queue.workers();
        workers.heard(&self.worker, self.id, Some(!draining));
        workers.send(&self.worker, ToWorker::HeartbeatAck(number));
        for build in &held {
            let attempt = Attempt::of(build);
            if build.cancel_requested_at.is_some() {
                workers.send(&self.worker, ToWorker::Cancel(attempt));
            } else if build.state == State::Publishing {
                workers.send(&self.worker, ToWorker::PublishGrant(attempt));
            }
        }
        if is_first {
            self.queue.slot_freed();
        }
        Ok(())
    }

    async fn extend_lease(&self, draining: bool) -> Result<Vec<Build>, Error> {
        let held = self.queue.store().heartbeat(&self.worker, self.id, draining).await?;
        let Some(holds) = &self.unconfirmed else {
            return Ok(held);
        };
        let (kept, gone): (Vec<Build>, Vec<Build>) =
            held.into_iter().partition(|build| holds.contains(&Attempt::of(build)));
        for build in gone {
            self.queue.handle(build.id, Event::Abandoned { attempt: build.attempt }).await?;
        }
        Ok(kept)
    }

    /// Something happened in attempts; in the same one in this order.
    pub(crate) async fn report(&self, reports: Vec<Report>) -> Result<(), Error> {
        try_join_all(reports.into_iter().map(|report| self.report_one(report))).await?;
        Ok(())
    }

    async fn report_one(&self, report: Report) -> Result<(), Error> {
        self.queue.workers().heard(&self.worker, self.id, None);
        let attempt = report.attempt;
        // Its next heartbeat says whether it takes more.
        let has_trouble = |reported: &Reported| {
            matches!(
                reported.event,
                WorkerEvent::HandedBack { .. } | WorkerEvent::Stopped { confirmed: false }
            )
        };
        if report.events.iter().any(has_trouble) {
            self.queue.workers().pause(&self.worker);
        }
        let event = Arc::new(Event::Report { worker: self.worker.clone(), report });
        if !self.handle_patiently(attempt, event).await? {
            self.queue.workers().send(&self.worker, ToWorker::Drop(attempt));
        }
        Ok(())
    }

    /// What a worker has said it says only once on a connection: a store that is busy is asked again.
    async fn handle_patiently(&self, attempt: Attempt, event: Arc<Event>) -> Result<bool, Error> {
        const TRIES: u32 = 5;
        for _ in 1..TRIES {
            match self.queue.handle(attempt.build, Arc::clone(&event)).await {
                Err(Error::Busy) => tracing::warn!(worker = self.worker, "the store is busy: a report waits"),
                handled => return handled,
            }
        }
        self.queue.handle(attempt.build, event).await
    }

    /// The connection is over. The worker keeps its builds until their leases end.
    pub(crate) async fn close(self) {
        self.queue.workers().disconnect(&self.worker, self.id);
        if let Err(error) = self.queue.store().close_session(&self.worker, self.id).await {
            tracing::warn!(worker = self.worker, %error, "cannot note that a worker has disconnected");
        }
    }
}
