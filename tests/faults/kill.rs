//! Workers and engines killed during a build, which restarts without leftovers of the old attempt.

use std::time::{Duration, Instant};

use proto::images::{Build, BuildState};
use rustix::process::Signal;

use crate::{
    answers::lines,
    client::{Client, image},
    docker_engine::{BASE, Engine},
    eventually::eventually_true,
    stack::{SHORT_LEASE, Service, Worker, counted, counting, directory, ended, last_attempt, watch},
};

/// Time after which a silent worker loses its builds with `SHORT_LEASE`.
const SHORT_LEASE_ENDS: Duration = Duration::from_secs(7);
/// Maximum time until the remains of a build are gone.
const GONE: Duration = Duration::from_secs(10);

/// Creates an image with a step that would outlast any test.
async fn sleepy(alice: &Client) -> anyhow::Result<(String, Build)> {
    let unique = uuid::Uuid::new_v4().simple();
    let text = format!("FROM {BASE}\nENV UNIQUE={unique}\nRUN echo begun; /bin/busybox sleep 300");
    let (image, build) = alice.create(image("Sleepy", &text)).await?;
    Ok((image.id, build))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_leaves_nothing_running_and_begins_anew() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (asleep, sleeping) = sleepy(&alice).await?;
    // Runs until both builds are known to have started, because a build that has ended is not restarted.
    let (_, build) = alice.create(image("Counting", &counting(60, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    for build in [&sleeping, &build] {
        alice.until(&build.id, |build| build.log_bytes > 0).await?;
    }
    engine.runs("sleep 300").await?;
    worker.kill()?;
    let gone = engine.runs_nothing().await?;
    assert!(gone < GONE, "{gone:?}");

    let begun = Instant::now();
    worker.start_again()?;
    let again = alice.until(&sleeping.id, |build| build.attempt == 2).await?;
    assert!(begun.elapsed() < GONE, "without waiting for the lease: {:?}", begun.elapsed());
    assert_eq!(again.failures, 1);
    let events = ended(watching, GONE * 3).await?;
    assert_eq!(lines(last_attempt(&events)), counted(60));
    let counted = alice.get_build(&build.id).await?;
    assert_eq!((counted.state(), counted.attempt, counted.failures), (BuildState::Succeeded, 2, 1));
    engine.runs("sleep 300").await?;
    alice.cancel(&asleep).await?;
    let cancelled = alice.finished(&sleeping.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert_eq!(engine.step_processes(), []);
    assert_eq!(engine.tags_with("trailer.invalid/attempt/").await?, [""; 0]);
    Ok(())
}

/// Checks that a worker ends a step that the engine started for its predecessor of the same name.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_while_a_step_starts_leaves_nothing_to_the_next() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &["--retry-backoff=0"]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    for moment in 0..6 {
        let (asleep, sleeping) = sleepy(&alice).await?;
        alice.until(&sleeping.id, |build| build.state() == BuildState::Running).await?;
        tokio::time::sleep(Duration::from_millis(20) * moment).await;
        worker.kill()?;
        // The engine has finished whatever it was doing by now.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = engine.step_processes();
        worker.start_again()?;
        alice.until(&sleeping.id, |build| build.attempt == 2 && build.log_bytes > 0).await?;
        assert!(engine.step_processes().iter().all(|process| !before.contains(process)), "{before:?}");
        alice.cancel(&asleep).await?;
        let cancelled = alice.finished(&sleeping.id).await?;
        assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
        assert_eq!(engine.step_processes(), []);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_killed_leaves_nothing_running() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let mut engine = Engine::start(directory.path(), "e1").await?;
    let _worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (asleep, sleeping) = sleepy(&alice).await?;
    engine.runs("sleep 300").await?;
    engine.kill()?;
    let before = engine.step_processes();
    let waiting = alice.until(&sleeping.id, |build| build.failures == 1).await?;
    assert!(matches!(waiting.state(), BuildState::Queued | BuildState::Claimed), "{waiting:?}");
    engine.start_again().await?;
    engine.answers().await?;
    let begun = Instant::now();
    eventually_true("what ran before is gone", async || {
        Ok(engine.step_processes().iter().all(|process| !before.contains(process)))
    })
    .await?;
    assert!(begun.elapsed() < GONE, "{:?}", begun.elapsed());
    engine.runs("sleep 300").await?;
    alice.cancel(&asleep).await?;
    let cancelled = alice.finished(&sleeping.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert_eq!(engine.step_processes(), []);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn orphans_of_an_engine_are_killed_when_a_worker_starts() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &SHORT_LEASE).await?;
    let alice = service.builder("alice");
    let mut engine = Engine::start(directory.path(), "e1").await?;
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (asleep, sleeping) = sleepy(&alice).await?;
    engine.runs("sleep 300").await?;
    // Like a host that fails: neither process notices that the other ended.
    worker.pause()?;
    engine.kill()?;
    worker.kill()?;
    let begun = Instant::now();
    alice.cancel(&asleep).await?;
    // Nothing can confirm the stop, so the build ends when the lease does.
    let cancelled = alice.finished(&sleeping.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, false));
    assert!(begun.elapsed() < SHORT_LEASE_ENDS + Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(!engine.step_processes().is_empty(), "nobody has ended them");
    engine.start_again().await?;
    engine.answers().await?;
    worker.start_again()?;
    let gone = engine.runs_nothing().await?;
    assert!(gone < GONE, "{gone:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn terminated_programs_finish_what_they_do() -> anyhow::Result<()> {
    let directory = directory()?;
    let mut service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (_, build) = alice.create(image("Counting", &counting(40, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    alice.until(&build.id, |build| build.log_bytes > 0).await?;
    // The service exits within its grace period although streams are open, and its successor takes over.
    let begun = Instant::now();
    service.program.end(Signal::TERM).await?;
    assert!(begun.elapsed() < GONE, "{:?}", begun.elapsed());
    service.start_again()?;
    service.answers().await?;
    // The worker finishes its build and accepts no other.
    alice.until(&build.id, |build| build.state() == BuildState::Running).await?;
    worker.program.signal(Signal::TERM)?;
    let (_, next) = alice.create(image("Next", &counting(1, "0"))).await?;
    let events = ended(watching, GONE * 3).await?;
    assert_eq!(lines(&events), counted(40));
    let counted = alice.get_build(&build.id).await?;
    assert_eq!((counted.state(), counted.attempt, counted.failures), (BuildState::Succeeded, 1, 0));
    worker.program.end(Signal::TERM).await?;
    let waiting = alice.get_build(&next.id).await?;
    assert_eq!((waiting.state(), waiting.failures), (BuildState::Queued, 0));
    assert_eq!(engine.step_processes(), []);
    Ok(())
}
