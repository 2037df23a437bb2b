//! The reports of one attempt that are not acknowledged yet: numbered, bounded, sent again after a reconnect.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use prost_types::Timestamp;
use proto::dispatch::{Attempt, Report, ReportEvent, report_event::Event};
use tokio::sync::Notify;

/// Where a job puts its events and the session takes them from.
#[derive(Debug)]
pub(crate) struct Outbox {
    attempt: Attempt,
    state: Mutex<State>,
    /// There is room again.
    room: Notify,
    /// Everything is acknowledged, or the attempt was dropped.
    settled: Notify,
    /// There is something to send; shared by all jobs of the worker.
    ready: Arc<Notify>,
}

/// The service needs reports that have been forgotten: the attempt can never be told to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forgotten;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<ReportEvent>,
    bytes: usize,
    /// The number of the first of `waiting`.
    first_sequence: i64,
    /// How many of `waiting` have been sent over the present connection.
    sent: usize,
    /// No more reports: they are of no use.
    dropped: bool,
}

impl Outbox {
    /// How much a job may be ahead of the service before it stops reading from the engine.
    const BYTES: usize = 4 * 1024 * 1024;
    const REPORT_BYTES: usize = 256 * 1024;
    const REPORT_EVENTS: usize = 2_048;

    pub(crate) fn new(attempt: Attempt, ready: Arc<Notify>) -> Self {
        Self {
            attempt,
            state: Mutex::new(State { first_sequence: 1, ..State::default() }),
            room: Notify::new(),
            settled: Notify::new(),
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
                if state.bytes < Self::BYTES {
                    state.bytes += size(&event);
                    state
                        .waiting
                        .push_back(ReportEvent { time: Some(at.unwrap_or_else(now)), event: Some(event) });
                    break;
                }
            }
            room.await;
        }
        self.ready.notify_one();
    }

    /// The next report to send, if there is one.
    pub(crate) fn next_report(&self) -> Option<Report> {
        let mut state = self.state();
        let mut bytes = 0;
        let events: Vec<ReportEvent> = state
            .waiting
            .iter()
            .skip(state.sent)
            .take(Self::REPORT_EVENTS)
            .take_while(|waiting| {
                let fits = bytes < Self::REPORT_BYTES;
                bytes += waiting.event.as_ref().map_or(0, size);
                fits
            })
            .cloned()
            .collect();
        if events.is_empty() {
            return None;
        }
        let first_sequence = state.first_sequence + i64::try_from(state.sent).unwrap_or(i64::MAX);
        state.sent += events.len();
        Some(Report { attempt: Some(self.attempt.clone()), first_sequence, events })
    }

    /// Everything up to `sequence` is durable. An answer that acknowledges nothing new means that the service has missed
    /// something: it is sent again.
    ///
    /// Fails when that is forgotten here already, for it was durable once: the service has been restored from a backup.
    pub(crate) fn acknowledge(&self, sequence: i64) -> Result<(), Forgotten> {
        let mut state = self.state();
        if sequence + 1 < state.first_sequence {
            return Err(Forgotten);
        }
        if sequence < state.first_sequence && state.sent > 0 {
            state.sent = 0;
            self.ready.notify_one();
        }
        while state.first_sequence <= sequence {
            let Some(event) = state.waiting.pop_front() else {
                break;
            };
            state.bytes -= event.event.as_ref().map_or(0, size);
            state.first_sequence += 1;
            state.sent = state.sent.saturating_sub(1);
        }
        self.room.notify_waiters();
        if state.waiting.is_empty() {
            self.settled.notify_waiters();
        }
        Ok(())
    }

    /// A new connection: everything that is not durable is to be sent again.
    pub(crate) fn rewind(&self, acknowledged: i64) -> Result<(), Forgotten> {
        self.acknowledge(acknowledged)?;
        self.state().sent = 0;
        self.ready.notify_one();
        Ok(())
    }

    /// The attempt is fenced: nothing more is sent.
    pub(crate) fn drop_all(&self) {
        let mut state = self.state();
        state.dropped = true;
        state.waiting.clear();
        state.bytes = 0;
        state.sent = 0;
        self.room.notify_waiters();
        self.settled.notify_waiters();
    }

    /// Waits until everything is acknowledged.
    pub(crate) async fn settled(&self) {
        loop {
            let settled = self.settled.notified();
            if self.state().waiting.is_empty() {
                return;
            }
            settled.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since_epoch.subsec_nanos()).unwrap_or(0),
    }
}

/// About what an event takes, in memory and on the wire.
fn size(event: &Event) -> usize {
    const FIXED: usize = 32;
    FIXED
        + match event {
            Event::Step(step) => step.name.len() + step.error.len(),
            Event::Line(line) => line.text.len(),
            Event::Gap(gap) => gap.message.len(),
            Event::Failed(failed) => {
                failed.message.len() + failed.last_lines.iter().map(String::len).sum::<usize>()
            }
            Event::HandedBack(handed_back) => handed_back.reason.len(),
            Event::Started(_) | Event::Built(_) | Event::Succeeded(_) | Event::Stopped(_) => 0,
        }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::dispatch::Line;

    use super::*;

    fn outbox() -> Outbox {
        let attempt = Attempt { build_id: "b".to_owned(), number: 1 };
        Outbox::new(attempt, Arc::new(Notify::new()))
    }

    fn line(bytes: usize) -> Event {
        Event::Line(Line { text: "x".repeat(bytes), ..Line::default() })
    }

    fn sent(outbox: &Outbox) -> Vec<(i64, usize)> {
        std::iter::from_fn(|| outbox.next_report())
            .map(|report| (report.first_sequence, report.events.len()))
            .collect()
    }

    #[tokio::test]
    async fn what_is_not_acknowledged_is_sent_again() {
        let outbox = outbox();
        for _ in 0..3 {
            outbox.push(None, line(1)).await;
        }
        assert_eq!(sent(&outbox), [(1, 3)]);
        outbox.push(None, line(1)).await;
        assert_eq!(sent(&outbox), [(4, 1)]);
        assert_eq!(outbox.acknowledge(2), Ok(()));
        assert_eq!(sent(&outbox), []);
        assert_eq!(outbox.rewind(2), Ok(()));
        assert_eq!(sent(&outbox), [(3, 2)]);
        assert_eq!(outbox.rewind(1), Err(Forgotten));
        assert_eq!(outbox.acknowledge(4), Ok(()));
        outbox.settled().await;
    }

    #[tokio::test]
    async fn a_full_outbox_waits_until_there_is_room() {
        let outbox = Arc::new(outbox());
        let pushing = tokio::spawn({
            let outbox = Arc::clone(&outbox);
            async move {
                for _ in 0..10 {
                    outbox.push(None, line(1024 * 1024)).await;
                }
            }
        });
        let full = async {
            while outbox.state().bytes < Outbox::BYTES {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), full).await.expect("the outbox fills");
        assert!(outbox.state().waiting.len() < 6 && !pushing.is_finished());
        outbox.drop_all();
        tokio::time::timeout(Duration::from_secs(10), pushing)
            .await
            .expect("a dropped outbox takes everything")
            .expect("no panic");
    }
}
