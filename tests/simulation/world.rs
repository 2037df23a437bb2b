//! One run from one seed: three workers, each with its engine, two replicas, and a database.

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

use build_worker::simulation::{Outcome, Plan};
use image_service::simulation::{self as service, Change, Database, Fate, Replica, Row};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{host::Host, process::Process, rules::Rules};

pub(crate) const WORKERS: [&str; 3] = ["w1", "w2", "w3"];
pub(crate) const REPLICAS: usize = 2;

/// What can go wrong.
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

/// How often each transition met each fault.
pub(crate) type Coverage = BTreeMap<(String, Fault), u64>;

/// Everything of one run.
#[derive(Debug)]
pub(crate) struct World {
    random: Mutex<fastrand::Rng>,
    begun: Instant,
    /// Whether everything that happens is printed.
    is_told: bool,
    clock_ahead: AtomicI64,
    /// How much has happened, and a digest of what and when.
    pub(crate) events: AtomicU64,
    digest: Mutex<DefaultHasher>,
    /// Until when a fault counts as met.
    faults: Mutex<BTreeMap<Fault, Instant>>,
    /// Until when operations of the store fail, and in which way.
    store: Mutex<Option<(Fate, Instant)>>,
    spool_is_torn_until: Mutex<Option<Instant>>,
    pub(crate) rules: Mutex<Rules>,
    pub(crate) coverage: Mutex<Coverage>,
    plans: Mutex<BTreeMap<Uuid, Plan>>,
    database: Database,
    pub(crate) replicas: Mutex<Vec<Option<Arc<RunningReplica>>>>,
    pub(crate) hosts: Mutex<BTreeMap<&'static str, Arc<Host>>>,
    /// The workers whose processes cannot stop in time what runs.
    helpless: Mutex<BTreeSet<&'static str>>,
}

/// A replica and its process.
#[derive(Debug)]
pub(crate) struct RunningReplica {
    pub(crate) replica: Replica,
    pub(crate) process: Process,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    const EPOCH: i64 = 1_800_000_000_000_000;

    pub(crate) fn new(seed: u64, is_told: bool) -> Arc<Self> {
        let world = Arc::new(Self {
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            begun: Instant::now(),
            is_told,
            clock_ahead: AtomicI64::new(0),
            events: AtomicU64::new(0),
            digest: Mutex::default(),
            faults: Mutex::default(),
            store: Mutex::default(),
            spool_is_torn_until: Mutex::default(),
            rules: Mutex::default(),
            coverage: Mutex::default(),
            plans: Mutex::default(),
            database: Database::default(),
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

    /// Something has happened.
    pub(crate) fn count(&self, what: impl Hash + fmt::Debug) {
        self.events.fetch_add(1, Ordering::Relaxed);
        if self.is_told {
            println!("{:>8} ms  {what:?}", self.elapsed_millis());
        }
        (self.elapsed_millis(), what).hash(&mut *lock(&self.digest));
    }

    /// The clock begins anywhere within a millisecond, and goes on in whole ones.
    fn elapsed_millis(&self) -> i64 {
        let elapsed = self.begun.elapsed() + Duration::from_micros(500);
        i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
    }

    pub(crate) fn digest(&self) -> u64 {
        lock(&self.digest).finish()
    }

    /// A fault begins, and lasts for so long; what happens shortly after it has met it, too.
    pub(crate) fn note(&self, fault: Fault, lasts: Duration) {
        const AFTERMATH: Duration = Duration::from_secs(5);
        self.count((fault, lasts));
        let until = Instant::now() + lasts + AFTERMATH;
        let mut faults = lock(&self.faults);
        let noted = faults.entry(fault).or_insert(until);
        *noted = until.max(*noted);
    }

    pub(crate) fn fail_store(&self, fate: Fate, lasts: Duration) {
        *lock(&self.store) = Some((fate, Instant::now() + lasts));
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

    /// A client's new build.
    pub(crate) async fn enqueue(&self, number: u32) {
        let build = Uuid::from_u64_pair(1, u64::from(number));
        let plan = self.with_random(|random| Plan {
            lines: random.u32(1..40),
            pace: Duration::from_millis(random.u64(20..1_000)),
            outcome: match random.u8(0..20) {
                0..15 => Outcome::Succeeds,
                15 | 16 => Outcome::Fails,
                17 => Outcome::Breaks,
                _ => Outcome::Hangs,
            },
            dies_after: Duration::from_millis(random.u64(0..1_500)),
        });
        lock(&self.plans).insert(build, plan);
        lock(&self.rules).expect(build, plan.lines);
        let requester = self.with_random(|random| ["alice", "bob"][random.usize(0..2)]);
        let pin =
            self.with_random(|random| if random.u8(0..4) == 0 { WORKERS[random.usize(0..3)] } else { "" });
        loop {
            if let Some(running) = self.any_replica()
                && running.replica.enqueue(build, requester, pin).await
            {
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// How engines shall do a build.
    pub(crate) fn plan(&self, build: Uuid) -> Plan {
        lock(&self.plans).get(&build).copied().expect("it was planned when it was queued")
    }

    pub(crate) fn tears_spools(&self) -> bool {
        lock(&self.spool_is_torn_until).is_some_and(|until| Instant::now() < until)
    }

    pub(crate) fn is_helpless(&self, worker: &str) -> bool {
        lock(&self.helpless).contains(worker)
    }

    /// Nobody can stop in time what the engine of this worker runs, or will run until its process is itself again.
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
    /// Some clients want a cancel just when something begins.
    fn cancel_at_times(&self, build: Uuid, row: &Row) {
        let begins = ["Claimed", "Publishing"].contains(&row.state.as_str()) && !row.cancel_requested;
        if begins
            && self.with_random(|random| random.u8(0..12) == 0)
            && let Some(running) = self.any_replica()
        {
            tokio::spawn(async move { running.replica.cancel(build).await });
        }
    }
}

impl service::Surroundings for World {
    fn now_micros(&self) -> i64 {
        Self::EPOCH + self.elapsed_millis() * 1_000 + self.clock_ahead.load(Ordering::Relaxed)
    }

    fn delays(&self) -> (Duration, Duration) {
        self.with_random(|random| {
            let mut delay = || Duration::from_millis(u64::from(random.u8(0..4)));
            (delay(), delay())
        })
    }

    fn fate(&self) -> Fate {
        self.count("operation");
        match *lock(&self.store) {
            Some((fate, until)) if Instant::now() < until && self.with_random(|random| random.bool()) => fate,
            _ => Fate::Done,
        }
    }

    fn committed(&self, change: &Change) {
        self.count((
            change.build,
            &change.transitions,
            change.after.as_ref().map(|row| (row.attempt, &row.worker)),
        ));
        lock(&self.rules).committed(change);
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
