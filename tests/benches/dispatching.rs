//! Builds on their way to an engine: how soon they are there, how many go through, and how soon another worker has those of one
//! that is lost. The engine is scripted.

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures_util::{TryStreamExt as _, stream};
use image_service::Role;

use crate::{
    client::{self, Client},
    engine::{Ended, FakeEngine, Gate, Script, State},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seeding,
    service::Service,
};

const LIMIT: Duration = Duration::from_secs(120);

/// From a build that was accepted to the call of the engine, with a worker that has nothing to do.
pub(crate) async fn latency(table: &mut Table) -> anyhow::Result<()> {
    const BUILDS: usize = 300;
    let data = tempfile::tempdir()?;
    let service = Service::start(data.path(), None, &[]).await?;
    let engine = FakeEngine::start().await?;
    let _worker = service.worker("w1", &engine.docker_host(), &[]).await?;
    let builder = service.client("builder", &[Role::Builder]);
    let (image, first) = builder.create(client::image("Built", "FROM scratch")).await?;
    builder.finished(&first.id).await?;
    let mut times = Vec::new();
    for number in 1..=BUILDS {
        let build = builder.build(&image.id).await?;
        let accepted = Instant::now();
        engine.wait_for(|state| state.builds.len() > number, LIMIT).await?;
        times.push(milliseconds(accepted.elapsed()));
        builder.finished(&build.id).await?;
    }
    let times = Samples::new(times);
    for (quantile, value, goal) in [("p50", times.median(), 5.0), ("p99", times.p99(), 30.0)] {
        table.compare(
            format!("BuildImage accepted to engine called, idle worker: {quantile}, ms"),
            figure(value),
            "",
            &Samples::new(vec![value]),
            Goal::AtMost(goal),
        );
    }
    service.end().await
}

/// Jobs a second through the queue, by its length and by the number of workers.
pub(crate) async fn throughput(table: &mut Table, growth: &mut Table) -> anyhow::Result<()> {
    let mut at_four = Vec::new();
    for queued in [10, 100, 1_000, 10_000, 100_000] {
        let rate = jobs(queued, 4).await?;
        growth.row(&[queued.to_string(), "4".to_owned(), figure(rate)]);
        at_four.push(rate);
    }
    let all = Samples::new(at_four);
    table.compare(
        "jobs a second through the queue, 10 to 100,000 queued, 4 workers",
        all.to_string(),
        "",
        &Samples::new(vec![all.quantile(0.0)]),
        Goal::AtLeast(200.0),
    );
    let flat = all.quantile(0.0) / all.quantile(1.0);
    table.compare(
        "the same: the slowest over the fastest",
        "",
        "",
        &Samples::new(vec![flat]),
        Goal::AtLeast(0.8),
    );
    for workers in [1, 2, 8, 16, 32, 64] {
        growth.row(&["1000".to_owned(), workers.to_string(), figure(jobs(1_000, workers).await?)]);
    }
    Ok(())
}

/// A second, while as many are in the queue: whenever some have ended, as many are created.
async fn jobs(queued: usize, workers: usize) -> anyhow::Result<f64> {
    const CATCHING_UP: Duration = Duration::from_secs(20);
    const WARMING: Duration = Duration::from_secs(2);
    const LASTING: Duration = Duration::from_secs(8);
    /// How many builds are asked for at once.
    const CALLERS: usize = 8;
    let data = tempfile::tempdir()?;
    let service = queue(data.path(), queued).await?;
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
    let orders = stream::unfold(0, async |mut known| {
        let number = created.load(Relaxed);
        while known <= number {
            tokio::time::sleep(Duration::from_millis(5)).await;
            known = match done(&engine).await {
                Ok(known) => known,
                Err(error) => return Some((Err(error), known)),
            };
        }
        created.store(number + 1, Relaxed);
        Some((Ok(create(&builder, number)), known))
    });
    let feed = orders.try_buffer_unordered(CALLERS).try_for_each(async |()| Ok(()));
    let measure = async {
        // Much may have ended while the workers were started.
        let begun = Instant::now();
        while created.load(Relaxed) < done(&engine).await? && begun.elapsed() < CATCHING_UP {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(WARMING).await;
        let (before, from) = (done(&engine).await?, Instant::now());
        tokio::time::sleep(LASTING).await;
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

/// How many builds have succeeded.
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

/// A service with so many builds in the queue.
async fn queue(data: &Path, queued: usize) -> anyhow::Result<Service> {
    let service = Service::start(data, None, &[]).await?;
    let builder = service.client("builder", &[Role::Builder]);
    let by_call = queued.min(1_000);
    for number in 0..by_call {
        create(&builder, 1_000_000 + number).await?;
    }
    if by_call == queued {
        return Ok(service);
    }
    service.end().await?;
    let database = seeding::open_file(&data.join("catalogue.sqlite")).await?;
    seeding::multiply_builds(&database, queued - by_call).await?;
    database.close().await?;
    Service::start(data, None, &[]).await
}

/// How soon the job of a worker that is killed runs elsewhere.
pub(crate) async fn lost_worker(table: &mut Table) -> anyhow::Result<()> {
    const LEASE: Duration = Duration::from_secs(45);
    let data = tempfile::tempdir()?;
    let service = Service::start(data.path(), None, &[]).await?;
    let engine = FakeEngine::start().await?;
    engine.script(Script::new().step("[1/1] RUN wait").pause(&Gate::new()).succeed());
    let builder = service.client("builder", &[Role::Builder]);
    let calls = |calls: usize| engine.wait_for(move |state| state.builds.len() >= calls, LIMIT);

    let mut first = service.worker("w1", &engine.docker_host(), &[]).await?;
    builder.create(client::image("Lost", "FROM scratch")).await?;
    calls(1).await?;
    let _second = service.worker("w2", &engine.docker_host(), &[]).await?;
    let killed = Instant::now();
    first.kill()?;
    calls(2).await?;
    let late = killed.elapsed().as_secs_f64() - LEASE.as_secs_f64();
    table.compare(
        "a killed worker's job runs elsewhere: seconds after a lease that begins with the kill",
        figure(late),
        "",
        &Samples::new(vec![late]),
        Goal::AtMost(1.0),
    );

    let mut third = service.worker("w3", &engine.docker_host(), &["--labels", "its=own"]).await?;
    let mut image = client::image("Its own", "FROM scratch");
    image.config.get_or_insert_default().worker_labels.insert("its".to_owned(), "own".to_owned());
    builder.create(image).await?;
    calls(3).await?;
    third.kill()?;
    let begun = Instant::now();
    third.start_again()?;
    calls(4).await?;
    let back = begun.elapsed().as_secs_f64();
    table.compare(
        "a worker comes back without its job: seconds from its start until the job runs again",
        figure(back),
        "",
        &Samples::new(vec![back]),
        Goal::AtMost(1.0),
    );
    service.end().await
}
