//! Tests of the reasons why builds wait, by table.

use std::time::Duration;

use super::*;
use crate::{
    access::{Identity, Pools},
    build::{Job, Kind},
    image::{ImageId, Reference, Requirements},
};

const NOW: Timestamp = Timestamp::from_micros(1_000_000_000);

fn worker(name: &str) -> Worker {
    Worker {
        name: name.to_owned(),
        labels: BTreeMap::from([("disk".to_owned(), "ssd".to_owned())]),
        slots: 1,
        slots_taken: 0,
        engine_version: String::new(),
        capabilities: BTreeSet::from([Capability::Dockerfile]),
        pools: Pools::default(),
        session: None,
        online: true,
        connected_at: NOW,
        heard_at: NOW,
        drained: false,
        draining: false,
        protocol_version: 0,
        unsupported_reason: String::new(),
        withheld: Vec::new(),
        engine_warning: String::new(),
    }
}

/// Returns a build that is pinned to a worker, unless `pin` is empty.
fn build(pin: &str) -> Build {
    let requirements = Requirements {
        worker: pin.to_owned(),
        labels: BTreeMap::from([("disk".to_owned(), "ssd".to_owned())]),
        capabilities: BTreeSet::from([Capability::Dockerfile]),
    };
    let job = Job {
        kind: Kind::Build,
        creator: "alice".to_owned(),
        configuration_revision: 1,
        reference: Reference::new("trailer/a", "").expect("a reference"),
        requirements,
        preferred_worker: None,
        workspace: None,
    };
    Build::queued(ImageId::new(), 1, alice(), job, NOW)
}

#[test]
fn a_build_waits_for_the_nearest_of_the_workers_that_suit_it() {
    let idle = worker("idle");
    let busy = Worker { slots_taken: 1, ..worker("busy") };
    let drained = Worker { drained: true, slots_taken: 1, ..worker("drained") };
    let draining = Worker { draining: true, ..worker("draining") };
    let unsupported = Worker { unsupported_reason: "too old".to_owned(), drained: true, ..worker("old") };
    let offline = Worker { online: false, ..worker("offline") };
    let unlabelled = Worker { labels: BTreeMap::new(), ..worker("unlabelled") };
    let unable = Worker { capabilities: BTreeSet::new(), ..worker("unable") };
    let by_distance = [
        (&idle, PendingReason::Dispatching),
        (&busy, PendingReason::AllSlotsTaken),
        (&drained, PendingReason::WorkersDraining),
        (&draining, PendingReason::WorkersDraining),
        (&unsupported, PendingReason::WorkersUnsupported),
        (&unlabelled, PendingReason::NoSuitableWorker),
        (&unable, PendingReason::NoSuitableWorker),
        (&offline, PendingReason::NoWorkerOnline),
    ];
    for (place, (worker, reason)) in by_distance.into_iter().enumerate() {
        assert_eq!(
            pending_reason(&build(""), std::slice::from_ref(worker), &RunningBuilds::default(), NOW),
            reason,
            "{}",
            worker.name
        );
        // Workers that are further away change nothing.
        let with_others: Vec<Worker> =
            by_distance[place..].iter().rev().map(|(worker, _)| (*worker).clone()).collect();
        assert_eq!(
            pending_reason(&build(""), &with_others, &RunningBuilds::default(), NOW),
            reason,
            "{} first",
            worker.name
        );
    }
    assert_eq!(
        pending_reason(&build(""), &[], &RunningBuilds::default(), NOW),
        PendingReason::NoWorkerOnline
    );
    let all: Vec<Worker> = by_distance.into_iter().map(|(worker, _)| worker.clone()).collect();
    assert_eq!(
        pending_reason(&build("busy"), &all, &RunningBuilds::default(), NOW),
        PendingReason::AllSlotsTaken
    );
    for pin in ["offline", "nobody", "unable"] {
        assert_eq!(
            pending_reason(&build(pin), &all, &RunningBuilds::default(), NOW),
            PendingReason::NoSuitableWorker,
            "{pin}"
        );
    }
    assert_eq!(
        pending_reason(&build("w1"), &[], &RunningBuilds::default(), NOW),
        PendingReason::NoSuitableWorker
    );
}

#[test]
fn a_build_that_backs_off_waits_for_no_worker() {
    let mut build = build("");
    build.not_before = Some(NOW.after(Duration::from_secs(1)));
    assert_eq!(
        pending_reason(&build, &[worker("w1")], &RunningBuilds::default(), NOW),
        PendingReason::BackingOff
    );
    assert_eq!(
        pending_reason(&build, &[worker("w1")], &RunningBuilds::default(), NOW.after(Duration::from_secs(1))),
        PendingReason::Dispatching
    );
}

fn alice() -> Identity {
    Identity::new("alice".to_owned(), Vec::new())
}
