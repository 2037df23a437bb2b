//! Restarts of the service while a build runs, on a catalogue that takes long to load.

use image_service::Role;
use proto::images::BuildState;

use crate::{
    client,
    fake_engine::{FakeEngine, Gate, Script},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seed::Catalogue,
    service::Service,
};

const RESTARTS: usize = 3;
/// Maximum time until dispatch is served, in milliseconds, whatever the number of images.
const AT_ONCE: f64 = 1_000.0;

pub(crate) async fn run(catalogue: &Catalogue, goals: &mut Table) -> anyhow::Result<()> {
    let copy = catalogue.copy().await?;
    let mut service = Service::start(copy.data.path(), copy.url.as_deref(), &[]).await?;
    let engine = FakeEngine::start().await?;
    let _worker = service.worker("w1", &engine.docker_host(), &[]).await?;
    let (mut kept, mut of_dispatch, mut of_catalogue) = (0, Vec::new(), Vec::new());
    for _ in 0..RESTARTS {
        let gate = Gate::new();
        engine.script(
            Script::new().step("[1/1] RUN wait").log("before\n").pause(&gate).log("after\n").succeed(),
        );
        let builder = service.client("builder", &[Role::Builder]);
        let (_, build) = builder.create(client::image("Running", "FROM scratch\nRUN wait")).await?;
        gate.reached().await;
        of_dispatch.push(milliseconds(service.restart().await?));
        of_catalogue.push(milliseconds(service.ready_after));
        gate.open();
        let finished = service.client("builder", &[Role::Builder]).finished(&build.id).await?;
        let is_kept =
            (finished.state(), finished.attempt, finished.failures) == (BuildState::Succeeded, 1, 0);
        kept += usize::from(is_kept);
        if !is_kept {
            eprintln!("    the build was not kept: {finished:?}");
        }
    }
    let of_dispatch = Samples::new(of_dispatch);
    let what = format!(
        "{} images, {}, restart while a build runs",
        figure(catalogue.images as f64),
        catalogue.database()
    );
    goals.compare(
        format!("{what}: builds that their worker kept, of {RESTARTS}"),
        "",
        "",
        &Samples::one(kept as f64),
        Goal::AtLeast(RESTARTS as f64),
    );
    goals.compare(
        "the same: until dispatch is SERVING, ms",
        of_dispatch.to_string(),
        format!("the catalogue: {}", Samples::new(of_catalogue)),
        &of_dispatch,
        Goal::AtMost(AT_ONCE),
    );
    service.end().await
}
