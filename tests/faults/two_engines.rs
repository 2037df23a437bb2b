//! Workers with an engine each: what only one engine holds.

use anyhow::Context as _;
use proto::images::BuildState;

use crate::{
    answers::lines,
    client::image,
    docker_engine::{BASE, Engine},
    stack::{Service, Worker, counting, directory},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_build_runs_where_its_base_is() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let mut engines = Vec::new();
    let mut workers = Vec::new();
    for name in ["w1", "w2"] {
        let engine = Engine::start(directory.path(), &format!("e-{name}")).await?;
        workers.push(Worker::start(directory.path(), &service, service.addr, name, &engine, 1)?);
        engines.push(engine);
    }
    let pinned = |name: &str, dockerfile: &str, worker: &str| {
        let mut image = image(name, dockerfile);
        image.config.get_or_insert_default().worker = worker.to_owned();
        image
    };
    let from = format!("FROM {BASE}\nRUN echo of the base > /text");
    let (base, build) = alice.create(pinned("Base", &from, "w1")).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);

    // Only the other worker is free.
    let (_, busy) = alice.create(pinned("Busy", &counting(30, "0.1"), "w1")).await?;
    alice.until(&busy.id, |build| build.log_bytes > 0).await?;
    let dockerfile = format!("FROM {}\nRUN [\"/bin/busybox\", \"cat\", \"/text\"]", base.reference);
    let (_, build) = alice.create(image("Child", &dockerfile)).await?;
    let built = alice.finished(&build.id).await?;
    assert_eq!(
        (built.state(), built.worker.as_str(), built.attempt, built.failures),
        (BuildState::Succeeded, "w1", 2, 0),
        "{built:?}"
    );
    assert!(lines(&alice.history(&build.id, 0).await?).contains(&"of the base"));

    // A pin that excludes that worker is the user's error.
    let (_, build) = alice.create(pinned("Pinned", &dockerfile, "w2")).await?;
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.context("an error")?;
    assert_eq!((failed.attempt, error.message.contains("worker w1")), (1, true), "{error:?}");
    Ok(())
}
