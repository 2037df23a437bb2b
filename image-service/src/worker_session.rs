//! One connection of one worker: handles the messages of the worker.

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

/// A connected worker that has been welcomed.
#[derive(Debug)]
pub(crate) struct Session {
    queue: Arc<Queue>,
    worker: String,
    id: Uuid,
    /// Attempts that the worker listed in its hello; `None` after its first heartbeat.
    unconfirmed: Option<Vec<Attempt>>,
}

/// A new session with its channels to the worker.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) session: Session,
    /// First message to the worker.
    pub(crate) welcome: Welcome,
    /// Messages to the worker after the welcome.
    pub(crate) messages: mpsc::Receiver<ToWorker>,
    /// Ends the connection.
    pub(crate) hang_up: CancellationToken,
}

impl Session {
    /// Opens a session for a worker and reconciles the attempts that it holds with the store.
    ///
    /// The worker has to drop the attempts that the store does not know it holds. Attempts that it holds
    /// according to the store, but not according to its hello, are queued again at its first heartbeat: until
    /// then, the hello may be a delayed one, of a connection that the worker has abandoned since.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RoleMissing`] without a token for workers, [`Error::OtherWorker`] if the token is for
    /// another name, [`Error::ProtocolUnsupported`] unless the worker speaks [`PROTOCOL_VERSION`], and
    /// [`Error::WorkerConnected`] if another process is connected as this worker.
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
        let hello = within_claims(hello, caller);
        let id = Uuid::new_v4();
        queue.store().open_session(&hello, id).await?;
        // Connect before reading the rows, so that whatever is decided from here on is sent to this
        // connection.
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
            .filter(|build| holds.contains(&Attempt::from_build(build)))
            .map(|build| KeptAttempt {
                attempt: Attempt::from_build(build),
                acknowledged: build.report_sequence,
                publish_granted: build.state == State::Publishing,
                cancel_requested: build.cancel_requested_at.is_some(),
            })
            .collect();
        let drop =
            holds.iter().filter(|held| keep.iter().all(|kept| kept.attempt != **held)).copied().collect();
        Ok(Welcome { session: self.id.to_string(), keep, drop })
    }

    /// Extends the lease of the worker, and repeats its pending cancellations and publish grants.
    ///
    /// They are repeated because a store that fails after it has committed has sent no message. While the
    /// store is busy, the heartbeat is not acknowledged, which is no error.
    ///
    /// # Errors
    ///
    /// Returns [`Error::SessionLost`] if another session has replaced this one.
    pub(crate) async fn heartbeat(&mut self, number: i64, draining: bool) -> Result<(), Error> {
        let held = match self.extend_lease(draining).await {
            // Not acknowledged: the worker counts from the last heartbeat that was.
            Err(Error::Busy) => {
                tracing::warn!(worker = self.worker, "the store is busy: a heartbeat is not acknowledged");
                return Ok(());
            }
            held => held?,
        };
        let is_first = self.unconfirmed.take().is_some();
        let workers = self.queue.workers();
        workers.mark_seen(&self.worker, self.id, Some(!draining));
        workers.send(&self.worker, ToWorker::HeartbeatAck(number));
        for build in &held {
            let attempt = Attempt::from_build(build);
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
            held.into_iter().partition(|build| holds.contains(&Attempt::from_build(build)));
        for build in gone {
            self.queue.handle(build.id, Event::Abandoned { attempt: build.attempt }).await?;
        }
        Ok(kept)
    }

    /// Handles reports of attempts, keeping the order of the reports of one attempt.
    ///
    /// # Errors
    ///
    /// Returns an error if a report cannot be handled, and [`Error::Busy`] only after several retries.
    pub(crate) async fn report(&self, reports: Vec<Report>) -> Result<(), Error> {
        try_join_all(reports.into_iter().map(|report| self.report_one(report))).await?;
        Ok(())
    }

    async fn report_one(&self, report: Report) -> Result<(), Error> {
        self.queue.workers().mark_seen(&self.worker, self.id, None);
        let attempt = report.attempt;
        // The next heartbeat of the worker says whether it takes more builds.
        let has_trouble = |reported: &Reported| {
            matches!(
                reported.event,
                WorkerEvent::HandedBack { base: None, .. } | WorkerEvent::Stopped { confirmed: false }
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

    /// Handles an event, retrying while the store is busy.
    ///
    /// A worker sends a report only once per connection, so a report must not be lost here.
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

    /// Closes the session. The worker keeps its builds until their leases expire.
    pub(crate) async fn close(self) {
        self.queue.workers().disconnect(&self.worker, self.id);
        if let Err(error) = self.queue.store().close_session(&self.worker, self.id).await {
            tracing::warn!(worker = self.worker, %error, "cannot record that a worker has disconnected");
        }
    }
}

/// Returns a hello with what the claims of the worker's token allow it to be.
fn within_claims(mut hello: Hello, caller: &Principal) -> Hello {
    let claims = caller.worker_claims();
    let removed = claims.retain_labels(&mut hello.labels);
    if !removed.is_empty() {
        tracing::warn!(worker = hello.name, labels = ?removed, "a worker reports labels that its token does not claim");
    }
    claims.retain_capabilities(&mut hello.capabilities);
    hello.pools = caller.identity().pools.clone();
    hello
}
