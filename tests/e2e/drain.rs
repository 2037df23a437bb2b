//! Drained workers, and builds that no worker takes.

use image_service::Role;
use proto::{
    dispatch::{Heartbeat, connect_request::Message as ToService, connect_response::Message as FromService},
    images::{self as api, BuildErrorKind, BuildState, PendingReason},
};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    actor::{Actor, hello},
    answers::reason,
    client::{Client, channel, image},
    eventually::{eventually, eventually_true},
    fake_engine::FakeEngine,
    stack::{Service, Worker},
};

async fn drain(admin: &Client, name: &str) -> anyhow::Result<api::Worker> {
    let request = api::DrainWorkerRequest { name: name.to_owned(), ..Default::default() };
    Ok(admin.workers.clone().drain_worker(request).await?.into_inner().worker.unwrap_or_default())
}

async fn resume(admin: &Client, name: &str) -> anyhow::Result<api::Worker> {
    let request = api::ResumeWorkerRequest { name: name.to_owned(), ..Default::default() };
    Ok(admin.workers.clone().resume_worker(request).await?.into_inner().worker.unwrap_or_default())
}

/// Polls a build until `worker_offline` is `offline`, because no event reports that.
async fn until_offline(client: &Client, build: &str, offline: bool) -> anyhow::Result<api::Build> {
    eventually(&format!("worker_offline becomes {offline}"), async || {
        let found = client.get_build(build).await?;
        Ok((found.worker_offline == offline).then_some(found))
    })
    .await
}

fn admin(service: &Service) -> Client {
    service.client(&service.token("root", &[Role::Admin]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_gets_nothing_until_it_is_resumed() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let drained = drain(&admin(&service), "w1").await?;
    assert!(drained.drained && drained.draining && drained.online);
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    assert_eq!(alice.get_build(&build.id).await?.pending_reason(), PendingReason::WorkersDraining);
    assert!(drain(&admin(&service), "w1").await?.drained, "draining again is no error");

    // The drain outlasts the connection and the service's process.
    drop(actor);
    let service = service.restart().await?;
    let alice = service.builder("alice");
    actor = Actor::connect(&service, hello("w1", &[])).await?;
    for number in 1..=3 {
        actor.say(ToService::Heartbeat(Heartbeat { number, draining: false })).await;
        assert!(matches!(actor.next().await?, FromService::HeartbeatAck(_)), "it gets nothing but answers");
    }
    let waiting = alice.get_build(&build.id).await?;
    assert_eq!(
        (waiting.state(), waiting.pending_reason()),
        (BuildState::Queued, PendingReason::WorkersDraining)
    );

    let resumed = resume(&admin(&service), "w1").await?;
    assert!(!resumed.drained && !resumed.draining);
    actor.build_next().await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_admins_drain_and_only_workers_that_are_known() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let _actor = Actor::connect(&service, hello("w1", &[])).await?;
    let request = |name: &str| api::DrainWorkerRequest { name: name.to_owned(), ..Default::default() };
    let mut alice = service.builder("alice").workers;
    let refused = alice.drain_worker(request("w1")).await.expect_err("alice is no admin");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let mut root = admin(&service).workers;
    let missing = root.drain_worker(request("w2")).await.expect_err("there is no w2");
    assert_eq!((missing.code(), reason(&missing).as_str()), (Code::NotFound, "WORKER_NOT_FOUND"));
    for name in ["", "a\0b"] {
        let unusable = root.drain_worker(request(name)).await.expect_err("it is no name");
        assert_eq!(unusable.code(), Code::InvalidArgument, "{name:?}");
    }
    let only = api::DrainWorkerRequest { validate_only: true, ..request("w1") };
    assert!(root.drain_worker(only).await?.into_inner().worker.is_some_and(|worker| worker.drained));
    let workers = root.list_workers(api::ListWorkersRequest::default()).await?.into_inner().workers;
    assert!(workers.iter().all(|worker| !worker.drained), "{workers:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_says_that_it_drains_counts_as_draining() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    actor.say(ToService::Heartbeat(Heartbeat { number: 1, draining: true })).await;
    assert!(matches!(actor.next().await?, FromService::HeartbeatAck(_)));
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    assert_eq!(alice.get_build(&build.id).await?.pending_reason(), PendingReason::WorkersDraining);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_no_worker_takes_in_time_fails_and_says_why() -> anyhow::Result<()> {
    let service = Service::start_with(&["--queue-timeout", "300ms"]).await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("A", "FROM scratch")).await?;
    let failed = alice.finished(&build.id).await?;
    assert_eq!((failed.state(), failed.attempt, failed.failures), (BuildState::Failed, 0, 0));
    let error = failed.error.unwrap_or_default();
    assert_eq!(error.kind(), BuildErrorKind::Timeout);
    assert_eq!(error.message, "no worker has taken it within 300ms: no worker is online");
    assert_eq!(alice.get(&created.id).await?.status_message, error.message);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_says_when_its_worker_is_away() -> anyhow::Result<()> {
    let flags = ["--heartbeat", "50ms", "--offline-after", "200ms"];
    let service = Service::start_with(&flags).await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let pulse = actor.pulse(false);
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    actor.assignment().await?;
    drop(pulse);
    let away = until_offline(&alice, &build.id, true).await?;
    assert_eq!(away.state(), BuildState::Claimed);
    let _pulse = actor.pulse(false);
    let back = until_offline(&alice, &build.id, false).await?;
    assert_eq!(back.state(), BuildState::Claimed);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_disk_is_nearly_full_takes_nothing_and_says_so() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let engine = FakeEngine::start().await?;
    let no_disk_is_that_large = i64::MAX.to_string();
    let flags = ["--min-free-disk", no_disk_is_that_large.as_str()];
    let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let admin = admin(&service);
    eventually_true("the worker is shown as draining", async || {
        let request = api::ListWorkersRequest::default();
        let workers = admin.workers.clone().list_workers(request).await?.into_inner().workers;
        Ok(workers.iter().any(|worker| worker.online && worker.draining && !worker.drained))
    })
    .await?;
    let health = HealthClient::new(channel(worker.addr)).check(HealthCheckRequest::default()).await?;
    assert_eq!(health.into_inner().status(), ServingStatus::NotServing);
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    assert_eq!(alice.get_build(&build.id).await?.pending_reason(), PendingReason::WorkersDraining);
    assert!(engine.builds().is_empty());
    Ok(())
}
