//! The main job against a scripted engine: register an image, have it built, watch the build.

use std::collections::BTreeSet;

use futures_util::future::try_join_all;
use proto::images::{BuildErrorKind, BuildState, ImageStatus, PendingReason, image_config::Source};
use tonic::Code;

use crate::{
    answers::{assert_gapless, joined_lines, lines, reason, states},
    client::{image, repository},
    fake_engine::{Ended, FakeEngine, Gate, Script, State},
    stack::{LIMIT, Service, Worker},
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
    assert_eq!(
        (&*created.repository, &*created.tag, &created.reference),
        ("", "latest", &repository("alice", "tools:latest"))
    );

    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    gate.reached().await;
    let running = alice.until(&build.id, |build| build.log_bytes > 0).await?;
    assert_eq!((running.state(), running.worker.as_str()), (BuildState::Running, "w1"));
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::Building);
    let reference = created.reference.clone();
    assert!(!engine.tags().contains_key(&reference), "nothing is tagged before it is built");
    gate.open();

    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded);
    let steps = finished.steps.unwrap_or_default();
    assert_eq!((steps.done, steps.total, steps.cached > 0), (steps.total, steps.done, true));
    let built = alice.get(&created.id).await?;
    assert_eq!(built.status(), ImageStatus::BuildFinished);
    let artifact = built.artifact.expect("a finished build leaves an artifact");
    assert_eq!(Some(&artifact.image_id), engine.tags().get(&reference));
    assert_eq!((artifact.worker.as_str(), artifact.build_id), ("w1", build.id.clone()));
    assert_eq!(artifact.size_bytes, 1_234_567);
    let tags: Vec<String> = engine.tags().into_keys().filter(|tag| *tag != reference).collect();
    assert_eq!(tags.len(), 1, "the artifact's own name is there, and the attempt's is gone: {tags:?}");
    assert!(tags[0].starts_with("trailer.invalid/artifact/") && tags[0].ends_with(&build.id), "{tags:?}");

    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(joined_lines(&events), ["compiling", "linking", "warned"]);
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
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
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
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
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
async fn equal_names_get_different_references() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let created = try_join_all((0..20).map(|_| alice.create(image("Same name", "FROM scratch")))).await?;
    let references: BTreeSet<&str> = created.iter().map(|(image, _)| image.reference.as_str()).collect();
    assert_eq!(references.len(), 20);
    let mut taken = image("Other", "FROM scratch");
    taken.repository = repository("alice", "same-name");
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
    let _worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_what_its_options_say_and_ends_with_its_time() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    engine.script(Script::new().step("[1/1] RUN for ever").hang());
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut options = image("Tools", "FROM scratch AS tools\nARG A\nRUN for ever");
    if let Some(config) = &mut options.config {
        config.no_cache = true;
        config.pull_base = true;
        config.build_timeout = Some(prost_types::Duration { seconds: 3, nanos: 0 });
        if let Some(Source::Dockerfile(dockerfile)) = &mut config.source {
            dockerfile.build_args = [("A".to_owned(), "of alice".to_owned())].into();
            dockerfile.target = "tools".to_owned();
        }
    }
    let (created, build) = alice.create(options).await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let finished = alice.finished(&build.id).await?;
    let kind = finished.error.unwrap_or_default().kind();
    assert_eq!((finished.state, kind), (BuildState::Failed.into(), BuildErrorKind::Timeout));
    assert_eq!((finished.attempt, finished.failures), (1, 0), "it is not tried again");
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::Error);
    let is_cancelled =
        |state: &State| state.builds.first().is_some_and(|build| build.ended == Ended::Cancelled);
    engine.wait_for(is_cancelled, LIMIT).await?;
    let attributes = &engine.builds()[0].attributes;
    let option = |name: &str| attributes.get(name).map(String::as_str);
    assert_eq!((option("target"), option("build-arg:A")), (Some("tools"), Some("of alice")));
    // The worker asks registries itself, because the engine would ask them for images of the catalogue, too.
    assert_eq!((option("no-cache"), option("image-resolve-mode")), (Some(""), Some("local")));
    Ok(())
}
