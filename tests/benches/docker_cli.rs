//! Wall time of a build beside buildx, with the same engine, Dockerfile and context, in a catalogue with many other images.

use std::{
    env, fs,
    path::{Path, PathBuf},
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
    seed::Catalogue,
    service::Service,
};

const ROUNDS: usize = 10;
const INSTRUCTIONS: &str = "COPY . /\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"for i in 1 2 3; do /bin/busybox echo $i >>/made; done\"]\nRUN [\"/bin/busybox\", \"sha256sum\", \"/bin/busybox\"]\n";

pub(crate) async fn run(catalogue: &Catalogue, goals: &mut Table) -> anyhow::Result<()> {
    let docker_host = env::var("DOCKER_HOST").context("DOCKER_HOST is not set: run tests/bench")?;
    let context = tempfile::tempdir()?;
    fs::create_dir(context.path().join("bin"))?;
    fs::copy("/bin/busybox", context.path().join("bin/busybox")).context("a static busybox is needed")?;
    let archive = archive(context.path())?;

    let copy = catalogue.copy().await?;
    let service = Service::start(copy.data.path(), copy.url.as_deref(), &[]).await?;
    let _worker = service.worker("w1", &docker_host, &[]).await?;
    let builder = service.client("builder", &[Role::Builder]);
    let digest = builder.upload("", &archive).await?.digest;
    let (base, first) =
        builder.create(client::image("Base", "FROM scratch\nENV BASE=yes\nLABEL a=b\n")).await?;
    succeeded(&builder.finished(&first.id).await?)?;
    let base = base.reference.clone();
    for (from, beginning) in [
        ("FROM scratch", "FROM scratch\n".to_owned()),
        ("FROM an image of the catalogue", format!("FROM {base}\n")),
        ("FROM one by ARG", format!("ARG BASE={base}\nFROM $BASE\n")),
    ] {
        let dockerfile = format!("{beginning}{INSTRUCTIONS}");
        fs::write(context.path().join("Dockerfile"), &dockerfile)?;
        for (what, no_cache) in [("nothing cached", true), ("everything cached", false)] {
            let mut image = client::image(&format!("{from}, {what}"), &dockerfile);
            let config = image.config.get_or_insert_default();
            config.no_cache = no_cache;
            if let Some(api::image_config::Source::Dockerfile(dockerfile)) = &mut config.source {
                dockerfile.archive.clone_from(&digest);
            }
            let (image, first) = builder.create(image).await?;
            succeeded(&builder.finished(&first.id).await?)?;
            by_buildx(context.path(), no_cache)?;
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                theirs.push(by_buildx(context.path(), no_cache)?);
                ours.push(by_service(&builder, &image.id).await?);
            }
            let (ours, theirs) = (Samples::new(ours), Samples::new(theirs));
            // 5 % or 30 ms more, whichever is larger.
            let allowed = (theirs.median() * 1.05).max(theirs.median() + 30.0);
            goals.compare(
                format!("wall time of a build, {from}, {what}, over what is allowed beside buildx"),
                format!("{ours} ms"),
                format!("buildx: {theirs} ms, allowed {} ms", figure(allowed)),
                &Samples::one(ours.median() / allowed),
                Goal::AtMost(1.0),
            );
        }
    }
    service.end().await
}

/// Returns the start of a `buildx` command line.
///
/// This is the plugin in the engine's root, without the wrapper scripts around it, or else `docker buildx`
/// from `PATH`.
fn buildx() -> anyhow::Result<Command> {
    let Some(root) = env::var_os("TRAILER_DOCKER_ROOT").map(PathBuf::from) else {
        let mut command = Command::new("docker");
        command.arg("buildx");
        return Ok(command);
    };
    let loader = fs::read_dir(root.join("usr/lib"))?
        .flatten()
        .filter_map(|entry| fs::read_dir(entry.path()).ok())
        .flat_map(|libraries| libraries.flatten().map(|library| library.path()))
        .find(|library| {
            library.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ld-linux-"))
        })
        .context("the engine's root has a loader")?;
    let mut command = Command::new(&loader);
    command.arg("--library-path").args(loader.parent());
    command.arg(root.join("usr/libexec/docker/cli-plugins/docker-buildx"));
    Ok(command)
}

fn by_buildx(context: &Path, no_cache: bool) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut command = buildx()?;
    command.args(["build", "--builder", "default", "--provenance=false", "--tag", "trailer-bench/cli"]);
    command.args(no_cache.then_some("--no-cache")).arg(context);
    let built = command.stdin(Stdio::null()).output()?;
    let took = milliseconds(begun.elapsed());
    anyhow::ensure!(
        built.status.success(),
        "docker buildx build failed: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    Ok(took)
}

fn succeeded(build: &api::Build) -> anyhow::Result<()> {
    anyhow::ensure!(build.state() == api::BuildState::Succeeded, "{:?}", build.error);
    Ok(())
}

/// Returns the time from the call to the last event, in milliseconds.
async fn by_service(builder: &Client, image: &str) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let build = builder.build(image).await?;
    builder.history(&build.id, 0).await?;
    let took = milliseconds(begun.elapsed());
    let build = builder.get_build(&build.id).await?;
    succeeded(&build)?;
    Ok(took)
}

fn archive(context: &Path) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_dir_all(".", context)?;
    Ok(archive.into_inner()?)
}
