//! Outages of the service or its database, which disturb no build and no watch.

use std::{future::Future, time::Duration};

use proto::images::BuildState;
use rustix::process::Signal;
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database};

use crate::{
    answers::lines,
    client::image,
    docker_engine::Engine,
    postgres::Postgres,
    stack::{LIMIT, Service, Worker, counted, counting, directory, ended, last_attempt, watch},
};

/// Duration of an outage. With the default settings, no work stops before 30 s.
const AWAY: Duration = Duration::from_secs(20);

/// Injects a fault in the middle of a build of about `seconds` and checks that it has no effect.
async fn undisturbed<F>(
    directory: &std::path::Path,
    service: Service,
    seconds: u32,
    fault: impl FnOnce(Service) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<Service>>,
{
    let alice = service.builder("alice");
    let engine = Engine::start(directory, "e1").await?;
    let _worker = Worker::start(directory, &service, service.addr, "w1", &engine, 2)?;
    let count = seconds * 10;
    let (_, build) = alice.create(image("Counting", &counting(count, "0.1"))).await?;
    let watching = watch(&alice, &build.id);
    alice.until(&build.id, |build| build.log_bytes > 0).await?;
    let _service = fault(service).await?;
    let running = alice.until(&build.id, |_| true).await?;
    assert_eq!(running.state(), BuildState::Running, "it took place in the middle of the build");
    let events = ended(watching, LIMIT * 2).await?;
    assert_eq!(lines(last_attempt(&events)), counted(count));
    let finished = alice.get_build(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_and_away_disturbs_no_build() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    undisturbed(directory.path(), service, 25, async |mut service: Service| {
        service.kill()?;
        tokio::time::sleep(AWAY).await;
        service.start_again()?;
        service.answers().await?;
        Ok(service)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_is_away_disturbs_no_build() -> anyhow::Result<()> {
    let directory = directory()?;
    let mut postgres = Postgres::start().await?;
    let service = Service::start(directory.path(), &["--database-url", &postgres.url()]).await?;
    undisturbed(directory.path(), service, 25, async |service| {
        postgres.program.end(Signal::QUIT).await?;
        tokio::time::sleep(AWAY).await;
        postgres.start_again().await?;
        Ok(service)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_another_process_locks_disturbs_no_build() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    undisturbed(directory.path(), service, 12, async |service: Service| {
        let mut options = ConnectOptions::new(format!("sqlite://{}", service.database_file().display()));
        options.max_connections(1).map_sqlx_sqlite_opts(|sqlite| sqlite.busy_timeout(LIMIT));
        let other = Database::connect(options).await?;
        other.execute_unprepared("BEGIN EXCLUSIVE").await?;
        tokio::time::sleep(Duration::from_secs(8)).await;
        other.execute_unprepared("COMMIT").await?;
        other.close().await?;
        Ok(service)
    })
    .await
}
