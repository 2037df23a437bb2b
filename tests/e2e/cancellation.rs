//! Cancelling and deleting: the work stops, and the previous artifact stays.

use std::time::Duration;

use futures_util::future::try_join_all;
use proto::{
    dispatch::{Built, Started, Stopped, Succeeded, report_event::Event},
    images::{BuildState, ImageStatus, PendingReason, build_event},
};
use tonic::Code;

use crate::{
    actor::{Actor, IMAGE_ID, hello},
    answers::{reason, states},
    client::{Client, image, repository, repository_of},
    eventually::{eventually, eventually_true},
    fake_engine::{Ended, FakeEngine, Gate, Script},
    proxy::Proxy,
    stack::{LIMIT, Service, Worker},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_stops_the_work_and_leaves_the_previous_artifact() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (created, first) = alice.create(image("Sleepy", "FROM scratch\nRUN sleep")).await?;
    alice.finished(&first.id).await?;
    let tagged = engine.tags();

    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN sleep").log("zzz\n").pause(&gate).hang());
    let second = alice.build(&created.id).await?;
    assert_eq!(second.number, 2);
    gate.reached().await;
    gate.open();
    alice.until(&second.id, |build| build.log_bytes > 0).await?;
    let cancelled = alice.cancel(&created.id).await?;
    assert!(cancelled.cancel_requested || cancelled.state() == BuildState::Cancelled);
    let cancelled = alice.finished(&second.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert_eq!(engine.builds().last().map(|build| build.ended), Some(Ended::Cancelled));
    assert_eq!(engine.tags(), tagged);
    let shown = alice.get(&created.id).await?;
    assert_eq!(shown.status(), ImageStatus::BuildCancelled);
    assert_eq!(shown.artifact.map(|artifact| artifact.build_id), Some(first.id));
    // The image can be built again.
    engine.script(Script::new().step("[1/1] RUN sleep").succeed());
    let third = alice.build(&created.id).await?;
    assert_eq!(alice.finished(&third.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_stop_is_reported() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let (gate, end) = (Gate::new(), Gate::new());
    engine.script(Script::new().step("[1/1] RUN sleep").pause(&gate).pause(&end).ignore_cancel().succeed());
    let service = Service::start_with(&["--stop-timeout", "1s"]).await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Stuck", "FROM scratch\nRUN sleep")).await?;
    gate.reached().await;
    gate.open();
    alice.until(&build.id, |build| build.state() == BuildState::Running).await?;
    alice.cancel(&created.id).await?;
    let cancelled = alice.finished(&build.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, false));
    // No build starts there while the old one goes on, although a slot is free.
    engine.script(Script::new().step("[1/1] RUN sleep").succeed());
    let (_, next) = alice.create(image("Next", "FROM scratch\nRUN sleep")).await?;
    eventually_true("the build waits", async || {
        Ok(alice.get_build(&next.id).await?.pending_reason() == PendingReason::WorkersDraining)
    })
    .await?;
    assert_eq!(alice.get_build(&next.id).await?.attempt, 0);
    end.open();
    assert_eq!(alice.finished(&next.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_build_is_cancelled_at_once() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Waiting", "FROM scratch")).await?;
    assert!(!build.cancel_requested && !build.stop_confirmed, "{build:?}");
    let cancelled = alice.cancel(&created.id).await?;
    assert_eq!(cancelled.state(), BuildState::Cancelled);
    assert!(cancelled.cancel_requested && cancelled.stop_confirmed, "{cancelled:?}");
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::BuildCancelled);
    let history = alice.history(&build.id, 0).await?;
    assert_eq!(states(&history), [BuildState::Queued, BuildState::Cancelled]);
    let requested = history.iter().map(|event| match &event.event {
        Some(build_event::Event::StateChange(change)) => change.cancel_requested,
        _ => false,
    });
    assert_eq!(requested.collect::<Vec<_>>(), [false, true]);

    let refused = alice.cancel(&created.id).await.expect_err("there is nothing to cancel");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "NO_BUILD_IN_PROGRESS")
    );
    let second = alice.build(&created.id).await?;
    let refused = alice.build(&created.id).await.expect_err("one build at a time");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "BUILD_IN_PROGRESS"));
    let meant = proto::images::CancelBuildRequest {
        id: created.id.clone(),
        build_id: build.id.clone(),
        ..Default::default()
    };
    let refused = alice.images.clone().cancel_build(meant).await.expect_err("a newer build is not meant");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "OTHER_BUILD"));

    let request =
        proto::images::ListBuildsRequest { image_id: created.id.clone(), page_size: 1, ..Default::default() };
    let page = alice.builds.clone().list_builds(request.clone()).await?.into_inner();
    assert_eq!(page.builds.iter().map(|build| &build.id).collect::<Vec<_>>(), [&second.id]);
    let request = proto::images::ListBuildsRequest { page_token: page.next_page_token, ..request };
    let page = alice.builds.clone().list_builds(request).await?.into_inner();
    assert_eq!(page.builds.iter().map(|build| &build.id).collect::<Vec<_>>(), [&build.id]);
    assert_eq!(page.next_page_token, "");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_stops_the_work_and_frees_the_reference_afterwards() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN sleep").pause(&gate).hang());
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let mut wanted = image("Gone", "FROM scratch\nRUN sleep");
    wanted.repository = repository("alice", "gone");
    let (created, build) = alice.create(wanted.clone()).await?;
    gate.reached().await;
    gate.open();
    let watching = tokio::spawn({
        let (alice, build) = (alice.clone(), build.id.clone());
        async move { alice.history(&build, 0).await }
    });
    alice.delete(&created.id).await?;
    for refused in [
        alice.get(&created.id).await.err(),
        alice.get_build(&build.id).await.err(),
        alice.build(&created.id).await.err(),
        alice.delete(&created.id).await.err(),
        tokio::time::timeout(LIMIT, watching).await??.err(),
    ] {
        assert_eq!(refused.map(|status| status.code()), Some(Code::NotFound));
    }
    assert_eq!(alice.list().await?, []);
    engine.wait_for(|state| state.builds[0].ended == Ended::Cancelled, LIMIT).await?;
    // The reference is free once the worker has confirmed the stop.
    let (again, _) = eventually("the reference is free", async || match alice.create(wanted.clone()).await {
        Ok(created) => Ok(Some(created)),
        Err(status) if status.code() == Code::AlreadyExists => Ok(None),
        Err(status) => Err(status.into()),
    })
    .await?;
    assert_eq!(repository_of(&again), repository("alice", "gone"));
    Ok(())
}

/// The reaction of a played worker to a cancel.
#[derive(Clone, Copy, Debug)]
enum Meets {
    /// The worker stops the build and confirms that.
    Stops,
    /// The worker sends heartbeats, but reports nothing about the build.
    Lives,
    /// The worker disconnects and does not come back.
    Vanishes,
    /// The worker finishes the build before it receives the cancel.
    Finishes,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_whatever_the_worker_is_doing_and_however_it_meets_it() -> anyhow::Result<()> {
    // The cases that wait for a time do so side by side.
    const TIMES: [&str; 10] = [
        "--heartbeat",
        "50ms",
        "--offline-after",
        "3s",
        "--stop-after",
        "3s",
        "--stop-timeout",
        "3s",
        "--lease",
        "8s",
    ];
    let started = || Event::Started(Started {});
    let service = Service::start_with(&TIMES).await?;
    // However long a busy machine takes, no time passes here.
    let patient = Service::start_with(&["--stop-timeout", "60s", "--lease", "120s"]).await?;
    let mut cases = Vec::new();
    for (state, reported) in [
        (BuildState::Claimed, vec![]),
        (BuildState::Running, vec![started()]),
        (BuildState::Publishing, vec![started(), Event::Built(Built {})]),
    ] {
        for meets in [Meets::Stops, Meets::Lives, Meets::Vanishes, Meets::Finishes] {
            let waits = match meets {
                Meets::Stops => false,
                // The report of an attempt without a grant is refused.
                Meets::Finishes => state != BuildState::Publishing,
                Meets::Lives | Meets::Vanishes => true,
            };
            let service = if waits { &service } else { &patient };
            cases.push(cancel_meets(service, state, reported.clone(), meets));
        }
    }
    try_join_all(cases).await?;
    Ok(())
}

/// Cancels a build in a state in which its worker has `reported` this much.
async fn cancel_meets(
    service: &Service,
    state: BuildState,
    reported: Vec<Event>,
    meets: Meets,
) -> anyhow::Result<()> {
    let name = format!("{state:?} {meets:?}");
    let alice = service.builder("alice");
    let mut wanted = image(&name, "FROM scratch");
    wanted.config.get_or_insert_default().worker = name.replace(' ', "-");
    let (created, build) = alice.create(wanted).await?;
    let mut actor = Actor::connect(service, hello(&name.replace(' ', "-"), &[])).await?;
    let pulse = actor.pulse(false);
    let (_, attempt) = actor.assignment().await?;
    if !reported.is_empty() {
        actor.report(&attempt, 1, reported.clone()).await;
    }
    alice.until(&build.id, |build| build.state() == state).await?;
    let begun = tokio::time::Instant::now();
    alice.cancel(&created.id).await?;
    let next = i64::try_from(reported.len())? + 1;
    let (ends, is_confirmed) = match meets {
        Meets::Stops => {
            actor.report(&attempt, next, vec![Event::Stopped(Stopped { confirmed: true })]).await;
            (BuildState::Cancelled, true)
        }
        Meets::Lives | Meets::Vanishes => (BuildState::Cancelled, false),
        Meets::Finishes => {
            let done = Succeeded { image_id: IMAGE_ID.to_owned(), ..Succeeded::default() };
            actor.report(&attempt, next, vec![Event::Succeeded(done)]).await;
            if state == BuildState::Publishing {
                // The grant came before the cancel, so the result stands.
                (BuildState::Succeeded, false)
            } else {
                // Without a grant, the report is refused, and the attempt with it.
                (BuildState::Cancelled, false)
            }
        }
    };
    let living = (!matches!(meets, Meets::Vanishes)).then_some((actor, pulse));
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.stop_confirmed), (ends, is_confirmed), "{name}");
    // Nothing reports that the work has stopped while it may still go on.
    let earliest = match meets {
        Meets::Lives => Duration::from_secs(3),
        // The lease, but for the time since the last heartbeat.
        Meets::Vanishes => Duration::from_secs(4),
        Meets::Stops | Meets::Finishes => Duration::ZERO,
    };
    assert!(begun.elapsed() >= earliest, "{name} after {:?}", begun.elapsed());
    drop(living);
    let image = alice.get(&created.id).await?;
    assert_eq!(image.artifact.is_some(), ends == BuildState::Succeeded, "{name}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_a_worker_that_was_cut_off_when_it_comes_back() -> anyhow::Result<()> {
    let cut = cut_off_while_building(&["--lease", "60s", "--stop-after", "45s"]).await?;
    cut.alice.cancel(&cut.image).await?;
    assert!(cut.alice.get_build(&cut.build).await?.cancel_requested);
    assert_eq!(cut.engine.running(), 1);
    cut.proxy.stall(false);
    let cancelled = cut.alice.finished(&cut.build).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert_eq!(cut.engine.builds().last().map(|build| build.ended), Some(Ended::Cancelled));
    assert_eq!(cut.engine.running(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_of_a_worker_that_stays_away_ends_with_its_lease() -> anyhow::Result<()> {
    // Long enough for a busy machine to begin the build.
    let cut =
        cut_off_while_building(&["--lease", "8s", "--stop-after", "5s", "--stop-timeout", "2s"]).await?;
    cut.alice.cancel(&cut.image).await?;
    let cancelled = cut.alice.finished(&cut.build).await?;
    // The worker stopped on its own, but could not report that.
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, false));
    assert_eq!(cut.engine.running(), 0);
    Ok(())
}

/// A running build whose worker is cut off from the service.
struct CutOff {
    alice: Client,
    engine: FakeEngine,
    proxy: Proxy,
    image: String,
    build: String,
    _service: Service,
    _worker: Worker,
}

async fn cut_off_while_building(times: &[&str]) -> anyhow::Result<CutOff> {
    let engine = FakeEngine::start().await?;
    engine.script(Script::new().step("[1/1] RUN sleep").log("zzz\n").hang());
    let flags = [times, &["--heartbeat", "100ms", "--offline-after", "500ms"]].concat();
    let service = Service::start_with(&flags).await?;
    let proxy = Proxy::start(service.addr).await?;
    let worker = Worker::start_at(&service, proxy.addr(), "w1", &engine.docker_host(), &[])?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Sleepy", "FROM scratch\nRUN sleep")).await?;
    alice.until(&build.id, |build| build.log_bytes > 0).await?;
    proxy.stall(true);
    Ok(CutOff {
        alice,
        engine,
        proxy,
        image: created.id,
        build: build.id,
        _service: service,
        _worker: worker,
    })
}
