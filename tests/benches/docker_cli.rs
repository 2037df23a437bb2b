//! The wall time of a build, beside that of the Docker CLI with the same engine, Dockerfile and context.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::Context as _;
use image_service::Role;
use proto::images as api;

use crate::{
    client::{self, Client},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    service::Service,
};

const ROUNDS: usize = 10;
const DOCKERFILE: &str = "FROM scratch\nCOPY . /\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"for i in 1 2 3; do /bin/busybox echo $i >>/made; done\"]\nRUN [\"/bin/busybox\", \"sha256sum\", \"/bin/busybox\"]\n";

pub(crate) async fn run(table: &mut Table) -> anyhow::Result<()> {
    let docker_host = std::env::var("DOCKER_HOST").context("DOCKER_HOST is not set: run tests/bench")?;
    let context = tempfile::tempdir()?;
    std::fs::create_dir(context.path().join("bin"))?;
    std::fs::copy("/bin/busybox", context.path().join("bin/busybox"))
        .context("a static busybox is needed")?;
    let archive = archive(context.path())?;
    std::fs::write(context.path().join("Dockerfile"), DOCKERFILE)?;

    let data = tempfile::tempdir()?;
    let service = Service::start(data.path(), None, &[]).await?;
    let _worker = service.worker("w1", &docker_host, &[]).await?;
    let builder = service.client("builder", &[Role::Builder]);
    let digest = builder.upload("", &archive).await?.digest;
    for (what, no_cache) in [("nothing cached", true), ("everything cached", false)] {
        let mut image = client::image(&format!("Beside the CLI, {what}"), DOCKERFILE);
        let config = image.config.get_or_insert_default();
        config.no_cache = no_cache;
        if let Some(api::image_config::Source::Dockerfile(dockerfile)) = &mut config.source {
            dockerfile.archive.clone_from(&digest);
        }
        let (image, first) = builder.create(image).await?;
        let first = builder.finished(&first.id).await?;
        anyhow::ensure!(first.state() == api::BuildState::Succeeded, "{:?}", first.error);
        by_cli(context.path(), no_cache)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            theirs.push(by_cli(context.path(), no_cache)?);
            ours.push(by_service(&builder, &image.id).await?);
        }
        let (ours, theirs) = (Samples::new(ours), Samples::new(theirs));
        // 1.05 times, or 30 ms more.
        let allowed = (theirs.median() * 1.05).max(theirs.median() + 30.0);
        table.compare(
            format!("wall time of a build, {what}, over what is allowed beside the CLI's"),
            format!("{ours} ms"),
            format!("docker build: {theirs} ms, allowed {} ms", figure(allowed)),
            &Samples::new(vec![ours.median() / allowed]),
            Goal::AtMost(1.0),
        );
    }
    service.end().await
}

fn by_cli(context: &Path, no_cache: bool) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut command = Command::new("docker");
    command.args(["build", "--tag", "trailer-bench/cli"]).args(no_cache.then_some("--no-cache")).arg(context);
    let built = command.env("DOCKER_BUILDKIT", "1").stdin(Stdio::null()).output()?;
    let took = milliseconds(begun.elapsed());
    anyhow::ensure!(
        built.status.success(),
        "docker build failed: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    Ok(took)
}

/// From the call to the last event.
async fn by_service(builder: &Client, image: &str) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let build = builder.build(image).await?;
    builder.history(&build.id, 0).await?;
    let took = milliseconds(begun.elapsed());
    let build = builder.get_build(&build.id).await?;
    anyhow::ensure!(build.state() == api::BuildState::Succeeded, "{:?}", build.error);
    Ok(took)
}

fn archive(context: &Path) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_dir_all(".", context)?;
    Ok(archive.into_inner()?)
}
