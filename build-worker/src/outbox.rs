//! Unacknowledged reports of one attempt: numbered, bounded, and sent again after a reconnect.
//!
//! Reports that memory cannot hold go to a spool; when that is full, too, the job waits.

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

/// The queue of events from a job to the session.
#[derive(Debug)]
pub(crate) struct Outbox {
    attempt: Attempt,
    settings: Settings,
    state: Mutex<State>,
    /// Signal that there is room again.
    room: Notify,
    /// Signal that everything is acknowledged, or the attempt was dropped.
    flushed: Notify,
    /// Signal that the spool may have to be read or written.
    spool_due: Notify,
    /// Signal that there is something to send; shared by all jobs of the worker.
    ready: Arc<Notify>,
}

/// The settings that all outboxes of a worker share.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) spool: Arc<dyn Spool>,
    pub(crate) limits: Limits,
    /// Clock of the worker.
    pub(crate) now: fn() -> Timestamp,
}

/// The error of a service that needs discarded reports: the attempt cannot be reported to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EventsDiscarded;

/// The error of a spool that cannot be read back: the attempt cannot be reported to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable;

#[derive(Debug)]
struct State {
    backlog: Backlog,
    /// Set once reports are of no use and are discarded.
    dropped: bool,
}

impl Settings {
    /// Returns the default limits of memory for an attempt, with a spool of `spool_limit` bytes.
    pub(crate) fn new(spool: Arc<dyn Spool>, spool_limit: u64) -> Self {
        let limits =
            Limits { window: 4 * 1024 * 1024, batch: 256 * 1024, newest: 1024 * 1024, spool: spool_limit };
        Self { spool, limits, now: wall_clock }
    }
}

impl Outbox {
    /// Pause before a failed write to the spool is retried, unless space in it is freed earlier.
    const SPOOL_RETRY: Duration = Duration::from_secs(1);

    pub(crate) fn new(attempt: Attempt, settings: Settings, ready: Arc<Notify>) -> Self {
        Self {
            attempt,
            state: Mutex::new(State { backlog: Backlog::new(settings.limits), dropped: false }),
            settings,
            room: Notify::new(),
            flushed: Notify::new(),
            spool_due: Notify::new(),
            ready,
        }
    }

    /// Adds an event after waiting for room; discards it if the attempt was dropped.
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

    /// Returns the next report to send, if there is one.
    pub(crate) fn next_report(&self) -> Option<Report> {
        let (first_sequence, events) = self.state().backlog.next_report()?;
        Some(Report { attempt: Some(self.attempt.clone()), first_sequence, events })
    }

    /// Discards the events up to `sequence`, which are durable.
    ///
    /// An acknowledgement of nothing new means that the service has missed a report: the events are sent
    /// again.
    ///
    /// # Errors
    ///
    /// Returns [`EventsDiscarded`] if the service lacks events that were durable once: it has been restored
    /// from a backup, or a later acknowledgement has overtaken this one.
    pub(crate) fn acknowledge(&self, sequence: i64) -> Result<(), EventsDiscarded> {
        let mut state = self.state();
        let backlog = &mut state.backlog;
        if sequence + 1 < backlog.first_sequence() {
            return Err(EventsDiscarded);
        }
        if sequence < backlog.first_sequence() && backlog.has_sent() {
            backlog.unsend();
        }
        backlog.discard_until(sequence);
        self.wake_waiters(&state);
        Ok(())
    }

    /// Starts over on a new connection, which sends every event that is not durable again.
    ///
    /// # Errors
    ///
    /// Returns [`EventsDiscarded`] under the conditions of [`Self::acknowledge`].
    pub(crate) fn rewind(&self, acknowledged: i64) -> Result<(), EventsDiscarded> {
        self.acknowledge(acknowledged)?;
        self.state().backlog.unsend();
        self.ready.notify_one();
        Ok(())
    }

    /// Drops the fenced attempt, of which nothing more is sent.
    pub(crate) fn drop_all(&self) {
        let mut state = self.state();
        state.dropped = true;
        state.backlog.clear();
        self.wake_waiters(&state);
    }

    /// Reports whether the attempt was dropped.
    pub(crate) fn is_dropped(&self) -> bool {
        self.state().dropped
    }

    /// Waits until everything is acknowledged.
    pub(crate) async fn flushed(&self) {
        loop {
            let flushed = self.flushed.notified();
            if self.state().backlog.is_empty() {
                return;
            }
            flushed.await;
        }
    }

    /// Moves events to the spool and back for as long as the job's task polls it.
    ///
    /// Returns when the spool cannot be read back. Events stay in memory until they are written completely,
    /// so a spool that fails is like one that is full.
    pub(crate) async fn serve_spool(&self) -> Unreadable {
        let mut file: Option<Box<dyn SpoolFile>> = None;
        let mut rests_until = None;
        let mut has_warned = false;
        loop {
            if !self.state().backlog.is_spooled() {
                // Frees the disk space.
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
                    self.wake_waiters(&state);
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
        self.wake_waiters(&state);
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

    /// Wakes all tasks that wait for a change of the backlog.
    fn wake_waiters(&self, state: &State) {
        if state.backlog.has_room() {
            self.room.notify_waiters();
        }
        if state.backlog.is_empty() {
            self.flushed.notify_waiters();
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
