//! The reports of one attempt that are not acknowledged yet: numbered, bounded, sent again after a reconnect. What memory
//! cannot hold goes to a spool; when that is full too, the job waits.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost_types::Timestamp;
use proto::dispatch::{Attempt, Report, ReportEvent, report_event::Event};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

pub(crate) use self::backlog::Limits;
use self::backlog::{Backlog, Batch, Task};
use crate::spool::{Spool, SpoolFile};

mod backlog;

/// Where a job puts its events and the session takes them from.
#[derive(Debug)]
pub(crate) struct Outbox {
    attempt: Attempt,
    settings: Settings,
    state: Mutex<State>,
    /// There is room again.
    room: Notify,
    /// Everything is acknowledged, or the attempt was dropped.
    settled: Notify,
    /// There may be something to do with the spool.
    spool_due: Notify,
    /// There is something to send; shared by all jobs of the worker.
    ready: Arc<Notify>,
}

/// What the outboxes of a worker have in common.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) spool: Arc<dyn Spool>,
    pub(crate) limits: Limits,
    /// The worker's clock.
    pub(crate) now: fn() -> Timestamp,
}

/// The service needs reports that have been forgotten: the attempt can never be told to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forgotten;

/// What is in the spool cannot be read back: the attempt can never be told to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable;

#[derive(Debug)]
struct State {
    backlog: Backlog,
    /// No more reports: they are of no use.
    dropped: bool,
}

impl Settings {
    /// How much of an attempt is kept in memory, where the spool takes `spool_limit` bytes.
    pub(crate) fn new(spool: Arc<dyn Spool>, spool_limit: u64) -> Self {
        let limits =
            Limits { window: 4 * 1024 * 1024, batch: 256 * 1024, newest: 1024 * 1024, spool: spool_limit };
        Self { spool, limits, now: wall_clock }
    }
}

impl Outbox {
    /// After how long a spool that could not be written to is tried again, if nothing in it was freed before.
    const SPOOL_RETRY: Duration = Duration::from_secs(1);

    pub(crate) fn new(attempt: Attempt, settings: Settings, ready: Arc<Notify>) -> Self {
        Self {
            attempt,
            state: Mutex::new(State { backlog: Backlog::new(settings.limits), dropped: false }),
            settings,
            room: Notify::new(),
            settled: Notify::new(),
            spool_due: Notify::new(),
            ready,
        }
    }

    /// Adds an event, after waiting for room. Events of a dropped attempt are forgotten.
    pub(crate) async fn push(&self, at: Option<Timestamp>, event: Event) {
        loop {
            let room = self.room.notified();
            {
                let mut state = self.state();
                if state.dropped {
                    return;
                }
                if state.backlog.has_room() {
                    let time = Some(at.unwrap_or_else(self.settings.now));
                    state.backlog.push(ReportEvent { time, event: Some(event) });
                    break;
                }
            }
            room.await;
        }
        self.ready.notify_one();
        self.spool_due.notify_one();
    }

    /// The next report to send, if there is one.
    pub(crate) fn next_report(&self) -> Option<Report> {
        let (first_sequence, events) = self.state().backlog.next_report()?;
        Some(Report { attempt: Some(self.attempt.clone()), first_sequence, events })
    }

    /// Everything up to `sequence` is durable. An answer that acknowledges nothing new means that the service has missed
    /// something: it is sent again.
    ///
    /// Fails when that is forgotten here already, for it was durable once: the service has been restored from a backup, or
    /// its answer was overtaken by a later one.
    pub(crate) fn acknowledge(&self, sequence: i64) -> Result<(), Forgotten> {
        let mut state = self.state();
        let backlog = &mut state.backlog;
        if sequence + 1 < backlog.first_sequence() {
            return Err(Forgotten);
        }
        if sequence < backlog.first_sequence() && backlog.has_sent() {
            backlog.unsend();
        }
        backlog.forget_until(sequence);
        self.moved(&state);
        Ok(())
    }

    /// A new connection: everything that is not durable is to be sent again.
    pub(crate) fn rewind(&self, acknowledged: i64) -> Result<(), Forgotten> {
        self.acknowledge(acknowledged)?;
        self.state().backlog.unsend();
        self.ready.notify_one();
        Ok(())
    }

    /// The attempt is fenced: nothing more is sent.
    pub(crate) fn drop_all(&self) {
        let mut state = self.state();
        state.dropped = true;
        state.backlog.clear();
        self.moved(&state);
    }

    /// Whether the attempt was dropped.
    pub(crate) fn is_dropped(&self) -> bool {
        self.state().dropped
    }

    /// Waits until everything is acknowledged.
    pub(crate) async fn settled(&self) {
        loop {
            let settled = self.settled.notified();
            if self.state().backlog.is_empty() {
                return;
            }
            settled.await;
        }
    }

    /// Brings events to the spool and back, for as long as it is polled: the job's task has to. What was written and is not
    /// known to be whole was not taken out of memory, so a spool that fails is like one that is full.
    pub(crate) async fn serve_spool(&self) -> Unreadable {
        let mut file: Option<Box<dyn SpoolFile>> = None;
        let mut rests_until = None;
        let mut has_warned = false;
        loop {
            if !self.state().backlog.is_spooled() {
                // Its space is given back.
                file = None;
            }
            let task = self.state().backlog.next_task(rests_until.is_some());
            match task {
                Some(Task::Fetch(batch)) => {
                    if let Err(error) = self.fetch(file.as_deref(), batch).await {
                        let build = &self.attempt.build_id;
                        tracing::error!(build, %error, "cannot read a build's reports back from the spool");
                        return Unreadable;
                    }
                    rests_until = None;
                }
                Some(Task::Store(offset, bytes)) => {
                    let stored = self.store(&mut file, offset, bytes).await;
                    rests_until = stored.is_err().then(|| Instant::now() + Self::SPOOL_RETRY);
                    if let Err(error) = &stored
                        && !has_warned
                    {
                        has_warned = true;
                        let build = &self.attempt.build_id;
                        tracing::warn!(build, %error, "cannot write to the spool; the build may have to wait for the service");
                    }
                    let mut state = self.state();
                    state.backlog.stored(stored.is_ok());
                    self.moved(&state);
                }
                None => {
                    let rested = async {
                        match rests_until {
                            Some(until) => sleep_until(until).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        biased;
                        () = self.spool_due.notified() => {}
                        () = rested => rests_until = None,
                    }
                }
            }
        }
    }

    async fn fetch(&self, file: Option<&dyn SpoolFile>, batch: Batch) -> io::Result<()> {
        let file = file.ok_or_else(|| io::Error::other("the file is gone"))?;
        let bytes = file.read(batch.offset, batch.length).await?;
        let mut state = self.state();
        let fetched = state.backlog.fetched(batch, &bytes);
        self.moved(&state);
        fetched.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not what was written"))
    }

    async fn store(
        &self,
        file: &mut Option<Box<dyn SpoolFile>>,
        offset: u64,
        bytes: Vec<u8>,
    ) -> io::Result<()> {
        let file = match file {
            Some(file) => file,
            None => file.insert(self.settings.spool.create().await?),
        };
        file.write(offset, bytes).await
    }

    /// Tells everyone who waits for events to go on their way.
    fn moved(&self, state: &State) {
        if state.backlog.has_room() {
            self.room.notify_waiters();
        }
        if state.backlog.is_empty() {
            self.settled.notify_waiters();
        }
        self.ready.notify_one();
        self.spool_due.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wall_clock() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since_epoch.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests;
