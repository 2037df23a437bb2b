//! Faults: which, when, and for how long.

use std::{sync::Arc, time::Duration};

use image_service::simulation::CommitOutcome;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    host::Host,
    world::{Fault, REPLICAS, WORKERS, World, lock},
};

/// Injects faults for `lasts`, one after another and several at once, and then ends them all.
pub(crate) async fn disturb(world: &Arc<World>, lasts: Duration) {
    let mut disturbances = JoinSet::new();
    let _ = timeout(lasts, begin_disturbances(world, &mut disturbances)).await;
    world.healed.cancel();
    world.fail_store(CommitOutcome::Done, Duration::ZERO);
    world.tear_spools(Duration::ZERO);
    disturbances.join_all().await;
}

async fn begin_disturbances(world: &Arc<World>, disturbances: &mut JoinSet<()>) {
    loop {
        sleep(world.millis(100, 3_000)).await;
        let fault = world.with_random(|random| Fault::ALL[random.usize(0..Fault::ALL.len())]);
        // Mostly shorter than a worker can go without the service, sometimes longer than any lease.
        let lasts = world.with_random(|random| match random.u8(0..8) {
            0..3 => Duration::from_millis(random.u64(50..3_000)),
            3..6 => Duration::from_millis(random.u64(3_000..14_000)),
            _ => Duration::from_millis(random.u64(14_000..40_000)),
        });
        let worker = world.with_random(|random| WORKERS[random.usize(0..WORKERS.len())]);
        let host = lock(&world.hosts).get(worker).cloned();
        let (Some(host), world) = (host, Arc::clone(world)) else { continue };
        disturbances.spawn(async move { happen(&world, fault, lasts, worker, &host).await });
    }
}

async fn happen(world: &Arc<World>, fault: Fault, lasts: Duration, worker: &'static str, host: &Arc<Host>) {
    let index = world.with_random(|random| random.usize(0..REPLICAS));
    let running = lock(&world.replicas)[index].clone();
    match fault {
        Fault::ServiceKilled | Fault::ServiceShutDown => {
            let Some(running) = running else { return };
            world.note(fault, lasts);
            if fault == Fault::ServiceShutDown {
                running.replica.shut_down();
                world.last(Duration::from_millis(1_500)).await;
            }
            lock(&world.replicas)[index] = None;
            running.process.kill();
            world.last(lasts).await;
            if lock(&world.replicas)[index].is_none() {
                world.start_replica(index);
            }
        }
        Fault::ServiceSuspended => {
            let Some(running) = running else { return };
            world.note(fault, lasts);
            running.process.suspend();
            world.last(lasts).await;
            running.process.resume();
        }
        Fault::WorkerKilled | Fault::WorkerShutDown => {
            let process = lock(&host.process).clone();
            if process.is_killed() {
                return;
            }
            world.note(fault, lasts);
            if fault == Fault::WorkerShutDown {
                lock(&host.shutdown).cancel();
                world.last(Duration::from_secs(45)).await;
            }
            if process.is_killed() {
                return;
            }
            world.excuse(worker, true);
            process.kill();
            world.last(lasts).await;
            world.excuse(worker, false);
            host.start();
        }
        Fault::WorkerSuspended => {
            let process = lock(&host.process).clone();
            if process.is_killed() {
                return;
            }
            world.note(fault, lasts);
            world.excuse(worker, true);
            process.suspend();
            world.last(lasts).await;
            process.resume();
            // It may be about to start a build that it no longer owns, and needs time to find out.
            let caught_up = Duration::from_secs(12);
            sleep(caught_up).await;
            if process.has_run_for(caught_up) {
                lock(&world.rules).require_caught_up(worker);
            }
            world.excuse(worker, false);
        }
        Fault::WorkerDrained => {
            world.note(fault, lasts);
            for drained in [true, false] {
                while !drain(world, worker, drained).await {
                    sleep(Duration::from_millis(300)).await;
                }
                world.last(lasts).await;
            }
        }
        Fault::EngineKilled => {
            world.note(fault, lasts);
            host.engine.kill();
            world.last(lasts).await;
            host.engine.start();
        }
        Fault::EngineSuspended => {
            world.note(fault, lasts);
            host.engine.suspend();
            world.last(lasts).await;
            host.engine.resume();
        }
        // Decided by `cancel_delay` when a build starts.
        Fault::EngineStuck => {}
        Fault::LinkStalled => {
            world.note(fault, lasts);
            // One direction, or both and then one of them for longer.
            let (longer, shorter) = world.with_random(|random| {
                let mut directions = [&host.to_service, &host.to_worker];
                random.shuffle(&mut directions);
                (directions[0], random.bool().then_some(directions[1]))
            });
            longer.set(true);
            if let Some(shorter) = shorter {
                shorter.set(true);
                // Late messages do most harm when they arrive shortly before the worker gives up its work.
                let until = lasts.min(world.millis(4_000, 8_000));
                world.last(until).await;
                shorter.set(false);
                world.last(lasts - until).await;
            } else {
                world.last(lasts).await;
            }
            longer.set(false);
        }
        Fault::LinkCut => {
            world.note(fault, lasts);
            if let Some(cut) = lock(&host.cut).take() {
                cut.cancel();
            }
            world.last(lasts).await;
            lock(&host.cut).get_or_insert_default();
        }
        Fault::CommitLost => {
            world.note(fault, lasts);
            world.fail_store(CommitOutcome::Lost, lasts);
        }
        Fault::CommitAmbiguous => {
            world.note(fault, lasts);
            world.fail_store(CommitOutcome::Ambiguous, lasts);
        }
        Fault::ClockJumped => {
            world.note(fault, Duration::from_secs(15));
            // Forward by no more than the margin of the service's timeouts over the worker's.
            let by = world.with_random(|random| random.i64(-15_000_000..1_000_000));
            world.move_clock(by);
        }
        Fault::SpoolTorn => {
            world.note(fault, lasts);
            world.tear_spools(lasts);
        }
    }
}

async fn drain(world: &World, worker: &str, drained: bool) -> bool {
    let Some(running) = world.any_replica() else { return false };
    running.replica.drain_worker(worker, drained).await
}

/// Kills every process, so that nothing of the world is left.
pub(crate) fn end(world: &Arc<World>) {
    for running in lock(&world.replicas).drain(..).flatten() {
        running.process.kill();
    }
    for (_, host) in std::mem::take(&mut *lock(&world.hosts)) {
        lock(&host.process).kill();
    }
}
