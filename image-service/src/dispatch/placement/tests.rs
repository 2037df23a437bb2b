//! Tests of placement, by table and with random queues.

use std::time::Duration;

use super::*;
use crate::{
    access::{Identity, Pools},
    build::{Job, Kind, State},
    image::{ImageId, Reference, Requirements},
};

const NOW: Timestamp = Timestamp::from_micros(1_000_000_000);

fn candidate(name: &str, free_slots: usize) -> Candidate {
    let capabilities = BTreeSet::from([Capability::Dockerfile]);
    Candidate {
        name: name.to_owned(),
        labels: BTreeMap::new(),
        capabilities,
        pools: Pools::default(),
        free_slots,
    }
}

/// Returns a build of `round` that was queued `waited` ago.
fn build(round: i64, waited: Duration) -> Build {
    let requirements = Requirements {
        worker: String::new(),
        labels: BTreeMap::new(),
        capabilities: BTreeSet::from([Capability::Dockerfile]),
    };
    let reference = Reference::new("trailer/a", "").expect("a reference");
    let job = Job {
        kind: Kind::Build,
        creator: "alice".to_owned(),
        configuration_revision: 1,
        reference,
        requirements,
        preferred_worker: None,
        workspace: None,
    };
    let mut build = Build::queued(ImageId::new(), 1, alice(), job, NOW.before(waited));
    build.round = round;
    build
}

fn pinned(round: i64, worker: &str) -> Build {
    let mut build = build(round, Duration::ZERO);
    build.requirements.worker = worker.to_owned();
    build
}

fn preferring(round: i64, worker: &str, waited: Duration) -> Build {
    Build { preferred_worker: Some(worker.to_owned()), ..build(round, waited) }
}

/// Returns the round and the worker of each placement.
fn placed(queued: &[Build], candidates: &[Candidate], limit: usize) -> Vec<(i64, String)> {
    let placements = place(queued, candidates, &mut RunningBuilds::default(), NOW, limit);
    placements.into_iter().map(|placement| (placement.build.round, placement.worker)).collect()
}

fn pairs(expected: &[(i64, &str)]) -> Vec<(i64, String)> {
    expected.iter().map(|(round, worker)| (*round, (*worker).to_owned())).collect()
}

#[test]
fn builds_are_placed_in_the_order_of_their_turn() {
    let queued = [3, 1, 4, 0, 2].map(|round| build(round, Duration::ZERO));
    let workers = [candidate("w1", 3)];
    assert_eq!(placed(&queued, &workers, 32), pairs(&[(0, "w1"), (1, "w1"), (2, "w1")]));
    assert_eq!(placed(&queued, &workers, 2), pairs(&[(0, "w1"), (1, "w1")]), "the limit holds");
}

#[test]
fn pins_labels_and_capabilities_are_honoured() {
    let mut labelled = build(1, Duration::ZERO);
    labelled.requirements.labels.insert("zone".to_owned(), "north".to_owned());
    let mut squashed = build(2, Duration::ZERO);
    squashed.requirements.capabilities.insert(Capability::Squash);
    let (mut north, mut squashes) = (candidate("north", 1), candidate("squashes", 1));
    north.labels.insert("zone".to_owned(), "north".to_owned());
    squashes.capabilities.insert(Capability::Squash);
    let workers = [candidate("any", 9), north, squashes, candidate("pin", 1)];
    let queued = [pinned(0, "pin"), labelled, squashed, pinned(3, "absent"), build(4, Duration::ZERO)];
    let expected = [(0, "pin"), (1, "north"), (2, "squashes"), (4, "any")];
    assert_eq!(placed(&queued, &workers, 32), pairs(&expected));
}

#[test]
fn the_worker_with_the_cache_is_preferred_for_a_bounded_time() {
    let (soon, late) = (Duration::from_secs(1), Build::MAX_CACHE_WAIT);
    let mut elsewhere = candidate("cached", 1);
    elsewhere.capabilities.clear();
    let table = [
        ("it has a free slot", candidate("cached", 1), soon, Some("cached")),
        ("it has a free slot after the wait, too", candidate("cached", 1), late, Some("cached")),
        ("it is busy", candidate("cached", 0), soon, None),
        ("the wait is over", candidate("cached", 0), late, Some("free")),
        ("it is gone", candidate("other", 0), soon, Some("free")),
        ("it does not suit any more", elsewhere, soon, Some("free")),
    ];
    for (what, cached, waited, expected) in table {
        let workers = [candidate("free", 7), cached];
        let expected: Vec<_> = expected.into_iter().map(|worker| (0, worker)).collect();
        assert_eq!(placed(&[preferring(0, "cached", waited)], &workers, 32), pairs(&expected), "{what}");
    }
}

#[test]
fn the_wait_begins_when_a_build_may_be_claimed() {
    let workers = [candidate("cached", 0), candidate("free", 1)];
    let mut build = preferring(0, "cached", Duration::from_secs(60));
    for (not_before, expected) in [
        (NOW.before(Duration::from_secs(1)), None),
        (NOW.before(Build::MAX_CACHE_WAIT), Some("free")),
        // Set before the clock was set back.
        (NOW.after(Duration::from_secs(100)), Some("free")),
    ] {
        build.not_before = Some(not_before);
        let expected: Vec<_> = expected.into_iter().map(|worker| (0, worker)).collect();
        assert_eq!(placed(&[build.clone()], &workers, 32), pairs(&expected), "{not_before:?}");
    }
}

#[test]
fn a_build_that_waits_for_its_cache_holds_up_nobody() {
    let soon = Duration::from_secs(1);
    let queued =
        [preferring(0, "cached", soon), preferring(1, "cached", soon), build(2, soon), pinned(3, "cached")];
    let expected = pairs(&[(0, "cached"), (2, "free")]);
    assert_eq!(placed(&queued, &[candidate("cached", 1), candidate("free", 1)], 32), expected);
    // The slot goes to the build whose turn it is, rather than to the build that waits for it.
    let queued = [pinned(0, "cached"), preferring(1, "cached", soon)];
    let expected = pairs(&[(0, "cached")]);
    assert_eq!(placed(&queued, &[candidate("cached", 1), candidate("free", 1)], 32), expected);
}

#[test]
fn builds_spread_evenly_over_equal_workers() {
    let workers = ["a", "b", "c", "d"].map(|name| candidate(name, 8));
    let given = |queued: &[Build]| {
        let mut given = BTreeMap::<String, usize>::new();
        for (_, worker) in placed(queued, &workers, 32) {
            *given.entry(worker).or_default() += 1;
        }
        given.into_values().collect::<Vec<_>>()
    };
    let queued: Vec<Build> = (0..32).map(|round| build(round, Duration::ZERO)).collect();
    assert_eq!(given(&queued[..4]), [1; 4]);
    assert_eq!(given(&queued[..20]), [5; 4]);
    assert_eq!(given(&queued), [8; 4]);
    // One build at a time, while all workers are idle.
    let mut given = BTreeMap::<String, u32>::new();
    for build in (0..4_000).map(|round| build(round, Duration::ZERO)) {
        for (_, worker) in placed(&[build], &workers, 32) {
            *given.entry(worker).or_default() += 1;
        }
    }
    assert!(given.len() == 4 && given.values().all(|count| (850..1_150).contains(count)), "{given:?}");
}

/// Generates a random queue and random workers.
fn draw(random: &mut fastrand::Rng) -> (Vec<Build>, Vec<Candidate>) {
    let workers = (0..random.usize(1..6)).map(|number| {
        let mut worker = candidate(&format!("w{number}"), random.usize(0..4));
        if random.bool() {
            worker.labels.insert("zone".to_owned(), "north".to_owned());
        }
        worker
    });
    let workers: Vec<_> = workers.collect();
    let queued = (0..random.i64(0..40)).map(|_| {
        let mut build = build(random.i64(0..8), Duration::from_millis(random.u64(0..10_000)));
        match random.u8(0..8) {
            0 => build.requirements.worker = format!("w{}", random.u8(0..7)),
            1 => drop(build.requirements.labels.insert("zone".to_owned(), "north".to_owned())),
            2..6 => build.preferred_worker = Some(format!("w{}", random.u8(0..7))),
            _ => {}
        }
        if random.u8(0..8) == 0 {
            build.not_before =
                Some(NOW.before(Duration::from_secs(3)).after(Duration::from_secs(random.u64(0..6))));
        }
        build
    });
    (queued.collect(), workers)
}

#[test]
fn no_requester_starves_and_every_worker_suits_its_builds() {
    let mut random = fastrand::Rng::with_seed(1);
    for number in 0..3_000 {
        let (queued, workers) = draw(&mut random);
        let limit = random.usize(1..34);
        let placements = place(&queued, &workers, &mut RunningBuilds::default(), NOW, limit);
        assert!(placements.len() <= limit, "case {number}");
        let mut left = workers;
        let mut turns = Vec::new();
        for Placement { build, worker } in &placements {
            let worker =
                left.iter_mut().find(|candidate| candidate.name == *worker).expect("it is one of them");
            assert!(worker.free_slots > 0, "case {number}: {} has no free slot", worker.name);
            assert!(worker.suits(build) && !build.is_backing_off(NOW), "case {number}: {build:?}");
            assert_eq!(build.state, State::Queued);
            worker.free_slots -= 1;
            turns.push(build.turn());
        }
        assert!(turns.is_sorted_by(|one, next| one < next), "case {number}: each once, in its turn");
        if placements.len() == limit {
            continue;
        }
        // Slots only become fewer, so a slot that is free now was free at each turn.
        for build in queued.iter().filter(|build| !turns.contains(&build.turn())) {
            let prefers = |candidate: &&Candidate| build.preferred_worker.as_ref() == Some(&candidate.name);
            let may_wait = build.may_wait_for_cache(NOW)
                && left.iter().any(|candidate| prefers(&candidate) && candidate.suits(build));
            let is_free = left.iter().any(|candidate| {
                candidate.free_slots > 0 && candidate.suits(build) && (!may_wait || prefers(&candidate))
            });
            assert!(!is_free || build.is_backing_off(NOW), "case {number}: {build:?} starves");
        }
    }
}

fn alice() -> Identity {
    Identity::new("alice".to_owned(), Vec::new())
}
