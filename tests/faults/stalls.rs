//! A database that stalls: what clients, probes and running builds see after 3, 10 and 60 seconds.

use std::time::{Duration, Instant};

use proto::images::BuildState;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    answers::{lines, refused},
    client::{channel, image},
    docker_engine::Engine,
    eventually::eventually_true,
    postgres::Postgres,
    stack::{Service, Worker, counted, counting, directory, ended, last_attempt, watch},
};

async fn serves(service: &Service) -> anyhow::Result<bool> {
    let answer = HealthClient::new(channel(service.addr)).check(HealthCheckRequest::default()).await?;
    Ok(answer.into_inner().status() == ServingStatus::Serving)
}

/// Checks that the service stays ready until `end`.
async fn stays_ready(service: &Service, end: Instant) -> anyhow::Result<()> {
    while Instant::now() < end {
        anyhow::ensure!(serves(service).await?, "NOT_SERVING while the database stalls");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_stall_of_the_database_makes_no_replica_unready_and_stops_no_build() -> anyhow::Result<()> {
    const COUNT: u32 = 250;
    let directory = directory()?;
    let postgres = Postgres::start().await?;
    let service = Service::start(directory.path(), &["--database-url", &postgres.url()]).await?;
    let engine = Engine::start(directory.path(), "e1").await?;
    let _worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("Running", &counting(COUNT, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    alice.until(&build.id, |build| build.log_bytes > 0).await?;

    postgres.stall(true)?;
    let end = Instant::now() + Duration::from_secs(3);
    let (read, written, ready) =
        tokio::join!(alice.get(&created.id), alice.create(image("Three", "FROM scratch")), async {
            let ready = stays_ready(&service, end).await;
            postgres.stall(false)?;
            ready
        });
    ready?;
    assert_eq!(read?.id, created.id, "a read waits");
    written?;

    postgres.stall(true)?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs(10);
    let (read, written, ready) = tokio::join!(
        async { (alice.get(&created.id).await, begun.elapsed()) },
        alice.create(image("Ten", "FROM scratch")),
        async {
            let ready = stays_ready(&service, end).await;
            postgres.stall(false)?;
            ready
        }
    );
    ready?;
    assert_eq!(refused(read.0), (Code::Unavailable, "STORE_BUSY".to_owned()));
    assert!(read.1 < Duration::from_secs(8), "a read fails in good time: {:?}", read.1);
    written?;

    assert_eq!(lines(&ended(watching, Duration::from_secs(60)).await?), counted(COUNT));
    let finished = alice.get_build(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_stall_of_the_database_is_told_and_loses_no_build() -> anyhow::Result<()> {
    const STALL: Duration = Duration::from_secs(60);
    /// Lines that take longer than the worker goes on without its lease: what has been printed by then is not in
    /// the engine's cache.
    const COUNT: u32 = 450;
    let directory = directory()?;
    let postgres = Postgres::start().await?;
    let mut service = Service::start(directory.path(), &["--database-url", &postgres.url()]).await?;
    let engine = Engine::start(directory.path(), "e1").await?;
    let _worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Running", &counting(COUNT, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    alice.until(&build.id, |build| build.log_bytes > 0).await?;

    postgres.stall(true)?;
    let begun = Instant::now();
    let writing = tokio::spawn({
        let alice = alice.clone();
        async move { alice.create(image("Sixty", "FROM scratch")).await }
    });
    eventually_true("health tells it", async || Ok(!serves(&service).await?)).await?;
    assert!(begun.elapsed() > Duration::from_secs(15), "{:?}", begun.elapsed());
    // The port accepts connections, as the probe of liveness asks.
    service.answers().await?;
    assert_eq!(refused(writing.await?).0, Code::Unavailable);
    tokio::time::sleep(STALL.saturating_sub(begun.elapsed())).await;
    postgres.stall(false)?;
    eventually_true("it is ready again", async || serves(&service).await).await?;
    service.program.require_life()?;

    let events = ended(watching, Duration::from_secs(120)).await?;
    assert_eq!(lines(last_attempt(&events)), counted(COUNT));
    assert_eq!(alice.get_build(&build.id).await?.state(), BuildState::Succeeded);
    Ok(())
}
