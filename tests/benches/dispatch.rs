//! Dispatch latency, and the time until the builds of a lost worker run again. The engine is scripted.

use std::time::{Duration, Instant};

use image_service::Role;

use crate::{
    client,
    fake_engine::{FakeEngine, Gate, Script},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    service::Service,
};

const LIMIT: Duration = Duration::from_secs(120);

/// Measures the time from the acceptance of a build to the engine call, with an idle worker.
pub(crate) async fn latency(goals: &mut Table) -> anyhow::Result<()> {
    const BUILDS: usize = 1_000;
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
    for (quantile, value, goal) in [("p50", times.median(), 2.0), ("p99", times.p99(), 10.0)] {
        goals.compare(
            format!("BuildImage accepted to engine called, idle worker: {quantile}, ms"),
            figure(value),
            "",
            &Samples::one(value),
            Goal::AtMost(goal),
        );
    }
    service.end().await
}

/// Measures the time until a killed worker's build runs again, elsewhere or after a restart.
pub(crate) async fn lost_worker(goals: &mut Table) -> anyhow::Result<()> {
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
    goals.compare(
        "a killed worker's job runs elsewhere: seconds after a lease that begins with the kill",
        figure(late),
        "",
        &Samples::one(late),
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
    goals.compare(
        "a worker comes back without its job: seconds from its start until the job runs again",
        figure(back),
        "",
        &Samples::one(back),
        Goal::AtMost(1.0),
    );
    service.end().await
}
