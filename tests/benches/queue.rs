//! Build throughput of the queue: by length, by number of workers, and beside a long history. The engine is
//! scripted.

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures_util::{TryStreamExt as _, stream};
use image_service::Role;
use sea_orm::ConnectionTrait as _;

use crate::{
    client::{self, Client},
    fake_engine::{Ended, FakeEngine, Script, State},
    report::{Goal, Samples, Table, figure},
    seed,
    service::{self, DATABASE, Service},
};

const LIMIT: Duration = Duration::from_secs(120);
const RATE: f64 = 400.0;
const WORKERS: usize = 4;
/// Duration of a measurement; `LONG` applies beside a history.
const SHORT: Duration = Duration::from_secs(8);
const LONG: Duration = Duration::from_secs(60);

/// Measures builds per second by length of the queue and by number of workers.
pub(crate) async fn throughput(server: Option<&str>, goals: &mut Table) -> anyhow::Result<()> {
    let database = if server.is_some() { "Postgres" } else { "SQLite" };
    let mut growth = Table::new(&["queued", "workers", "jobs a second"]);
    let mut rates = Vec::new();
    for queued in [10, 100, 1_000, 10_000, 100_000] {
        let rate = jobs(server, queued, WORKERS).await?;
        growth.row(&[queued.to_string(), WORKERS.to_string(), figure(rate)]);
        rates.push(rate);
    }
    let rates = Samples::new(rates);
    let (slowest, fastest) = (rates.quantile(0.0), rates.quantile(1.0));
    goals.compare(
        format!("jobs a second through the queue, {database}, 10 to 100,000 queued, {WORKERS} workers"),
        rates.to_string(),
        "",
        &Samples::one(slowest),
        Goal::AtLeast(RATE),
    );
    goals.compare(
        "the same: the slowest over the fastest",
        "",
        "",
        &Samples::one(slowest / fastest),
        Goal::AtLeast(0.85),
    );
    // The cost of additional workers is measured on SQLite only.
    for workers in if server.is_some() { &[][..] } else { &[1, 2, 8, 16, 32, 64] } {
        let rate = jobs(server, 1_000, *workers).await?;
        growth.row(&["1000".to_owned(), workers.to_string(), figure(rate)]);
    }
    growth.print(&format!("The queue, {database}"));
    Ok(())
}

/// Measures builds per second beside ten million finished builds.
///
/// Most of them are past their retention and are deleted during the measurement. On Postgres, an open
/// transaction also makes the database keep every deleted row.
pub(crate) async fn history(server: Option<&str>, goals: &mut Table) -> anyhow::Result<()> {
    const QUEUED: usize = 1_000;
    let database = if server.is_some() { "Postgres" } else { "SQLite" };
    let without = async || {
        let data = tempfile::tempdir()?;
        let service = queue(data.path(), server, QUEUED).await?;
        rate(service, WORKERS, LONG).await
    };
    let before = without().await?;
    let data = tempfile::tempdir_in(service::kept("runs")?)?;
    let url = match server {
        Some(server) => Some(seed::history_on_postgres(data.path(), server).await?),
        None => {
            seed::copy_history(data.path()).await?;
            None
        }
    };
    let service = Service::start(data.path(), url.as_deref(), &[]).await?;
    create_all(&service, QUEUED).await?;
    let held = match &url {
        Some(url) => {
            let connection = seed::open(url).await?;
            for statement in ["BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT COUNT(*) FROM catalogue"] {
                connection.execute_unprepared(statement).await?;
            }
            Some(connection)
        }
        None => None,
    };
    let beside = rate(service, WORKERS, LONG).await?;
    drop(held);
    let after = without().await?;
    let alone = (before + after) / 2.0;
    goals.compare(
        format!("jobs a second, {database}, beside 10 M finished builds that are being deleted"),
        format!("{}/s", figure(beside)),
        format!("without: {}/s and {}/s", figure(before), figure(after)),
        &Samples::one(beside / alone),
        Goal::AtLeast(0.8),
    );
    Ok(())
}

async fn jobs(server: Option<&str>, queued: usize, workers: usize) -> anyhow::Result<f64> {
    let data = tempfile::tempdir()?;
    let service = queue(data.path(), server, queued).await?;
    rate(service, workers, SHORT).await
}

/// Measures builds per second at a constant queue length, creating a build for each one that ends.
async fn rate(service: Service, workers: usize, lasting: Duration) -> anyhow::Result<f64> {
    const CATCHING_UP: Duration = Duration::from_secs(20);
    const WARMING: Duration = Duration::from_secs(2);
    /// Number of concurrent create calls.
    const CALLERS: usize = 8;
    let engine = FakeEngine::start().await?;
    engine.script(Script::new().step("[1/1] FROM scratch").succeed());
    let mut running = Vec::new();
    for worker in 0..workers {
        let slots = (16 / workers).max(1).to_string();
        running
            .push(service.worker(&format!("w{worker}"), &engine.docker_host(), &["--slots", &slots]).await?);
    }
    let builder = service.client("builder", &[Role::Builder]);
    let created = AtomicUsize::new(0);
    let orders = stream::unfold(0, async |mut ended| {
        let number = created.load(Relaxed);
        while ended <= number {
            tokio::time::sleep(Duration::from_millis(5)).await;
            ended = match done(&engine).await {
                Ok(ended) => ended,
                Err(error) => return Some((Err(error), ended)),
            };
        }
        created.store(number + 1, Relaxed);
        Some((Ok(create(&builder, number)), ended))
    });
    let feed = orders.try_buffer_unordered(CALLERS).try_for_each(async |()| Ok(()));
    let measure = async {
        // Many builds may have ended while the workers were started.
        let begun = Instant::now();
        while created.load(Relaxed) < done(&engine).await? && begun.elapsed() < CATCHING_UP {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(WARMING).await;
        let (before, from) = (done(&engine).await?, Instant::now());
        tokio::time::sleep(lasting).await;
        anyhow::Ok((done(&engine).await? - before) as f64 / from.elapsed().as_secs_f64())
    };
    let rate = tokio::select! {
        fed = feed => anyhow::bail!("creating has ended: {fed:?}"),
        rate = measure => rate?,
    };
    drop(running);
    service.end().await?;
    Ok(rate)
}

/// Returns the number of builds that have succeeded.
async fn done(engine: &FakeEngine) -> anyhow::Result<usize> {
    let mut done = 0;
    let count = |state: &State| {
        done = state.builds.iter().filter(|build| build.ended == Ended::Succeeded).count();
        true
    };
    engine.wait_for(count, LIMIT).await?;
    Ok(done)
}

async fn create(builder: &Client, number: usize) -> anyhow::Result<()> {
    builder.create(client::image(&format!("Queued {number}"), "FROM scratch")).await?;
    Ok(())
}

async fn create_all(service: &Service, count: usize) -> anyhow::Result<()> {
    let builder = service.client("builder", &[Role::Builder]);
    for number in 0..count {
        create(&builder, 1_000_000 + number).await?;
    }
    Ok(())
}

/// Starts a service with `queued` builds in its queue.
async fn queue(data: &Path, server: Option<&str>, queued: usize) -> anyhow::Result<Service> {
    const BY_CALL: usize = 1_000;
    let url = match server {
        Some(server) => Some(seed::new_database(server, "bench_queue").await?),
        None => None,
    };
    let service = Service::start(data, url.as_deref(), &[]).await?;
    create_all(&service, queued.min(BY_CALL)).await?;
    if queued <= BY_CALL {
        return Ok(service);
    }
    service.end().await?;
    let database = match &url {
        Some(url) => seed::open(url).await?,
        None => seed::open_file(&data.join(DATABASE)).await?,
    };
    seed::multiply_builds(&database, queued - BY_CALL).await?;
    if url.is_some() {
        // Autovacuum would do this within a minute.
        seed::execute(&database, "VACUUM ANALYZE").await?;
    }
    database.close().await?;
    Service::start(data, url.as_deref(), &[]).await
}
