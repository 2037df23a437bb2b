//! Throughput of log lines from an engine through a worker into the database and to a watcher.

use std::time::{Duration, Instant};

use image_service::Role;
use proto::images::{self as api, build_event::Event};
use tokio::task::JoinSet;

use crate::{
    client::{self, Client},
    fake_engine::{FakeEngine, Script},
    report::{Goal, Samples, Table, figure},
    service::Service,
};

const JOBS: usize = 4;
const LINES: usize = 250_000;

/// Measures four builds that print as fast as they are read, each with a watcher.
pub(crate) async fn run(goals: &mut Table) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let service = Service::start(data.path(), None, &[]).await?;
    let engine = FakeEngine::start().await?;
    engine.script(
        Script::new()
            .step("[1/1] RUN print")
            .logs(LINES, |line| {
                format!(
                    "{line:07} {}\n",
                    "what a build prints on a line of about a hundred characters, as many do it, word by wor"
                )
            })
            .succeed(),
    );
    let limit = (1_u64 << 30).to_string();
    let slots = JOBS.to_string();
    let worker =
        service.worker("w1", &engine.docker_host(), &["--slots", &slots, "--log-limit", &limit]).await?;
    let builder = service.client("builder", &[Role::Builder]);
    let memory = (service.memory()?, worker.memory("VmRSS:")? as f64 / f64::from(1 << 20));
    let begun = Instant::now();
    let mut watches = JoinSet::new();
    for job in 0..JOBS {
        let (_, build) = builder.create(client::image(&format!("Printing {job}"), "FROM scratch")).await?;
        watches.spawn(watch(service.client("builder", &[Role::Builder]), build.id));
    }
    let mut lines = 0;
    while let Some(watched) = watches.join_next().await {
        lines += watched??;
    }
    let rate = lines as f64 / begun.elapsed().as_secs_f64();
    anyhow::ensure!(lines == JOBS * LINES, "{lines} lines came of {}", JOBS * LINES);
    goals.compare(
        "log lines a second of 100 bytes, 4 jobs, each durable and with a watcher",
        format!("{}/s of {lines} lines", figure(rate)),
        "",
        &Samples::one(rate),
        Goal::AtLeast(300_000.0),
    );
    let peak = |program: f64, before: f64| format!("{} MiB, {} before", figure(program), figure(before));
    let of_service = service.peak_memory()?;
    goals.compare(
        "the same: the most memory of image-service, MiB",
        peak(of_service, memory.0),
        "",
        &Samples::one(of_service),
        Goal::AtMost(256.0),
    );
    let of_worker = worker.peak_memory()? as f64 / f64::from(1 << 20);
    goals.compare(
        "the same: the most memory of build-worker, MiB",
        peak(of_worker, memory.1),
        "",
        &Samples::one(of_worker),
        Goal::AtMost(256.0),
    );
    drop(worker);
    service.end().await
}

async fn watch(client: Client, build: String) -> anyhow::Result<usize> {
    let request = api::WatchBuildRequest { id: build, after_sequence: 0 };
    let mut messages = client.builds.clone().watch_build(request).await?.into_inner();
    let limit = Duration::from_secs(300);
    let mut lines = 0;
    let reading = async {
        while let Some(message) = messages.message().await? {
            lines +=
                message.events.iter().filter(|event| matches!(event.event, Some(Event::LogLine(_)))).count();
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(limit, reading).await??;
    Ok(lines)
}
