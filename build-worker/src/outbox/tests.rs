use std::{
    collections::VecDeque,
    sync::atomic::{AtomicUsize, Ordering},
};

use fastrand::Rng;
use futures_util::future::BoxFuture;
use proto::dispatch::Line;
use tokio::{task::JoinHandle, time::timeout};

use super::*;

/// A spool in memory that fails at random.
#[derive(Debug)]
struct FaultySpool {
    rng: Arc<Mutex<Rng>>,
    faults: Faults,
    /// Number of open files.
    files: Arc<AtomicUsize>,
}

/// The percentages of operations that fail.
#[derive(Copy, Clone, Debug, Default)]
struct Faults {
    /// Percentage of files that cannot be created.
    create: u8,
    /// Percentage of writes that are partial.
    tear: u8,
    /// Percentage of reads that fail or return wrong bytes.
    corrupt: u8,
    /// Maximum size of a file, in bytes, if it is limited.
    disk: Option<usize>,
}

#[derive(Debug)]
struct FaultyFile {
    bytes: Mutex<Vec<u8>>,
    rng: Arc<Mutex<Rng>>,
    faults: Faults,
    files: Arc<AtomicUsize>,
}

fn happens(rng: &Mutex<Rng>, percent: u8) -> bool {
    rng.lock().expect("no panic").u8(0..100) < percent
}

/// Lets an operation take several turns, so that other tasks run in between.
async fn linger(rng: &Mutex<Rng>) {
    let turns = rng.lock().expect("no panic").u8(0..4);
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

impl Spool for FaultySpool {
    fn create(&self) -> BoxFuture<'_, io::Result<Box<dyn SpoolFile>>> {
        Box::pin(async {
            linger(&self.rng).await;
            if happens(&self.rng, self.faults.create) {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.files.fetch_add(1, Ordering::Relaxed);
            let (rng, files) = (Arc::clone(&self.rng), Arc::clone(&self.files));
            let file = FaultyFile { bytes: Mutex::default(), rng, faults: self.faults, files };
            Ok(Box::new(file) as Box<dyn SpoolFile>)
        })
    }
}

impl Drop for FaultyFile {
    fn drop(&mut self) {
        self.files.fetch_sub(1, Ordering::Relaxed);
    }
}

impl SpoolFile for FaultyFile {
    fn write(&self, offset: u64, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            linger(&self.rng).await;
            let offset = usize::try_from(offset).expect("it is small");
            let mut fits = self.faults.disk.map_or(bytes.len(), |disk| disk.saturating_sub(offset));
            if happens(&self.rng, self.faults.tear) {
                fits = fits.min(self.rng.lock().expect("no panic").usize(0..bytes.len()));
            }
            let written = &bytes[..bytes.len().min(fits)];
            let mut file = self.bytes.lock().expect("no panic");
            let length = file.len().max(offset + written.len());
            file.resize(length, 0);
            file[offset..offset + written.len()].copy_from_slice(written);
            if written.len() < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })
    }

    fn read(&self, offset: u64, length: usize) -> BoxFuture<'_, io::Result<Vec<u8>>> {
        Box::pin(async move {
            linger(&self.rng).await;
            let offset = usize::try_from(offset).expect("it is small");
            let mut bytes = self.bytes.lock().expect("no panic")[offset..offset + length].to_vec();
            if happens(&self.rng, self.faults.corrupt) {
                let mut rng = self.rng.lock().expect("no panic");
                match rng.u8(0..3) {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    1 => bytes[rng.usize(0..length)] ^= 1 << rng.u8(0..8),
                    _ => bytes.truncate(rng.usize(0..length)),
                }
            }
            Ok(bytes)
        })
    }
}

const SMALL: Limits = Limits { window: 2_000, batch: 500, newest: 1_000, spool: 8_000 };

/// Returns an outbox, and the number of files of its spool.
fn outbox(limits: Limits, faults: Faults, seed: u64) -> (Arc<Outbox>, Arc<AtomicUsize>) {
    let files = Arc::default();
    let spool =
        FaultySpool { rng: Arc::new(Mutex::new(Rng::with_seed(seed))), faults, files: Arc::clone(&files) };
    let now = || Timestamp { seconds: 7, nanos: 0 };
    let settings = Settings { spool: Arc::new(spool), limits, now };
    let attempt = Attempt { build_id: "b".to_owned(), number: 1 };
    (Arc::new(Outbox::new(attempt, settings, Arc::new(Notify::new()))), files)
}

/// Lets the other tasks run for some turns, at most until they all wait.
async fn pass_turns(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

fn serve(outbox: &Arc<Outbox>) -> JoinHandle<Unreadable> {
    let outbox = Arc::clone(outbox);
    tokio::spawn(async move { outbox.serve_spool().await })
}

fn line(text: String) -> Event {
    Event::Line(Line { text, ..Line::default() })
}

/// Returns the text of an event by its number; all texts differ, also in length.
fn text(seed: u64, sequence: i64) -> String {
    let length = Rng::with_seed(seed ^ sequence.unsigned_abs()).usize(0..200);
    format!("{sequence} {}", "x".repeat(length))
}

fn push_all(outbox: &Arc<Outbox>, seed: u64, events: i64) -> JoinHandle<()> {
    let outbox = Arc::clone(outbox);
    tokio::spawn(async move {
        for sequence in 1..=events {
            outbox.push(None, line(text(seed, sequence))).await;
        }
    })
}

fn sent(outbox: &Outbox) -> Vec<(i64, usize)> {
    std::iter::from_fn(|| outbox.next_report())
        .map(|report| (report.first_sequence, report.events.len()))
        .collect()
}

/// The service's end: the messages in flight both ways, and the last durable event.
#[derive(Debug, Default)]
struct Service {
    reports: VecDeque<Report>,
    acknowledgements: VecDeque<i64>,
    durable: i64,
}

impl Service {
    /// Takes the next report, as image-service does, after checking its content.
    fn take(&mut self, seed: u64) {
        let Some(report) = self.reports.pop_front() else {
            return;
        };
        for (sequence, event) in (report.first_sequence..).zip(report.events) {
            assert_eq!(event.time, Some(Timestamp { seconds: 7, nanos: 0 }));
            assert_eq!(event.event, Some(line(text(seed, sequence))), "seed {seed}, event {sequence}");
            if sequence == self.durable + 1 {
                self.durable = sequence;
            }
        }
        self.acknowledgements.push_back(self.durable);
    }

    /// Takes one random step; panics if an acknowledgement is refused.
    async fn step(&mut self, outbox: &Outbox, seed: u64, rng: &mut Rng) {
        match rng.u8(0..100) {
            0..30 => self.reports.extend(outbox.next_report()),
            30..60 => self.take(seed),
            60..85 => {
                if let Some(sequence) = self.acknowledgements.pop_front() {
                    assert_eq!(outbox.acknowledge(sequence), Ok(()));
                }
            }
            // A report is lost; the service asks for it by its next acknowledgement.
            85..87 => drop(self.reports.pop_front()),
            87..90 => {
                self.reports.clear();
                self.acknowledgements.clear();
                assert_eq!(outbox.rewind(self.durable), Ok(()));
            }
            _ => pass_turns(rng.usize(0..20)).await,
        }
    }
}

#[tokio::test]
async fn events_leave_the_outbox_unchanged() {
    const EVENTS: i64 = 400;
    const SEEDS: u64 = 150;
    let mut spooled = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng::with_seed(seed);
        let percent = [0, 5, 30, 100][rng.usize(0..4)];
        let disk = rng.bool().then(|| rng.usize(0..10_000));
        let faults = Faults { create: percent / 2, tear: percent, corrupt: 0, disk };
        let (outbox, files) = outbox(SMALL, faults, seed);
        let serving = serve(&outbox);
        let pushing = push_all(&outbox, seed, EVENTS);
        let mut service = Service::default();
        let mut steps = 0;
        while service.durable < EVENTS {
            service.step(&outbox, seed, &mut rng).await;
            let largest_event = 300;
            let (in_memory, in_spool) = outbox.state().backlog.bytes();
            let in_memory_at_most = SMALL.window + SMALL.newest + SMALL.batch + 3 * largest_event;
            assert!(in_memory <= in_memory_at_most, "seed {seed}: {in_memory}");
            assert!(in_spool <= SMALL.spool, "seed {seed}: {in_spool}");
            spooled += usize::from(in_spool > 0);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: no end");
        }
        assert_eq!(outbox.rewind(EVENTS), Ok(()));
        outbox.flushed().await;
        pushing.await.expect("no panic");
        assert_eq!(files.load(Ordering::Relaxed), 0, "seed {seed}: the space is given back");
        serving.abort();
    }
    assert!(spooled > 10_000, "the spool was used in {spooled} steps only");
}

#[tokio::test]
async fn an_unreadable_spool_ends_the_attempt_without_a_gap() {
    const SEEDS: u64 = 100;
    let mut ended = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng::with_seed(seed);
        let (outbox, files) = outbox(SMALL, Faults { tear: 5, corrupt: 10, ..Faults::default() }, seed);
        let serving = serve(&outbox);
        let pushing = push_all(&outbox, seed, 400);
        let mut service = Service::default();
        while !serving.is_finished() && service.durable < 400 {
            service.step(&outbox, seed, &mut rng).await;
        }
        if service.durable == 400 {
            serving.abort();
            continue;
        }
        ended += 1;
        assert_eq!(serving.await.expect("no panic"), Unreadable);
        assert_eq!(files.load(Ordering::Relaxed), 0, "the file goes with the attempt");
        // Reports sent from here on are still correct, and nothing waits forever.
        for _ in 0..1_000 {
            service.step(&outbox, seed, &mut rng).await;
        }
        outbox.drop_all();
        pushing.await.expect("no panic");
        outbox.flushed().await;
    }
    assert!(ended > SEEDS / 2, "{ended}");
}

#[tokio::test]
async fn unacknowledged_events_are_sent_again() {
    let (outbox, _) = outbox(SMALL, Faults::default(), 0);
    for sequence in 1..=3 {
        outbox.push(None, line(text(0, sequence))).await;
    }
    assert_eq!(sent(&outbox), [(1, 3)]);
    outbox.push(None, line(text(0, 4))).await;
    assert_eq!(sent(&outbox), [(4, 1)]);
    assert_eq!(outbox.acknowledge(2), Ok(()));
    assert_eq!(sent(&outbox), []);
    assert_eq!(outbox.rewind(2), Ok(()));
    assert_eq!(sent(&outbox), [(3, 2)]);
    assert_eq!(outbox.acknowledge(2), Ok(()), "it has missed something");
    assert_eq!(sent(&outbox), [(3, 2)]);
    assert_eq!(outbox.acknowledge(1), Err(EventsDiscarded));
    assert_eq!(outbox.rewind(1), Err(EventsDiscarded));
    assert_eq!(outbox.acknowledge(4), Ok(()));
    outbox.flushed().await;
}

#[tokio::test]
async fn a_full_outbox_waits_until_there_is_room() {
    let without_spool = Limits { spool: 0, ..SMALL };
    let failing = Faults { tear: 100, ..Faults::default() };
    for (limits, faults) in [(SMALL, Faults::default()), (without_spool, Faults::default()), (SMALL, failing)]
    {
        let (outbox, files) = outbox(limits, faults, 1);
        let serving = serve(&outbox);
        let pushing = push_all(&outbox, 1, 1_000);
        pass_turns(10_000).await;
        assert!(!pushing.is_finished(), "it waits");
        assert!(!outbox.state().backlog.has_room());
        let mut durable = 0;
        while !pushing.is_finished() {
            let Some(report) = outbox.next_report() else {
                tokio::task::yield_now().await;
                continue;
            };
            assert_eq!(report.first_sequence, durable + 1);
            durable += i64::try_from(report.events.len()).expect("they are few");
            assert_eq!(outbox.acknowledge(durable), Ok(()));
            tokio::task::yield_now().await;
        }
        assert!(durable > 900);
        let uses_spool = limits.spool > 0 && faults.tear == 0;
        let _more = push_all(&outbox, 1, 1_000);
        pass_turns(10_000).await;
        assert_eq!(outbox.state().backlog.is_spooled(), uses_spool, "what was full is used again");
        outbox.drop_all();
        timeout(Duration::from_secs(10), outbox.push(None, line(String::new())))
            .await
            .expect("a dropped outbox takes everything");
        pass_turns(10).await;
        assert_eq!(files.load(Ordering::Relaxed), 0, "a dropped outbox keeps nothing");
        serving.abort();
    }
}

#[tokio::test]
async fn the_file_goes_with_the_task_of_the_attempt() {
    let (outbox, files) = outbox(SMALL, Faults::default(), 1);
    let serving = serve(&outbox);
    let pushing = push_all(&outbox, 1, 1_000);
    pass_turns(10_000).await;
    assert_eq!(files.load(Ordering::Relaxed), 1);
    serving.abort();
    assert!(serving.await.is_err_and(|error| error.is_cancelled()));
    assert_eq!(files.load(Ordering::Relaxed), 0);
    pushing.abort();
}
