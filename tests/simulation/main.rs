//! Dispatch under every kind of failure, replayed from seeds.
//!
//! The real code of both ends runs over models of the database, the network, the engines and the processes,
//! in simulated time.
//!
//! `TRAILER_TEST_SEED=N` replays one run and prints its events; `TRAILER_TEST_SEEDS=N` sets the number of
//! runs.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use crate::{
    faults::disturb,
    world::{Coverage, Fault, World, lock},
};

mod alarms;
mod clients;
mod faults;
mod host;
mod probes;
mod process;
mod rules;
mod world;

const SEEDS: u64 = 10_000;
const MIN_EVENTS: u64 = 500;
/// Duration of the faults, after which everything must end within `SETTLED_WITHIN`.
const DISTURBED: Duration = Duration::from_secs(36);
const SETTLED_WITHIN: Duration = Duration::from_secs(180);

/// The outcome of one run.
#[derive(Debug)]
struct Run {
    events: u64,
    digest: u64,
    /// Number of reports that came too late.
    stale_reports: u64,
    coverage: Coverage,
    broken: Vec<String>,
}

fn run(seed: u64, verbose: bool) -> Run {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let _ = alarms::take();
    runtime.block_on(async {
        let world = World::new(seed, verbose);
        let builds = world.with_random(|random| random.u32(5..8));
        let clients = tokio::spawn(clients::request(Arc::clone(&world), builds));
        disturb(&world, DISTURBED).await;
        let _ = clients.await;
        let begun = Instant::now();
        let is_settled = timeout(SETTLED_WITHIN, until_all_ended(&world, builds)).await.is_ok();
        if is_settled {
            // Lets heartbeats get through again.
            sleep(Duration::from_secs(3)).await;
            lock(&world.rules).is_calm = true;
            probes::require_health(&world, builds).await;
        }
        let mut broken = std::mem::take(&mut lock(&world.rules).broken);
        if !is_settled {
            let rules = lock(&world.rules);
            broken.push(format!("not over {:?} after the last fault: {rules:#?}", begun.elapsed()));
        }
        broken.extend(alarms::take());
        let stale_reports = lock(&world.rules).stale_reports;
        let coverage = std::mem::take(&mut *lock(&world.coverage));
        let run = Run {
            events: world.events.load(Ordering::Relaxed),
            digest: world.digest(),
            stale_reports,
            coverage,
            broken,
        };
        faults::end(&world);
        run
    })
}

/// Waits until every build has ended and no engine runs any.
async fn until_all_ended(world: &World, builds: u32) {
    let is_over = || {
        let rules = lock(&world.rules);
        rules.rows().len() == builds as usize && rules.are_all_final() && rules.running() == 0
    };
    while !is_over() {
        sleep(Duration::from_millis(250)).await;
    }
}

#[test]
fn every_build_ends_once_and_says_why_whatever_fails() {
    if let Some(seed) = std::env::var("TRAILER_TEST_SEED").ok().and_then(|seed| seed.parse().ok()) {
        alarms::listen();
        let run = run(seed, true);
        assert!(run.broken.is_empty(), "seed {seed}: {:#?}", run.broken);
        return;
    }
    let seeds =
        std::env::var("TRAILER_TEST_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    alarms::listen();
    let begun = std::time::Instant::now();
    let next = AtomicU64::new(1);
    let coverage = Mutex::new(Coverage::new());
    let events = AtomicU64::new(0);
    let stale_reports = AtomicU64::new(0);
    let fewest = AtomicU64::new(u64::MAX);
    let broken = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > seeds || lock(&broken).len() > 4 {
                        return;
                    }
                    let run = run(seed, false);
                    events.fetch_add(run.events, Ordering::Relaxed);
                    stale_reports.fetch_add(run.stale_reports, Ordering::Relaxed);
                    fewest.fetch_min(run.events, Ordering::Relaxed);
                    for (cell, count) in run.coverage {
                        *lock(&coverage).entry(cell).or_default() += count;
                    }
                    if !run.broken.is_empty() {
                        lock(&broken).insert(seed, run.broken);
                    }
                }
            });
        }
    });
    let broken = lock(&broken);
    for (seed, rules) in broken.iter() {
        println!("TRAILER_TEST_SEED={seed} shows:\n{}", rules.join("\n"));
    }
    println!(
        "{seeds} seeds, {events:?} events, at least {fewest:?} each, {stale_reports:?} reports too late, in {:?}",
        begun.elapsed()
    );
    let coverage = lock(&coverage);
    print_coverage(&coverage);
    assert!(broken.is_empty(), "failing seeds: {:?}", broken.keys());
    assert!(fewest.load(Ordering::Relaxed) >= MIN_EVENTS, "a run had only {fewest:?} events");
    if seeds >= SEEDS {
        let missed: Vec<_> = cells().filter(|cell| !coverage.contains_key(cell)).collect();
        assert!(missed.is_empty(), "these have never met: {missed:?}");
        assert_ne!(stale_reports.into_inner(), 0, "no report came too late");
    }
}

#[test]
fn a_seed_is_always_the_same_run() {
    for seed in 1..=20 {
        let (first, second) = (run(seed, false), run(seed, false));
        assert_eq!((first.events, first.digest), (second.events, second.digest), "seed {seed}");
    }
}

/// Transitions that cannot occur.
///
/// A worker reports the start of an attempt before anything else of it, and an attempt that has not started
/// is handed back rather than lost.
const UNREACHABLE: [&str; 4] = [
    "Failed(User) in Claimed",
    "Failed(Timeout) in Claimed",
    "Failed(Infrastructure) in Claimed",
    "Lost in Claimed",
];

fn rows() -> impl Iterator<Item = String> {
    let transitions = image_service::simulation::transitions().into_iter();
    transitions.filter(|transition| !UNREACHABLE.contains(&transition.as_str()))
}

fn cells() -> impl Iterator<Item = (String, Fault)> {
    rows().flat_map(|transition| Fault::ALL.map(|fault| (transition.clone(), fault)))
}

fn print_coverage(coverage: &Coverage) {
    println!("{:36}{}", "", Fault::ALL.map(|fault| format!("{fault:?} ")).concat());
    for transition in rows() {
        let counts = Fault::ALL.map(|fault| {
            let count = coverage.get(&(transition.clone(), fault)).copied().unwrap_or(0);
            format!("{count:>width$} ", width = format!("{fault:?}").len())
        });
        println!("{transition:36}{}", counts.concat());
    }
}
