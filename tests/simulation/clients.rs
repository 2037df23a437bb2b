//! Requests of clients, each repeated until it is answered.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use build_worker::simulation::{Outcome, Plan};
use image_service::simulation::BuildRequest;
use tokio::time::sleep;

use crate::world::{RunningReplica, WORKERS, World, build_of, lock, zone_of};

/// Enqueues builds, and cancels or deletes some of them.
pub(crate) async fn request(world: Arc<World>, builds: u32) {
    for number in 0..builds {
        sleep(world.millis(0, 8_000)).await;
        let (plan, request) = any(&world);
        enqueue(&world, number, plan, request).await;
        let action = world.with_random(|random| random.u8(0..6));
        let after = world.millis(0, 15_000);
        let world = Arc::clone(&world);
        match action {
            0 => tokio::spawn(async move {
                sleep(after).await;
                cancel(&world, number).await;
            }),
            1 => tokio::spawn(async move {
                sleep(after).await;
                delete(&world, number).await;
            }),
            _ => continue,
        };
    }
}

/// Returns a random build that a client may want.
fn any(world: &World) -> (Plan, BuildRequest) {
    let mut plan = world.with_random(|random| Plan {
        lines: random.u32(1..25),
        pace: Duration::from_millis(random.u64(20..1_000)),
        outcome: match random.u8(0..20) {
            0..13 => Outcome::Succeeds,
            13 | 14 => Outcome::RefusesPush,
            15 | 16 => Outcome::Fails,
            17 => Outcome::Breaks,
            _ => Outcome::Hangs,
        },
        dies_after: Duration::from_millis(random.u64(0..1_500)),
    });
    let mut request = BuildRequest {
        requester: world.with_random(|random| ["alice", "bob"][random.usize(0..2)]),
        worker: world
            .with_random(|random| if random.u8(0..4) == 0 { WORKERS[random.usize(0..3)] } else { "" }),
        preferred_worker: "",
        labels: BTreeMap::new(),
        time_limit: None,
        push: plan.outcome == Outcome::RefusesPush || world.with_random(|random| random.u8(0..4) == 0),
    };
    if request.worker.is_empty() && world.with_random(|random| random.u8(0..4) == 0) {
        request.labels.extend([zone_of(world.with_random(|random| WORKERS[random.usize(0..3)]))]);
    }
    if request.worker.is_empty() && world.with_random(|random| random.u8(0..3) == 0) {
        request.preferred_worker = world.with_random(|random| WORKERS[random.usize(0..3)]);
    }
    // A build that hangs needs a time limit. Some others get one of about the time that they need.
    if plan.outcome == Outcome::Hangs {
        plan.lines = plan.lines.min(3);
        request.time_limit = Some(world.millis(3_000, 25_000));
    } else if world.with_random(|random| random.u8(0..5) == 0) {
        let needed = plan.pace * plan.lines + Duration::from_millis(20);
        request.time_limit = Some((needed + world.millis(0, 100)).max(Duration::from_secs(1)));
    }
    if lock(&world.rules).may_wait_too_long && world.with_random(|random| random.u8(0..6) == 0) {
        request.worker = "nobody";
    }
    (plan, request)
}

pub(crate) async fn enqueue(world: &World, number: u32, plan: Plan, request: BuildRequest) {
    let build = build_of(number);
    lock(&world.rules).want(build, plan, request.clone());
    let request = &request;
    insist(world, Duration::from_millis(200), move |running| async move {
        running.replica.enqueue(build, request).await
    })
    .await;
}

pub(crate) async fn cancel(world: &World, number: u32) {
    let build = build_of(number);
    lock(&world.rules).unwant(build);
    insist(
        world,
        Duration::from_millis(300),
        move |running| async move { running.replica.cancel(build).await },
    )
    .await;
}

async fn delete(world: &World, number: u32) {
    let build = build_of(number);
    lock(&world.rules).unwant(build);
    insist(
        world,
        Duration::from_millis(300),
        move |running| async move { running.replica.delete(build).await },
    )
    .await;
}

/// Asks random replicas until one answers.
async fn insist<A: Future<Output = bool>>(
    world: &World,
    pause: Duration,
    call: impl Fn(Arc<RunningReplica>) -> A,
) {
    loop {
        if let Some(running) = world.any_replica()
            && call(running).await
        {
            return;
        }
        sleep(pause).await;
    }
}
