//! Failures of connections, the service, the worker and the engine, which disturb builds as little as
//! possible.

use std::collections::BTreeSet;

use proto::images::{BuildErrorKind, BuildState};

use crate::{
    answers::{assert_gapless, lines, states},
    client::image,
    fake_engine::{Ended, FakeEngine, Gate, Script},
    proxy::Proxy,
    stack::{LIMIT, Service, Worker},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_disturbs_no_build() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gates = [Gate::new(), Gate::new(), Gate::new()];
    engine.script(
        Script::new()
            .step("[1/1] RUN talk")
            .logs(500, |i| format!("a {i}\n"))
            .pause(&gates[0])
            .logs(500, |i| format!("b {i}\n"))
            .pause(&gates[1])
            .logs(500, |i| format!("c {i}\n"))
            .pause(&gates[2])
            .succeed(),
    );
    let service = Service::start().await?;
    let proxy = Proxy::start(service.addr).await?;
    let alice = service.builder("alice");
    let _worker = Worker::start_at(&service, proxy.addr(), "w1", &engine.docker_host(), &[])?;
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    for (i, gate) in gates.iter().enumerate() {
        gate.reached().await;
        match i {
            0 => proxy.cut(),
            1 => {
                proxy.refuse(true);
                proxy.cut();
            }
            _ => proxy.stall(true),
        }
        gate.open();
        if i == 1 {
            gates[2].reached().await;
            proxy.refuse(false);
        }
    }
    engine.wait_for(|state| state.builds[0].ended == Ended::Succeeded, LIMIT).await?;
    proxy.stall(false);
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    let expected: Vec<String> =
        ["a", "b", "c"].iter().flat_map(|part| (0..500).map(move |i| format!("{part} {i}"))).collect();
    assert_eq!(lines(&events), expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_service_goes_on_with_what_runs() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN talk").log("before\n").pause(&gate).log("after\n").succeed());
    let service = Service::start().await?;
    let proxy = Proxy::start(service.addr).await?;
    let _worker = Worker::start_at(&service, proxy.addr(), "w1", &engine.docker_host(), &[])?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    gate.reached().await;
    proxy.cut();
    let service = service.restart().await?;
    gate.open();
    let alice = service.builder("alice");
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["before", "after"]);
    assert_eq!(states(&events).last(), Some(&BuildState::Succeeded));
    Ok(())
}

/// Returns the script of a build that writes 30 bytes before each of two gates.
pub(crate) fn talk(gates: &[Gate; 2]) -> Script {
    Script::new()
        .step("[1/1] RUN talk")
        .logs(10, |i| format!("a {i}\n"))
        .pause(&gates[0])
        .logs(10, |i| format!("b {i}\n"))
        .pause(&gates[1])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_a_restored_backup_knows_less_of_is_begun_anew() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gates = [Gate::new(), Gate::new()];
    engine.script(talk(&gates).hang());
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    gates[0].reached().await;
    alice.until(&build.id, |build| build.log_bytes == 30).await?;
    let (service, backup) = service.back_up().await?;
    gates[0].open();
    gates[1].reached().await;
    service.builder("alice").until(&build.id, |build| build.log_bytes == 60).await?;
    gates[1].open();
    engine.script(Script::new().step("[1/1] RUN talk").log("once more\n").succeed());

    // The worker has dropped the lines that the backup lacks.
    let service = service.restore(backup, &[]).await?;
    let alice = service.builder("alice");
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 2, 1));
    assert_eq!(lines(&alice.history(&build.id, 0).await?).last(), Some(&"once more"));
    assert_eq!(engine.running(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_whose_number_a_restored_backup_gives_again_waits_for_the_first() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN talk").pause(&gate).hang().ignore_cancel());
    let service = Service::start_with(&["--stop-timeout", "1s"]).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    // The backup contains no attempt.
    let (service, backup) = service.back_up().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    gate.reached().await;
    engine.script(Script::new().step("[1/1] RUN talk").log("once more\n").succeed());

    let service = service.restore(backup, &["--stop-timeout", "1s"]).await?;
    let alice = service.builder("alice");
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.failures), (BuildState::Succeeded, 0));
    assert_eq!(lines(&alice.history(&build.id, 0).await?), ["once more"]);
    assert_eq!(engine.running(), 0, "the first has ended");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_shuts_down_hands_back_what_runs() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN sleep").pause(&gate).hang());
    let service = Service::start().await?;
    let flags = ["--drain-grace", "100ms"];
    let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Sleepy", "FROM scratch\nRUN sleep")).await?;
    gate.reached().await;
    gate.open();
    worker.stop().await?;
    assert_eq!(engine.running(), 0);
    let handed_back = alice.get_build(&build.id).await?;
    assert_eq!((handed_back.state(), handed_back.failures), (BuildState::Queued, 0));
    engine.script(Script::new().step("[1/1] RUN sleep").succeed());
    let _worker = Worker::start(&service, "w2", &engine.docker_host())?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_is_away_for_a_while_costs_one_failure() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN make").pause(&gate).drop_connection());
    // The worker reaches the engine through a link, which can be removed.
    let directory = tempfile::tempdir()?;
    let link = directory.path().join("docker.sock");
    let socket = engine.docker_host();
    let socket = socket.trim_start_matches("unix://");
    std::os::unix::fs::symlink(socket, &link)?;
    // Retry at once, before the worker has noticed.
    let service = Service::start_with(&["--retry-backoff", "0"]).await?;
    let _worker = Worker::start(&service, "w1", &format!("unix://{}", link.display()))?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch\nRUN make")).await?;
    gate.reached().await;
    std::fs::remove_file(&link)?;
    gate.open();
    let waiting = alice.until(&build.id, |build| build.attempt == 2).await?;
    assert_eq!((waiting.state(), waiting.failures), (BuildState::Claimed, 1));
    engine.script(Script::new().step("[1/1] RUN make").succeed());
    std::os::unix::fs::symlink(socket, &link)?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.failures), (BuildState::Succeeded, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_engine_is_tried_again() -> anyhow::Result<()> {
    for script in [
        Script::new().internal_error(),
        Script::new().step("[1/1] RUN make").log("begun\n").drop_connection(),
        Script::new().step("[1/1] RUN make").fail("write /x: no space left on device"),
    ] {
        let engine = FakeEngine::start().await?;
        engine.script(script);
        let service = Service::start_with(&["--retry-backoff", "100ms"]).await?;
        let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
        let alice = service.builder("alice");
        let (_, build) = alice.create(image("A", "FROM scratch\nRUN make")).await?;
        let failed = alice.finished(&build.id).await?;
        assert_eq!((failed.state(), failed.attempt, failed.failures), (BuildState::Failed, 3, 3));
        assert_eq!(failed.error.map(|error| error.kind()), Some(BuildErrorKind::Infrastructure));
        let builds = engine.builds();
        assert_eq!(builds.len(), 3);
        for names in [
            builds.iter().filter_map(|build| build.tag.as_deref()).collect::<BTreeSet<_>>(),
            builds.iter().map(|build| build.build_id.as_str()).collect(),
            builds.iter().map(|build| build.session.as_str()).collect(),
        ] {
            assert_eq!(names.len(), 3, "every attempt has names of its own: {names:?}");
        }
        // An ended build leaves no session open.
        engine.wait_for(|state| state.sessions == 0, LIMIT).await?;
    }
    Ok(())
}
