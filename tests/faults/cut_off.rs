//! Workers cut off from the service: briefly without effect, or so long that they lose their builds.

use std::time::{Duration, Instant};

use proto::images::{Build, BuildState};

use crate::{
    answers::lines,
    client::{Client, image},
    docker_engine::Engine,
    eventually::eventually_true,
    proxy::Proxy,
    stack::{LIMIT, SHORT_LEASE, Service, Worker, counted, counting, directory, ended, last_attempt, watch},
};

/// Maximum time for a worker to stop builds that it no longer owns.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Checks that `w2` has built the image, and that the engine that lost the build has no trace of it.
async fn built_elsewhere(
    alice: &Client,
    build: &Build,
    loser: &Engine,
    winner: &Engine,
) -> anyhow::Result<()> {
    let finished = alice.get_build(&build.id).await?;
    assert_eq!((finished.state(), finished.worker.as_str()), (BuildState::Succeeded, "w2"), "{finished:?}");
    let image = alice.get(&build.image_id).await?;
    let reference = image.reference.clone();
    let artifact = image.artifact.expect("an artifact");
    assert_eq!(artifact.worker, "w2");
    assert_eq!(winner.image_id(&reference).await, Some(artifact.image_id));
    assert_eq!(loser.image_id(&reference).await, None, "a fenced attempt moves no tag");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_cut_off_for_a_while_loses_nothing() -> anyhow::Result<()> {
    const COUNT: u32 = 250;
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let mut running = Vec::new();
    for name in ["stalled", "cut"] {
        let engine = Engine::start(directory.path(), &format!("e-{name}")).await?;
        let proxy = Proxy::start(service.addr).await?;
        let worker = Worker::start(directory.path(), &service, proxy.addr(), name, &engine, 1)?;
        let (_, build) = alice.create(image(name, &counting(COUNT, "0.1"))).await?;
        let watching = watch(&alice, &build.id);
        let build = alice.until(&build.id, |build| build.log_bytes > 0).await?;
        assert_eq!(build.worker, name);
        running.push((engine, proxy, worker, build, watching));
    }
    running[0].1.stall(true);
    running[1].1.refuse(true);
    running[1].1.cut();
    tokio::time::sleep(Duration::from_secs(20)).await;
    running[0].1.stall(false);
    running[1].1.refuse(false);
    for (_engine, _proxy, _worker, build, watching) in running {
        let events = ended(watching, LIMIT * 2).await?;
        assert_eq!(lines(last_attempt(&events)), counted(COUNT));
        let finished = alice.get_build(&build.id).await?;
        assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_stops_its_work_before_another_begins_it() -> anyhow::Result<()> {
    const COUNT: u32 = 120;
    let directory = directory()?;
    let service = Service::start(directory.path(), &SHORT_LEASE).await?;
    let alice = service.builder("alice");
    let proxy = Proxy::start(service.addr).await?;
    let (cut, other) =
        (Engine::start(directory.path(), "e1").await?, Engine::start(directory.path(), "e2").await?);
    let _cut = Worker::start(directory.path(), &service, proxy.addr(), "w1", &cut, 1)?;
    let (_, build) = alice.create(image("Counting", &counting(COUNT, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    alice.until(&build.id, |build| build.log_bytes > 0).await?;
    let _other = Worker::start(directory.path(), &service, service.addr, "w2", &other, 1)?;
    // Its reports of this time arrive after the stall, too late.
    proxy.stall(true);
    let mut last_here = Instant::now();
    let mut first_there = None;
    eventually_true("another worker does it", async || {
        let now = Instant::now();
        if !cut.step_processes().is_empty() {
            last_here = now;
        }
        if first_there.is_none() && !other.step_processes().is_empty() {
            first_there = Some(now);
        }
        Ok(first_there.is_some_and(|first| first.elapsed() > AT_ONCE))
    })
    .await?;
    assert!(Some(last_here) < first_there, "both ran at a time");
    proxy.stall(false);
    let events = ended(watching, LIMIT * 2).await?;
    assert_eq!(lines(last_attempt(&events)), counted(COUNT), "late reports are refused");
    let finished = alice.get_build(&build.id).await?;
    assert_eq!((finished.attempt, finished.failures), (2, 1));
    built_elsewhere(&alice, &finished, &cut, &other).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_suspended_finds_its_work_given_away() -> anyhow::Result<()> {
    const SHORT: u32 = 50;
    const LONG: u32 = 200;
    let directory = directory()?;
    let service = Service::start(directory.path(), &SHORT_LEASE).await?;
    let alice = service.builder("alice");
    let (lost, other) =
        (Engine::start(directory.path(), "e1").await?, Engine::start(directory.path(), "e2").await?);
    let suspended = Worker::start(directory.path(), &service, service.addr, "w1", &lost, 2)?;
    let mut builds = Vec::new();
    // Meanwhile the engine finishes the first build, but not the second.
    for (name, count) in [("Short", SHORT), ("Long", LONG)] {
        let (_, build) = alice.create(image(name, &counting(count, "0.1"))).await?;
        let watching = watch(&alice, &build.id);
        alice.until(&build.id, |build| build.log_bytes > 0).await?;
        builds.push((build, count, watching));
    }
    suspended.pause()?;
    let _other = Worker::start(directory.path(), &service, service.addr, "w2", &other, 2)?;
    for (build, ..) in &builds {
        alice.until(&build.id, |build| build.attempt == 2 && build.log_bytes > 0).await?;
    }
    assert!(!lost.step_processes().is_empty(), "the engine was not suspended");
    suspended.resume()?;
    let stopped = lost.runs_nothing().await?;
    assert!(stopped < AT_ONCE, "{stopped:?}");
    for (build, count, watching) in builds {
        let events = ended(watching, LIMIT * 2).await?;
        assert_eq!(lines(last_attempt(&events)), counted(count));
        let finished = alice.get_build(&build.id).await?;
        assert_eq!((finished.attempt, finished.failures), (2, 1));
        built_elsewhere(&alice, &finished, &lost, &other).await?;
    }
    assert_eq!(lost.tags_with("trailer.invalid/attempt/").await?, [""; 0]);
    Ok(())
}
