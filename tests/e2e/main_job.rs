//! The main job: register an image, have it built, watch it happen. Against a scripted engine.

use std::collections::BTreeSet;

use futures_util::future::try_join_all;
use proto::images::{BuildErrorKind, BuildState, ImageStatus, PendingReason};
use tonic::Code;

use crate::{
    engine::{Ended, FakeEngine, Gate, Script},
    stack::{LIMIT, Service, Worker, assert_gapless, image, lines, reason, states},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_built_and_its_history_is_kept() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.on(
        "RUN make",
        Script::new()
            .step("[1/2] FROM scratch")
            .cached()
            .step("[2/2] RUN make")
            .log("compiling\nlink")
            .log("ing\n")
            .pause(&gate)
            .log_error("warned")
            .image_size(1_234_567)
            .succeed(),
    );
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Tools", "FROM scratch\nRUN make")).await?;
    assert_eq!(created.status(), ImageStatus::BuildPending);
    assert_eq!(build.pending_reason(), PendingReason::NoWorkerOnline);
    assert_eq!(build.queue_position, 1);
    assert_eq!((created.repository.as_str(), created.tag.as_str()), ("trailer/tools", "latest"));

    let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
    gate.reached().await;
    let running = alice.until(&build.id, |build| build.log_bytes > 0).await?;
    assert_eq!((running.state(), running.worker.as_str()), (BuildState::Running, "w1"));
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::Building);
    assert!(!engine.tags().contains_key("trailer/tools:latest"), "nothing is tagged before it is built");
    gate.open();

    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded);
    let steps = finished.steps.unwrap_or_default();
    assert_eq!((steps.done, steps.total, steps.cached > 0), (steps.total, steps.done, true));
    let built = alice.get(&created.id).await?;
    assert_eq!(built.status(), ImageStatus::BuildFinished);
    let artifact = built.artifact.expect("a finished build leaves an artifact");
    assert_eq!(Some(&artifact.image_id), engine.tags().get("trailer/tools:latest"));
    assert_eq!((artifact.worker.as_str(), artifact.build_id), ("w1", build.id.clone()));
    assert_eq!(artifact.size_bytes, 1_234_567);
    assert_eq!(engine.tags().len(), 1, "the attempt's own tag is gone");

    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["compiling", "linking", "warned"]);
    let passed = [
        BuildState::Queued,
        BuildState::Claimed,
        BuildState::Running,
        BuildState::Publishing,
        BuildState::Succeeded,
    ];
    assert_eq!(states(&events), passed);
    for after in 0..=events.len() {
        let rest = alice.history(&build.id, i64::try_from(after)?).await?;
        assert_eq!(rest, events[after..]);
    }
    assert_eq!(engine.unexpected(), [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_step_is_named_with_its_last_lines() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.script(
        Script::new()
            .step("[1/3] FROM scratch")
            .step("[2/3] RUN prepare")
            .log("prepared\n")
            .step("[3/3] RUN make")
            .logs(50, |i| format!("line {i}\n"))
            .log_error("it broke")
            .fail("exit code: 2"),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Broken", "FROM scratch\nRUN make")).await?;
    let failed = alice.finished(&build.id).await?;
    assert_eq!((failed.state(), failed.failures), (BuildState::Failed, 0));
    let error = failed.error.expect("a failed build says why");
    assert_eq!((error.kind(), error.step.as_str()), (BuildErrorKind::User, "[3/3] RUN make"));
    assert!(error.message.contains("exit code: 2"), "{}", error.message);
    assert_eq!(error.last_lines.len(), 20);
    assert_eq!(error.last_lines[..2], ["line 31", "line 32"]);
    assert_eq!(error.last_lines[19], "it broke");
    let shown = alice.get(&created.id).await?;
    assert_eq!(shown.status(), ImageStatus::Error);
    assert!(shown.status_message.contains("[3/3] RUN make"), "{}", shown.status_message);
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events).len(), 52);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_before_during_and_after_see_the_same() -> anyhow::Result<()> {
    const WATCHERS: usize = 200;
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(
        Script::new()
            .step("[1/1] RUN talk")
            .logs(2_000, |i| format!("before {i}\n"))
            .pause(&gate)
            .logs(2_000, |i| format!("after {i}\n"))
            .succeed(),
    );
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    let watch = |count| {
        let alice = alice.clone();
        let build = build.id.clone();
        tokio::spawn(async move { try_join_all((0..count).map(|_| alice.history(&build, 0))).await })
    };
    let before = watch(WATCHERS);
    let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
    gate.reached().await;
    let during = watch(10);
    alice.until(&build.id, |build| build.last_sequence > 1_000).await?;
    gate.open();
    let before = tokio::time::timeout(LIMIT * 3, before).await???;
    let during = tokio::time::timeout(LIMIT, during).await???;
    let after = alice.history(&build.id, 0).await?;
    assert_gapless(&after, 1);
    assert_eq!(lines(&after).len(), 4_000);
    for seen in before.iter().chain(&during) {
        assert!(*seen == after, "a watcher saw something else");
    }
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::BuildFinished);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_stops_the_work_and_leaves_the_previous_artifact() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
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
    let asked = alice.cancel(&created.id).await?;
    assert!(asked.cancel_requested || asked.state() == BuildState::Cancelled);
    let cancelled = alice.finished(&second.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert_eq!(engine.builds().last().map(|build| build.ended), Some(Ended::Cancelled));
    assert_eq!(engine.tags(), tagged);
    let shown = alice.get(&created.id).await?;
    assert_eq!(shown.status(), ImageStatus::BuildCancelled);
    assert_eq!(shown.artifact.map(|artifact| artifact.build_id), Some(first.id));
    // And it can be built again.
    engine.script(Script::new().step("[1/1] RUN sleep").succeed());
    let third = alice.build(&created.id).await?;
    assert_eq!(alice.finished(&third.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_stop_is_told_of() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN sleep").pause(&gate).hang().ignore_cancel());
    let service = Service::start_with(&["--stop-within", "1s"]).await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Stuck", "FROM scratch\nRUN sleep")).await?;
    gate.reached().await;
    gate.open();
    alice.until(&build.id, |build| build.state() == BuildState::Running).await?;
    alice.cancel(&created.id).await?;
    let cancelled = alice.finished(&build.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, false));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_build_is_cancelled_at_once() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Waiting", "FROM scratch")).await?;
    assert_eq!(alice.cancel(&created.id).await?.state(), BuildState::Cancelled);
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::BuildCancelled);
    assert_eq!(states(&alice.history(&build.id, 0).await?), [BuildState::Queued, BuildState::Cancelled]);

    let refused = alice.cancel(&created.id).await.expect_err("there is nothing to cancel");
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "NO_BUILD_IN_PROGRESS")
    );
    let second = alice.build(&created.id).await?;
    let refused = alice.build(&created.id).await.expect_err("one build at a time");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "BUILD_IN_PROGRESS"));
    let meant = proto::images::CancelBuildRequest { id: created.id.clone(), build_id: build.id.clone() };
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
    let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
    let alice = service.builder("alice");
    let mut wanted = image("Gone", "FROM scratch\nRUN sleep");
    wanted.repository = "trailer/gone".to_owned();
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
    // The reference is free when the worker has confirmed.
    let begun = tokio::time::Instant::now();
    let (again, _) = loop {
        match alice.create(wanted.clone()).await {
            Ok(created) => break created,
            Err(status) if status.code() == Code::AlreadyExists && begun.elapsed() < LIMIT => {
                tokio::task::yield_now().await;
            }
            Err(status) => return Err(status.into()),
        }
    };
    assert_eq!(again.repository, "trailer/gone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_names_get_different_references() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let created = try_join_all((0..20).map(|_| alice.create(image("Same name", "FROM scratch")))).await?;
    let references: BTreeSet<&str> = created.iter().map(|(image, _)| image.repository.as_str()).collect();
    assert_eq!(references.len(), 20);
    let mut taken = image("Other", "FROM scratch");
    taken.repository = "trailer/same-name".to_owned();
    let refused = alice.create(taken).await.expect_err("it is taken");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::AlreadyExists, "REFERENCE_TAKEN"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_over_its_limit_shows_the_gap_and_keeps_its_end() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.script(Script::new().step("[1/1] RUN talk").logs(20_000, |i| format!("{i:09}\n")).succeed());
    let service = Service::start().await?;
    let flags = ["--log-limit", "41000"];
    let _worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Chatty", "FROM scratch\nRUN talk")).await?;
    let finished = alice.finished(&build.id).await?;
    assert!(finished.log_truncated);
    let events = alice.history(&build.id, 0).await?;
    let left_out: i64 = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(proto::images::build_event::Event::LogGap(gap)) => Some(gap.lines),
            _ => None,
        })
        .sum();
    let kept = lines(&events);
    assert_eq!(kept.len() + usize::try_from(left_out)?, 20_000);
    assert_eq!((kept[0], kept[999]), ("000000000", "000000999"));
    assert_eq!(kept.last(), Some(&"000019999"));
    Ok(())
}
