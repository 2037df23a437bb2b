//! The world of one run: three workers, each with its engine, two replicas, and a database.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use build_worker::simulation::Plan;
use image_service::simulation::{self as service, Change, CommitOutcome, Database, Replica, Row};
use proto::dispatch::connect_request::Message;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{host::Host, process::Process, rules::Rules};

pub(crate) const WORKERS: [&str; 3] = ["w1", "w2", "w3"];
pub(crate) const SLOTS: u16 = 2;
pub(crate) const REPLICAS: usize = 2;

/// Returns the label of a worker.
pub(crate) fn zone_of(worker: &str) -> (String, String) {
    ("zone".to_owned(), if worker == "w3" { "north" } else { "south" }.to_owned())
}

/// A kind of fault.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Fault {
    ServiceKilled,
    ServiceSuspended,
    ServiceShutDown,
    WorkerKilled,
    WorkerSuspended,
    WorkerShutDown,
    WorkerDrained,
    EngineKilled,
    EngineSuspended,
    EngineStuck,
    LinkStalled,
    LinkCut,
    CommitLost,
    CommitAmbiguous,
    ClockJumped,
    SpoolTorn,
}

impl Fault {
    pub(crate) const ALL: [Self; 16] = [
        Self::ServiceKilled,
        Self::ServiceSuspended,
        Self::ServiceShutDown,
        Self::WorkerKilled,
        Self::WorkerSuspended,
        Self::WorkerShutDown,
        Self::WorkerDrained,
        Self::EngineKilled,
        Self::EngineSuspended,
        Self::EngineStuck,
        Self::LinkStalled,
        Self::LinkCut,
        Self::CommitLost,
        Self::CommitAmbiguous,
        Self::ClockJumped,
        Self::SpoolTorn,
    ];
}

/// Number of times that each transition occurred during each fault.
pub(crate) type Coverage = BTreeMap<(String, Fault), u64>;

/// The state of one run.
#[derive(Debug)]
pub(crate) struct World {
    random: Mutex<fastrand::Rng>,
    begun: Instant,
    /// True if every event is printed.
    verbose: bool,
    clock_ahead: AtomicI64,
    /// Number of events; `digest` covers their content and times.
    pub(crate) events: AtomicU64,
    digest: Mutex<DefaultHasher>,
    /// Time until which each fault counts as present.
    faults: Mutex<BTreeMap<Fault, Instant>>,
    /// Outcome of failing store operations, whether all or half of them fail, and until when.
    store: Mutex<Option<(CommitOutcome, bool, Instant)>>,
    spool_is_torn_until: Mutex<Option<Instant>>,
    pub(crate) rules: Mutex<Rules>,
    pub(crate) coverage: Mutex<Coverage>,
    /// Time of the last message from each worker, and since when it has reported that it drains.
    last_seen: Mutex<BTreeMap<&'static str, (Instant, Option<Instant>)>>,
    /// Cancelled when the faults are over.
    pub(crate) healed: CancellationToken,
    database: Database,
    pub(crate) replicas: Mutex<Vec<Option<Arc<RunningReplica>>>>,
    pub(crate) hosts: Mutex<BTreeMap<&'static str, Arc<Host>>>,
    /// Workers whose processes cannot stop their builds in time.
    helpless: Mutex<BTreeSet<&'static str>>,
}

/// A replica and its process.
#[derive(Debug)]
pub(crate) struct RunningReplica {
    pub(crate) replica: Replica,
    pub(crate) process: Process,
}

/// Returns the id of a build by its number.
pub(crate) fn build_of(number: u32) -> Uuid {
    Uuid::from_u64_pair(1, u64::from(number))
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    const EPOCH: i64 = 1_800_000_000_000_000;

    pub(crate) fn new(seed: u64, verbose: bool) -> Arc<Self> {
        let mut random = fastrand::Rng::with_seed(seed);
        // In most runs no fault makes anything wait for this long.
        let may_wait_too_long = random.u8(0..8) == 0;
        let queue_timeout = Duration::from_secs(if may_wait_too_long { 25 } else { 200 });
        let world = Arc::new(Self {
            random: Mutex::new(random),
            begun: Instant::now(),
            verbose,
            clock_ahead: AtomicI64::new(0),
            events: AtomicU64::new(0),
            digest: Mutex::default(),
            faults: Mutex::default(),
            store: Mutex::default(),
            spool_is_torn_until: Mutex::default(),
            rules: Mutex::new(Rules::new(may_wait_too_long)),
            coverage: Mutex::default(),
            last_seen: Mutex::default(),
            healed: CancellationToken::new(),
            database: Database::new(queue_timeout),
            replicas: Mutex::default(),
            hosts: Mutex::default(),
            helpless: Mutex::default(),
        });
        for replica in 0..REPLICAS {
            world.start_replica(replica);
        }
        for name in WORKERS {
            let host = Host::start_new(&world, name);
            lock(&world.hosts).insert(name, host);
        }
        world
    }

    pub(crate) fn with_random<T>(&self, draw: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        draw(&mut lock(&self.random))
    }

    pub(crate) fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.with_random(|random| random.u64(from..to)))
    }

    /// Counts an event and adds it to the digest.
    pub(crate) fn count(&self, what: impl Hash + fmt::Debug) {
        self.events.fetch_add(1, Ordering::Relaxed);
        if self.verbose {
            println!("{:>8} ms  {what:?}", self.elapsed_millis());
        }
        (self.elapsed_millis(), what).hash(&mut *lock(&self.digest));
    }

    /// Returns the elapsed time, rounded.
    ///
    /// The clock starts anywhere within a millisecond and advances in whole ones.
    fn elapsed_millis(&self) -> i64 {
        let elapsed = self.begun.elapsed() + Duration::from_micros(500);
        i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
    }

    pub(crate) fn digest(&self) -> u64 {
        lock(&self.digest).finish()
    }

    /// Records that a fault starts and lasts for `lasts`.
    ///
    /// Transitions shortly afterwards count as affected by it, too.
    pub(crate) fn note(&self, fault: Fault, lasts: Duration) {
        const AFTERMATH: Duration = Duration::from_secs(5);
        self.count((fault, lasts));
        let until = Instant::now() + lasts + AFTERMATH;
        let mut faults = lock(&self.faults);
        let noted = faults.entry(fault).or_insert(until);
        *noted = until.max(*noted);
    }

    pub(crate) fn fail_store(&self, outcome: CommitOutcome, lasts: Duration) {
        let always = self.with_random(|random| random.bool());
        *lock(&self.store) = Some((outcome, always, Instant::now() + lasts));
    }

    /// Waits for `lasts`, or until the faults are over.
    pub(crate) async fn last(&self, lasts: Duration) {
        let _ = timeout(lasts, self.healed.cancelled()).await;
    }

    /// Records a message from a worker to the service.
    pub(crate) fn mark_seen(&self, worker: &'static str, message: Option<&Message>) {
        let now = Instant::now();
        let mut last_seen = lock(&self.last_seen);
        let (at, drains) = last_seen.entry(worker).or_insert((now, None));
        *at = now;
        if let Some(Message::Heartbeat(heartbeat)) = message {
            *drains = heartbeat.draining.then(|| drains.unwrap_or(now));
        }
    }

    /// Returns whether a worker has been silent or draining for too long to be given a build.
    fn takes_nothing(&self, worker: &str) -> bool {
        /// Maximum age of the facts behind a decision, which may span a few slow operations.
        const KNOWN_LATE: Duration = Duration::from_secs(8);
        let may_be_late = [Fault::ServiceSuspended, Fault::CommitLost, Fault::CommitAmbiguous];
        let now = Instant::now();
        if may_be_late.iter().any(|fault| lock(&self.faults).get(fault).is_some_and(|until| *until > now)) {
            return false;
        }
        lock(&self.last_seen).get(worker).is_none_or(|(at, drains)| {
            at.elapsed() > Database::OFFLINE_AFTER + KNOWN_LATE
                || drains.is_some_and(|since| since.elapsed() > KNOWN_LATE)
        })
    }

    pub(crate) fn tear_spools(&self, lasts: Duration) {
        *lock(&self.spool_is_torn_until) = Some(Instant::now() + lasts);
    }

    pub(crate) fn move_clock(&self, by_micros: i64) {
        self.clock_ahead.fetch_add(by_micros, Ordering::Relaxed);
    }

    pub(crate) fn start_replica(self: &Arc<Self>, index: usize) {
        let replica = Replica::new(&self.database, Arc::clone(self) as Arc<dyn service::Surroundings>);
        let process = Process::default();
        process.spawn(replica.work());
        let mut replicas = lock(&self.replicas);
        if replicas.len() <= index {
            replicas.resize_with(index + 1, || None);
        }
        replicas[index] = Some(Arc::new(RunningReplica { replica, process }));
    }

    pub(crate) fn any_replica(&self) -> Option<Arc<RunningReplica>> {
        let running: Vec<_> = lock(&self.replicas).iter().flatten().cloned().collect();
        self.with_random(|random| random.choice(running))
    }

    /// Returns the plan that engines follow for a build.
    pub(crate) fn plan(&self, build: Uuid) -> Plan {
        lock(&self.rules).plan(build)
    }

    pub(crate) fn is_spool_torn(&self) -> bool {
        lock(&self.spool_is_torn_until).is_some_and(|until| Instant::now() < until)
    }

    pub(crate) fn is_helpless(&self, worker: &str) -> bool {
        lock(&self.helpless).contains(worker)
    }

    /// Excuses the builds on a worker's engine, which nothing can stop in time.
    ///
    /// If `is_helpless` is set, so are those that start there until it is cleared.
    pub(crate) fn excuse(&self, worker: &'static str, is_helpless: bool) {
        let mut rules = lock(&self.rules);
        for name in rules.running_on(worker) {
            rules.excuse(name);
        }
        if is_helpless {
            lock(&self.helpless).insert(worker);
        } else {
            lock(&self.helpless).remove(worker);
        }
    }
}

impl World {
    /// Cancels some builds at the moment they are claimed or start to publish.
    fn cancel_at_times(&self, build: Uuid, row: &Row) {
        let begins = ["Claimed", "Publishing"].contains(&row.state.as_str())
            && row.cancel_requested_at.is_none()
            && !self.healed.is_cancelled();
        if begins
            && self.with_random(|random| random.u8(0..12) == 0)
            && let Some(running) = self.any_replica()
        {
            lock(&self.rules).unwant(build);
            tokio::spawn(async move { running.replica.cancel(build).await });
        }
    }
}

impl service::Surroundings for World {
    fn now_micros(&self) -> i64 {
        Self::EPOCH + self.elapsed_millis() * 1_000 + self.clock_ahead.load(Ordering::Relaxed)
    }

    fn delays(&self) -> (Duration, Duration) {
        let is_healthy = self.healed.is_cancelled();
        self.with_random(|random| {
            let mut delay = || match random.u8(0..200) {
                0 if !is_healthy => Duration::from_millis(random.u64(0..2_000)),
                0..70 => Duration::from_millis(random.u64(1..4)),
                _ => Duration::ZERO,
            };
            (delay(), delay())
        })
    }

    fn commit_outcome(&self) -> CommitOutcome {
        self.count("operation");
        match *lock(&self.store) {
            Some((outcome, always, until))
                if Instant::now() < until && (always || self.with_random(|random| random.bool())) =>
            {
                outcome
            }
            _ => CommitOutcome::Done,
        }
    }

    fn committed(&self, change: &Change) {
        self.count((
            change.build,
            &change.transitions,
            change.after.as_ref().map(|row| (row.attempt, &row.worker)),
        ));
        let worker = change.after.as_ref().and_then(|row| row.worker.as_deref());
        let takes_nothing = worker.is_some_and(|worker| self.takes_nothing(worker));
        lock(&self.rules).committed(change, takes_nothing, self.now_micros());
        if let Some(after) = &change.after {
            self.cancel_at_times(change.build, after);
        }
        let now = Instant::now();
        let met: Vec<Fault> =
            lock(&self.faults).iter().filter(|(_, until)| **until > now).map(|(f, _)| *f).collect();
        let mut coverage = lock(&self.coverage);
        for transition in &change.transitions {
            for fault in &met {
                *coverage.entry((transition.clone(), *fault)).or_default() += 1;
            }
        }
    }
}
