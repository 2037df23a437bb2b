//! The backoff before a build is retried after an infrastructure failure.

use std::time::{Duration, Instant, SystemTime};

use proto::{
    dispatch::{
        Attempt, Failed, FailureKind, Heartbeat, Started, connect_request::Message as ToService,
        report_event::Event,
    },
    images::{self as api, BuildState, PendingReason},
};

use crate::{
    actor::{Actor, hello},
    client::image,
    stack::Service,
};

async fn fail(actor: &mut Actor, attempt: &Attempt) -> anyhow::Result<()> {
    let failed = Failed {
        kind: FailureKind::Infrastructure.into(),
        message: "the registry does not answer".to_owned(),
        ..Failed::default()
    };
    actor.report(attempt, 1, vec![Event::Started(Started {}), Event::Failed(failed)]).await;
    actor.acknowledged().await?;
    Ok(())
}

fn retry_time(build: &api::Build) -> Option<SystemTime> {
    build.retry_time.and_then(|time| time.try_into().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_failed_waits_while_others_go_on() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retry-backoff", "6s"]).await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let (_, attempt) = actor.assignment().await?;
    fail(&mut actor, &attempt).await?;
    let waiting = alice.get_build(&build.id).await?;
    assert_eq!(
        (waiting.state(), waiting.failures, waiting.pending_reason()),
        (BuildState::Queued, 1, PendingReason::BackingOff)
    );
    let due = retry_time(&waiting).expect("it says until when it waits");
    assert!(due > SystemTime::now());

    // The build was queued first, but is passed over.
    let (_, other) = alice.create(image("B", "FROM scratch")).await?;
    actor.build_next().await?;
    assert_eq!(alice.get_build(&other.id).await?.state(), BuildState::Succeeded);
    assert!(SystemTime::now() < due, "the other one was to be done meanwhile");
    assert_eq!(alice.get_build(&build.id).await?.attempt, 1);

    // Heartbeats wake the dispatcher but change nothing.
    let (_, again) = loop {
        actor.say(ToService::Heartbeat(Heartbeat { number: 1, draining: false })).await;
        match tokio::time::timeout(Duration::from_millis(100), actor.assignment()).await {
            Ok(Ok(assigned)) => break assigned,
            Ok(Err(_)) | Err(_) => assert!(SystemTime::now() < due + Duration::from_secs(10)),
        }
    };
    assert!(SystemTime::now() >= due, "it was given out before its time");
    assert_eq!((again.build_id.as_str(), again.number), (build.id.as_str(), 2));
    let claimed = alice.get_build(&build.id).await?;
    assert_eq!((claimed.state(), claimed.retry_time), (BuildState::Claimed, None));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_pause_wakes_the_dispatcher() -> anyhow::Result<()> {
    const FAILURES: u32 = 5;
    let service = Service::start_with(&["--retry-backoff", "20ms", "--max-attempt-failures", "6"]).await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    alice.create(image("A", "FROM scratch")).await?;
    let (_, mut attempt) = actor.assignment().await?;
    let mut soonest = Duration::MAX;
    let mut pause = Duration::from_millis(20);
    for _ in 0..FAILURES {
        let begun = Instant::now();
        fail(&mut actor, &attempt).await?;
        (_, attempt) = actor.assignment().await?;
        let took = begun.elapsed();
        assert!(took >= pause, "{took:?} of {pause:?}");
        soonest = soonest.min(took.saturating_sub(pause));
        pause *= 2;
    }
    // With polling alone, each attempt would start a second after the one before, or hardly less.
    assert!(soonest < Duration::from_millis(500), "{soonest:?} late");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_a_worker_reports_as_broken_waits() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retry-backoff", "30s"]).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![Event::Started(Started {})]).await;
    actor.acknowledged().await?;
    // A worker that reconnects without the build has lost it, which costs a failure but no backoff.
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, again) = actor.assignment().await?;
    let claimed = alice.get_build(&build.id).await?;
    assert_eq!((again.number, claimed.failures, claimed.retry_time), (2, 1, None));

    // Cancelling needs no worker.
    fail(&mut actor, &again).await?;
    let cancelled = alice.cancel(&claimed.image_id).await?;
    assert_eq!((cancelled.state(), cancelled.retry_time), (BuildState::Cancelled, None));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_pause_it_is_tried_again_at_once() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retry-backoff", "0"]).await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let (_, attempt) = actor.assignment().await?;
    fail(&mut actor, &attempt).await?;
    assert_eq!(actor.assignment().await?.1.number, 2);
    assert_eq!(alice.get_build(&build.id).await?.retry_time, None);
    Ok(())
}
