//! Engines of several versions: supported, refused and flawed ones, and the API that each is called by.

use std::{os::unix::fs::symlink, path::Path};

use anyhow::Context as _;
use image_service::Role;
use proto::images::{self as api, BuildErrorKind, BuildState, PendingReason, StepState, build_event::Event};
use tonic::{Status, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    client::{Client, image},
    engine_fixture,
    eventually::{eventually, eventually_true},
    fake_engine::{FakeEngine, Script},
    stack::{LIMIT, Service, Worker},
};

async fn shown(service: &Service, name: &str) -> anyhow::Result<api::Worker> {
    let root = service.client(&service.token("root", &[Role::Admin]));
    let request = api::ListWorkersRequest::default();
    let workers = root.workers.clone().list_workers(request).await?.into_inner().workers;
    workers.into_iter().find(|worker| worker.name == name).ok_or_else(|| anyhow::anyhow!("no worker {name}"))
}

/// Waits until the service shows a worker that meets a condition.
async fn until_shown(
    service: &Service,
    name: &str,
    condition: impl Fn(&api::Worker) -> bool,
) -> anyhow::Result<api::Worker> {
    let waiting = eventually("the worker meets the condition", async || {
        Ok(shown(service, name).await.ok().filter(&condition))
    });
    match waiting.await {
        Ok(worker) => Ok(worker),
        Err(error) => Err(error.context(format!("{:?}", shown(service, name).await))),
    }
}

/// Waits until a worker's health check reports `expected`.
async fn until_health(worker: &Worker, expected: ServingStatus) -> anyhow::Result<()> {
    let channel = Endpoint::from_shared(format!("http://{}", worker.addr))?.connect().await?;
    let mut statuses = HealthClient::new(channel).watch(HealthCheckRequest::default()).await?.into_inner();
    let waiting = async {
        while let Some(response) = statuses.message().await? {
            if response.status() == expected {
                return Ok(());
            }
        }
        anyhow::bail!("the worker has ended")
    };
    tokio::time::timeout(LIMIT, waiting).await.with_context(|| format!("it is never {expected:?}"))?
}

async fn until_pending(alice: &Client, build: &str, reason: PendingReason) -> anyhow::Result<()> {
    alice.until(build, |build| build.pending_reason() == reason).await.map(|_| ())
}

/// Points a link at an engine, so that another engine can take its place later.
fn link(engine: &FakeEngine, link: &Path) -> anyhow::Result<()> {
    let _ = std::fs::remove_file(link);
    symlink(engine.docker_host().trim_start_matches("unix://"), link)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn too_old_an_engine_builds_nothing_until_it_is_upgraded() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("docker.sock");
    let old = FakeEngine::start_as("24.0.9", "1.43").await?;
    link(&old, &path)?;
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let worker = Worker::start(&service, "w1", &format!("unix://{}", path.display()))?;
    let listed = until_shown(&service, "w1", |worker| worker.online).await?;
    for part in ["24.0.9", "25.0.2", "CVE-2024-23652"] {
        assert!(listed.unsupported_reason.contains(part), "{listed:?}");
    }
    let (_, build) = alice.create(image("Waiting", "FROM scratch\nRUN make")).await?;
    until_pending(&alice, &build.id, PendingReason::WorkersUnsupported).await?;
    until_health(&worker, ServingStatus::NotServing).await?;
    assert!(old.builds().is_empty());

    // The worker keeps running; another engine takes the place of the old one.
    let new = FakeEngine::start_as("29.7.3", "1.53").await?;
    link(&new, &path)?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt), (BuildState::Succeeded, 1), "{finished:?}");
    let listed = shown(&service, "w1").await?;
    assert_eq!((listed.engine_version.as_str(), listed.unsupported_reason.as_str()), ("29.7.3", ""));
    assert!(listed.withheld.is_empty(), "{listed:?}");
    until_health(&worker, ServingStatus::Serving).await?;
    assert!(old.builds().is_empty());
    assert_eq!(new.unexpected(), [""; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn too_old_an_engine_is_tried_out_where_the_operator_says_so() -> anyhow::Result<()> {
    let engine = FakeEngine::start_as("20.10.24", "1.41").await?;
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let flags = ["--allow-old-engine"];
    let _worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let (_, build) = alice.create(image("Tried", "FROM scratch\nRUN make")).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    let listed = shown(&service, "w1").await?;
    assert!(
        listed.unsupported_reason.is_empty() && listed.engine_warning.contains("--allow-old-engine"),
        "{listed:?}"
    );
    assert_eq!(engine.unexpected(), [""; 0]);
    Ok(())
}

/// Runs on any engine: it gets builds exactly if it is new enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_engine_that_is_too_old_is_recognized_by_its_version() -> anyhow::Result<()> {
    let (docker, docker_host) = engine_fixture::connect().await?;
    let version = docker.version().await?.version.unwrap_or_default();
    let major: u32 = version.split('.').next().unwrap_or_default().parse()?;
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let name = format!("w-{}", uuid::Uuid::new_v4().simple());
    let worker = Worker::start(&service, &name, &docker_host)?;
    let listed = until_shown(&service, &name, |worker| worker.online).await?;
    assert_eq!(listed.engine_version, version);
    if major >= 25 {
        assert_eq!(listed.unsupported_reason, "");
        until_health(&worker, ServingStatus::Serving).await?;
        return Ok(());
    }
    assert!(listed.unsupported_reason.contains(&version), "{listed:?}");
    let (_, build) = alice.create(image("Waiting", "FROM scratch\nENV A=b")).await?;
    until_pending(&alice, &build.id, PendingReason::WorkersUnsupported).await?;
    until_health(&worker, ServingStatus::NotServing).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ability_of_a_flawed_engine_is_withheld() -> anyhow::Result<()> {
    let engine = FakeEngine::start_as("28.5.2", "1.51").await?;
    let service = Service::start().await?;
    let worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let withheld = async || {
        let listed = until_shown(&service, "w1", |worker| worker.online).await?;
        let withheld = listed.withheld.into_iter().map(|withheld| (withheld.ability, withheld.flaw));
        anyhow::Ok(withheld.collect::<Vec<_>>())
    };
    let [frontends, directories] =
        [("foreign-frontends", "CVE-2026-33747"), ("add-git-directory", "CVE-2026-33748")]
            .map(|(ability, flaw)| (ability.to_owned(), flaw.to_owned()));
    assert_eq!(withheld().await?, [frontends.clone(), directories]);
    worker.stop().await?;

    // The distribution has backported the fix.
    let flags = ["--engine-has-fix", "CVE-2026-33748"];
    let _worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    eventually_true("the fix is known", async || Ok(withheld().await? == [frontends.clone()])).await
}

/// Replays an answer of Docker 28 and 29, which has no exit code for the step's process.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_is_killed_for_its_memory_is_the_users_on_new_engines_too() -> anyhow::Result<()> {
    let engine = FakeEngine::start_as("29.7.3", "1.53").await?;
    let message = "process \"/bin/sh -c ./greedy\" did not complete successfully: cannot allocate memory";
    engine.script(Script::new().step("[2/2] RUN ./greedy").fail_with(Status::unknown(message)));
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let (_, build) = alice.create(image("Greedy", "FROM scratch\nRUN ./greedy")).await?;
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.unwrap_or_default();
    assert_eq!((error.kind(), failed.attempt, failed.failures), (BuildErrorKind::User, 1, 0), "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_are_numbered_in_the_order_of_the_dockerfile() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let names = ["[1/3] FROM base", "[2/3] RUN one", "[3/3] RUN two"];
    let script = names.iter().fold(Script::new(), |script, name| script.step(name));
    engine.script(script.announce_backwards().succeed());
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let (_, build) = alice.create(image("Ordered", "FROM base\nRUN one\nRUN two")).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    let mut announced: Vec<(i32, String)> = alice
        .history(&build.id, 0)
        .await?
        .into_iter()
        .filter_map(|event| match event.event {
            Some(Event::StepChange(step)) if step.state() == StepState::Pending => {
                Some((step.step, step.name))
            }
            _ => None,
        })
        .filter(|(_, name)| names.contains(&name.as_str()))
        .collect();
    announced.sort();
    assert_eq!(announced.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), names);
    Ok(())
}
