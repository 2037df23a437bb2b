//! Probes of the healthy system: after the faults, every worker does its work at once.

use std::{collections::BTreeMap, ops::RangeFrom, time::Duration};

use build_worker::simulation::{Outcome, Plan};
use image_service::simulation::{BuildRequest, Database, Row};
use tokio::time::{sleep, timeout};

use crate::{
    clients,
    world::{SLOTS, WORKERS, World, build_of, lock},
};

/// Maximum time for a worker that lives to reconnect and to run a build of two lines.
const DONE_WITHIN: Duration = Duration::from_secs(20);
/// Maximum time for a build that need not wait for its cache; shorter than the wait of one that does.
const PLACED_WITHIN: Duration = Duration::from_secs(4);
/// Maximum time until a cancel is confirmed.
const CANCELLED_WITHIN: Duration = Duration::from_secs(6);

const QUICK: Plan = Plan {
    lines: 2,
    pace: Duration::from_millis(50),
    outcome: Outcome::Succeeds,
    dies_after: Duration::from_millis(300),
};
const ENDLESS: Plan = Plan { outcome: Outcome::Hangs, ..QUICK };

fn request() -> BuildRequest {
    BuildRequest {
        requester: "probe",
        worker: "",
        preferred_worker: "",
        labels: BTreeMap::new(),
        time_limit: None,
        push: false,
    }
}

/// Checks that each worker runs builds and that a cancel stops an endless build.
///
/// `first` is the number of the first of these builds.
pub(crate) async fn require_health(world: &World, first: u32) {
    let numbers = &mut (first..);
    require_work(world, numbers).await;
    require_caches(world, numbers).await;
    require_cancel(world, numbers).await;
}

/// Checks that each worker runs a build that no other worker may take.
async fn require_work(world: &World, numbers: &mut RangeFrom<u32>) {
    let probes: Vec<u32> = numbers.take(WORKERS.len()).collect();
    for (number, worker) in probes.iter().zip(WORKERS) {
        clients::enqueue(world, *number, QUICK, BuildRequest { worker, ..request() }).await;
    }
    for number in probes {
        let is_done = |row: &Row| row.state == "Succeeded" && row.failures == 0;
        require(world, number, DONE_WITHIN, "a healthy worker does its build", is_done).await;
    }
}

/// Checks that a build goes to the worker with its cache, or elsewhere if that is busy for too long.
async fn require_caches(world: &World, numbers: &mut RangeFrom<u32>) {
    for (number, preferred_worker) in numbers.take(WORKERS.len()).zip(WORKERS) {
        clients::enqueue(world, number, QUICK, BuildRequest { preferred_worker, ..request() }).await;
        let is_done = |row: &Row| row.state == "Succeeded" && row.worker.as_deref() == Some(preferred_worker);
        require(
            world,
            number,
            DONE_WITHIN,
            "an idle worker does the build that it has the cache for",
            is_done,
        )
        .await;
    }
    let [busy, ..] = WORKERS;
    let blocking: Vec<u32> = numbers.take(usize::from(SLOTS)).collect();
    for number in &blocking {
        clients::enqueue(world, *number, ENDLESS, BuildRequest { worker: busy, ..request() }).await;
        require(world, *number, DONE_WITHIN, "a healthy worker begins a build", is_running).await;
    }
    let waiting: Vec<u32> = numbers.take(2).collect();
    for (number, preferred_worker) in waiting.iter().zip([busy, ""]) {
        clients::enqueue(world, *number, QUICK, BuildRequest { preferred_worker, ..request() }).await;
    }
    // Checks the later build first, because it has nothing to wait for.
    let within = [PLACED_WITHIN, Database::MAX_CACHE_WAIT + PLACED_WITHIN];
    let what =
        ["a build that waits for its cache holds up nobody", "a build does not wait for its cache for ever"];
    for ((number, within), what) in waiting.into_iter().rev().zip(within).zip(what) {
        let is_done = |row: &Row| row.state == "Succeeded" && row.worker.as_deref() != Some(busy);
        require(world, number, within, what, is_done).await;
    }
    for number in blocking {
        cancel(world, number).await;
    }
}

async fn require_cancel(world: &World, numbers: &mut RangeFrom<u32>) {
    for number in numbers.take(1) {
        clients::enqueue(world, number, ENDLESS, request()).await;
        require(world, number, DONE_WITHIN, "a healthy worker begins a build", is_running).await;
        cancel(world, number).await;
    }
}

fn is_running(row: &Row) -> bool {
    row.state == "Running"
}

async fn cancel(world: &World, number: u32) {
    clients::cancel(world, number).await;
    let is_cancelled = |row: &Row| row.state == "Cancelled" && row.stop_confirmed;
    require(world, number, CANCELLED_WITHIN, "a healthy worker stops a build", is_cancelled).await;
}

async fn require(world: &World, number: u32, limit: Duration, what: &str, condition: impl Fn(&Row) -> bool) {
    let row = || lock(&world.rules).rows().get(&build_of(number)).cloned();
    let fulfilled = async {
        while !row().is_some_and(|row| condition(&row)) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    if timeout(limit, fulfilled).await.is_err() {
        let message = format!("{what}, in {limit:?}: {:?}", row());
        lock(&world.rules).broken.push(message);
    }
}
