//! When nothing goes wrong any more, every worker does what it should, and at once.

use std::{collections::BTreeMap, time::Duration};

use build_worker::simulation::{Outcome, Plan};
use image_service::simulation::{Row, Wish};
use tokio::time::{sleep, timeout};

use crate::{
    clients,
    world::{WORKERS, World, build_of, lock},
};

/// In which time a worker that lives is connected again, begins a build of two lines, and ends it.
const DONE_WITHIN: Duration = Duration::from_secs(20);
/// In which time a cancel is confirmed.
const CANCELLED_WITHIN: Duration = Duration::from_secs(6);

/// Lets each worker do a build, and one cancel a build that would never end. `first` is the number of the first of these.
pub(crate) async fn require_health(world: &World, first: u32) {
    let plan = Plan {
        lines: 2,
        pace: Duration::from_millis(50),
        outcome: Outcome::Succeeds,
        dies_after: Duration::from_millis(300),
    };
    let wish =
        |worker| Wish { requester: "probe", worker, labels: BTreeMap::new(), time_limit: None, push: false };
    let hanging = first + 3;
    for (number, worker) in (first..hanging).zip(WORKERS) {
        clients::enqueue(world, number, plan, wish(worker)).await;
    }
    for number in first..hanging {
        let is_done = |row: &Row| row.state == "Succeeded" && row.failures == 0;
        require(world, number, DONE_WITHIN, "a healthy worker does its build", is_done).await;
    }
    clients::enqueue(world, hanging, Plan { outcome: Outcome::Hangs, ..plan }, wish("")).await;
    let is_running = |row: &Row| row.state == "Running";
    require(world, hanging, DONE_WITHIN, "a healthy worker begins a build", is_running).await;
    clients::cancel(world, hanging).await;
    let is_cancelled = |row: &Row| row.state == "Cancelled" && row.stop_confirmed;
    require(world, hanging, CANCELLED_WITHIN, "a healthy worker stops a build", is_cancelled).await;
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
