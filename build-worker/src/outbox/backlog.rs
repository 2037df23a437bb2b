//! Backlog of an attempt's unacknowledged events, in order.
//!
//! The oldest are in memory and are sent from there; behind them are batches in the spool; the newest are in
//! memory again, until they fill a batch or there is room among the oldest.
//!
//! The backlog decides and never waits: its owner reads and writes the spool, and reports the result.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hasher},
};

use prost::Message;
use proto::dispatch::{Report, ReportEvent, report_event::Event};

/// The limits on an attempt's events in memory and in the spool, in bytes.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Limits {
    /// Limit of the oldest events, which can be sent; exceeded by a batch at most.
    pub(crate) window: usize,
    /// Size of a write of the newest events to the spool.
    pub(crate) batch: usize,
    /// Limit of the newest events, exceeded by an event at most. At the limit the job waits.
    pub(crate) newest: usize,
    /// Limit of the spool.
    pub(crate) spool: u64,
}

#[derive(Debug)]
pub(super) struct Backlog {
    limits: Limits,
    oldest: Events,
    /// Sequence number of the first of `oldest`.
    first_sequence: i64,
    /// Number of events of `oldest` that were sent over the current connection.
    sent: usize,
    spooled: VecDeque<Batch>,
    newest: Events,
    /// Batch that is being written from the first of `newest`, which stay there until the write is over.
    storing: Option<Batch>,
    /// Set if the spool had no room, and nothing in it was freed since.
    spool_is_full: bool,
}

/// Events that are in the spool, or are being written to it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) offset: u64,
    pub(super) length: usize,
    checksum: u64,
    events: usize,
}

/// A task of the spool.
#[derive(Debug)]
pub(super) enum Task {
    /// A batch to read and pass to [`Backlog::fetched`].
    Fetch(Batch),
    /// An offset and the bytes to write there, followed by a call of [`Backlog::stored`].
    Store(u64, Vec<u8>),
}

/// The error of a batch that is not read as it was written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Corrupt;

#[derive(Debug, Default)]
struct Events {
    queue: VecDeque<ReportEvent>,
    bytes: usize,
}

impl Backlog {
    const REPORT_BYTES: usize = 256 * 1024;
    const REPORT_EVENTS: usize = 2_048;

    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            oldest: Events::default(),
            first_sequence: 1,
            sent: 0,
            spooled: VecDeque::new(),
            newest: Events::default(),
            storing: None,
            spool_is_full: false,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.newest.bytes < self.limits.newest
    }

    pub(super) fn is_empty(&self) -> bool {
        self.oldest.queue.is_empty() && self.spooled.is_empty() && self.newest.queue.is_empty()
    }

    /// Returns the sequence number of the first unacknowledged event.
    pub(super) fn first_sequence(&self) -> i64 {
        self.first_sequence
    }

    pub(super) fn has_sent(&self) -> bool {
        self.sent > 0
    }

    /// Reports whether the spool holds anything.
    pub(super) fn is_spooled(&self) -> bool {
        !self.spooled.is_empty()
    }

    /// Returns the bytes in memory, and the end of the used part of the spool.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> (usize, u64) {
        let end = self.spooled.iter().map(|batch| batch.place().1).max();
        (self.oldest.bytes + self.newest.bytes, end.unwrap_or(0))
    }

    pub(super) fn push(&mut self, event: ReportEvent) {
        self.newest.push(event);
        self.advance();
    }

    /// Returns the next events to send, with the sequence number of the first.
    pub(super) fn next_report(&mut self) -> Option<(i64, Vec<ReportEvent>)> {
        let mut bytes = 0;
        let unsent = self.oldest.queue.range(self.sent..).take(Self::REPORT_EVENTS);
        let events: Vec<ReportEvent> = unsent
            .take_while(|event| {
                let fits = bytes < Self::REPORT_BYTES;
                bytes += size(event);
                fits
            })
            .cloned()
            .collect();
        if events.is_empty() {
            return None;
        }
        let first = self.first_sequence + i64::try_from(self.sent).unwrap_or(i64::MAX);
        self.sent += events.len();
        Some((first, events))
    }

    pub(super) fn discard_until(&mut self, sequence: i64) {
        while self.first_sequence <= sequence && self.oldest.pop().is_some() {
            self.first_sequence += 1;
            self.sent = self.sent.saturating_sub(1);
        }
        self.advance();
    }

    /// Marks everything as not sent.
    pub(super) fn unsend(&mut self) {
        self.sent = 0;
    }

    pub(super) fn clear(&mut self) {
        self.oldest = Events::default();
        self.spooled.clear();
        self.newest = Events::default();
        self.storing = None;
        self.spool_is_full = false;
        self.sent = 0;
    }

    /// Returns the next task of the spool, one at a time; writes nothing while the spool rests.
    pub(super) fn next_task(&mut self, rests: bool) -> Option<Task> {
        if let Some(batch) = self.spooled.front().filter(|_| self.oldest.bytes < self.limits.window) {
            return Some(Task::Fetch(*batch));
        }
        if rests || self.spool_is_full || self.newest.bytes < self.limits.batch {
            return None;
        }
        let mut bytes = 0;
        let whole = self.newest.queue.iter().take_while(|event| {
            let fits = bytes < self.limits.batch;
            bytes += size(event);
            fits
        });
        let report = Report { events: whole.cloned().collect(), ..Report::default() };
        let bytes = report.encode_to_vec();
        let Some(offset) = self.place(bytes.len()) else {
            self.spool_is_full = true;
            return None;
        };
        let (length, checksum, events) = (bytes.len(), checksum(&bytes), report.events.len());
        self.storing = Some(Batch { offset, length, checksum, events });
        Some(Task::Store(offset, bytes))
    }

    /// Completes a write; unless `is_whole`, any part of the batch may be in the spool.
    pub(super) fn stored(&mut self, is_whole: bool) {
        // `None` if everything was cleared meanwhile.
        if let Some(batch) = self.storing.take().filter(|_| is_whole) {
            (0..batch.events).for_each(|_| drop(self.newest.pop()));
            self.spooled.push_back(batch);
        }
        self.advance();
    }

    /// Takes in a batch that was read.
    pub(super) fn fetched(&mut self, batch: Batch, bytes: &[u8]) -> Result<(), Corrupt> {
        if self.spooled.front() != Some(&batch) {
            // Everything was cleared meanwhile.
            return Ok(());
        }
        if checksum(bytes) != batch.checksum {
            return Err(Corrupt);
        }
        let events = Report::decode(bytes).map_err(|_| Corrupt)?.events;
        self.spooled.pop_front();
        self.spool_is_full = false;
        events.into_iter().for_each(|event| self.oldest.push(event));
        self.advance();
        Ok(())
    }

    /// Moves the newest events to the oldest while there is nothing between them.
    fn advance(&mut self) {
        while self.spooled.is_empty() && self.storing.is_none() && self.oldest.bytes < self.limits.window {
            let Some(event) = self.newest.pop() else {
                return;
            };
            self.oldest.push(event);
        }
    }

    /// Returns the first offset with enough free space, so that freed space is used before the file grows.
    fn place(&self, length: usize) -> Option<u64> {
        let length = u64::try_from(length).ok()?;
        let mut taken: Vec<(u64, u64)> = self.spooled.iter().map(Batch::place).collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (begin, end) in taken {
            if begin - offset >= length {
                break;
            }
            offset = end;
        }
        (offset + length <= self.limits.spool).then_some(offset)
    }
}

impl Batch {
    fn place(&self) -> (u64, u64) {
        (self.offset, self.offset + u64::try_from(self.length).unwrap_or(u64::MAX))
    }
}

impl Events {
    fn push(&mut self, event: ReportEvent) {
        self.bytes += size(&event);
        self.queue.push_back(event);
    }

    fn pop(&mut self) -> Option<ReportEvent> {
        let event = self.queue.pop_front()?;
        self.bytes -= size(&event);
        Some(event)
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Returns the approximate size of an event, in memory and on the wire.
fn size(event: &ReportEvent) -> usize {
    const FIXED: usize = 32;
    let texts = event.event.as_ref().map_or(0, |event| match event {
        Event::Step(step) => step.name.len() + step.error.len(),
        Event::Line(line) => line.text.len(),
        Event::Gap(gap) => gap.message.len(),
        Event::Failed(failed) => {
            failed.message.len() + failed.last_lines.iter().map(String::len).sum::<usize>()
        }
        Event::HandedBack(handed_back) => handed_back.reason.len(),
        Event::Started(_) | Event::Built(_) | Event::Succeeded(_) | Event::Stopped(_) => 0,
    });
    FIXED + texts
}
