//! Dependencies that go away under load and come back.
//!
//! The programs recover by themselves, and their health checks report each outage.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use proto::images::{self as api, BuildState};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic::{Status, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    client::{Client, image},
    docker_engine::{BASE, Engine},
    eventually::eventually_true,
    otlp_collector::Collector,
    patience,
    postgres::Postgres,
    stack::{LIMIT, Service, Worker, directory},
};

/// Duration of an outage.
const AWAY: Duration = Duration::from_secs(20);

/// Returns whether a program reports itself as serving.
async fn serves(addr: SocketAddr) -> anyhow::Result<bool> {
    let endpoint = Endpoint::from_shared(format!("http://{addr}"))?.timeout(LIMIT);
    let answer = HealthClient::new(endpoint.connect().await?).check(HealthCheckRequest::default()).await?;
    Ok(answer.into_inner().status() == ServingStatus::Serving)
}

async fn until_serves(addr: SocketAddr, expected: bool) -> anyhow::Result<()> {
    let what = format!("health becomes {expected}");
    eventually_true(&what, async || Ok(serves(addr).await? == expected)).await
}

async fn until_exported(collector: &Collector) -> anyhow::Result<()> {
    eventually_true("the collector receives spans", async || Ok(collector.spans() > 0)).await
}

/// Builds one image after another until `end` is set, and returns the builds.
fn load(client: Client, end: Arc<AtomicBool>) -> JoinHandle<Result<Vec<api::Build>, Status>> {
    tokio::spawn(async move {
        let tries = AtomicUsize::new(0);
        let mut builds = Vec::new();
        while !end.load(Ordering::Relaxed) {
            let name = format!("Image {}", builds.len());
            let dockerfile = format!("FROM {BASE}\nRUN echo {}", uuid::Uuid::new_v4());
            let (_, build) = patience::create(&client, image(&name, &dockerfile), &tries).await?;
            builds.push(build);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(builds)
    })
}

/// Waits for the rest of an outage.
async fn stay_away(since: Instant) {
    tokio::time::sleep(AWAY.saturating_sub(since.elapsed())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_postgres_and_engine_are_taken_away_and_come_back() -> anyhow::Result<()> {
    let directory = directory()?;
    let mut postgres = Postgres::start().await?;
    let collector = Collector::start().await?;
    let at = collector.addr;
    let endpoint = format!("http://{at}");
    let flags = ["--database-url", &postgres.url(), "--otlp-endpoint", &endpoint];
    let service = Service::start(directory.path(), &flags).await?;
    let mut engine = Engine::start(directory.path(), "e1").await?;
    let worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let alice = service.builder("alice");
    let end = Arc::new(AtomicBool::new(false));
    let loading = load(alice.clone(), Arc::clone(&end));
    until_exported(&collector).await?;
    until_serves(service.addr, true).await?;
    until_serves(worker.addr, true).await?;

    // The collector: nothing depends on it.
    drop(collector);
    let since = Instant::now();
    let (_, build) = alice.create(image("Untold", &format!("FROM {BASE}\nRUN echo untold"))).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    assert!(serves(service.addr).await? && serves(worker.addr).await?);
    stay_away(since).await;
    let collector = Collector::start_at(at).await?;

    // The database: the service reports the outage, and the worker stays healthy.
    postgres.program.end(Signal::QUIT).await?;
    let since = Instant::now();
    until_serves(service.addr, false).await?;
    assert!(serves(worker.addr).await?);
    stay_away(since).await;
    assert!(!serves(service.addr).await?);
    postgres.start_again().await?;
    until_serves(service.addr, true).await?;

    // The engine: the worker reports the outage and accepts no builds.
    engine.kill()?;
    let since = Instant::now();
    until_serves(worker.addr, false).await?;
    assert!(serves(service.addr).await?);
    stay_away(since).await;
    engine.start_again().await?;
    engine.answers().await?;
    until_serves(worker.addr, true).await?;

    end.store(true, Ordering::Relaxed);
    let builds = loading.await?.context("a call failed that was tried again as the manual says")?;
    assert!(builds.len() > 10, "{} builds are no load", builds.len());
    for build in builds {
        let ended = alice.finished(&build.id).await?;
        assert_eq!(ended.state(), BuildState::Succeeded, "{ended:?}");
    }
    until_exported(&collector).await
}
