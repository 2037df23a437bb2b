//! Deployment files that match the programs: every flag and variable in the manifests and images exists, and the images run.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::{process::program, stack::LIMIT};

/// Returns the flags and the environment variables of a program and its subcommands.
fn known(command: &clap::Command) -> BTreeSet<String> {
    let of_this = command.get_arguments().flat_map(|argument| {
        let flag = argument.get_long().map(|long| format!("--{long}"));
        let variable = argument.get_env().map(|variable| variable.to_string_lossy().into_owned());
        flag.into_iter().chain(variable)
    });
    of_this.chain(command.get_subcommands().flat_map(known)).collect()
}

/// Returns the flags and the `TRAILER_` variables in a text.
fn named(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(|line| line.split(|c| !is_part(c)))
        .filter(|word| {
            let is_flag = word
                .strip_prefix("--")
                .is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
            is_flag || word.starts_with("TRAILER_")
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_flag_and_variable_that_is_deployed_exists() -> anyhow::Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let service = known(&image_service::Cli::command());
    let worker = known(&build_worker::Cli::command());
    let mut seen = 0;
    for (file, known) in [
        ("kubernetes/image-service.yaml", &service),
        ("kubernetes/build-worker.yaml", &worker),
        ("images/image-service.Dockerfile", &service),
        ("images/build-worker.Dockerfile", &worker),
        ("compose/compose.yaml", &service.union(&worker).cloned().collect()),
    ] {
        let text = fs::read_to_string(deploy.join(file)).with_context(|| file.to_owned())?;
        // The engine beside a worker has flags of its own, and so do Docker's health checks.
        let ours = text.split("initContainers:").next().unwrap_or_default();
        let ours: String = ours
            .lines()
            .filter(|line| !line.starts_with("HEALTHCHECK") && !line.starts_with("COPY"))
            .collect::<Vec<_>>()
            .join("\n");
        let of_compose = [
            "TRAILER_COMPOSE_STATE",
            "TRAILER_PORT",
            "TRAILER_REGISTRY_PORT",
            "TRAILER_DOCKER_SOCKET",
            "TRAILER_DOCKER_GROUP",
        ];
        for name in named(&ours) {
            seen += 1;
            assert!(known.contains(&name) || of_compose.contains(&name.as_str()), "{file}: {name}");
        }
    }
    assert!(seen > 30, "{seen}: what is deployed is not found");
    Ok(())
}

#[test]
fn workers_on_kubernetes_do_not_wait_for_the_catalogue() -> anyhow::Result<()> {
    let kubernetes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes");
    let worker = fs::read_to_string(kubernetes.join("build-worker.yaml"))?;
    let (_, server) = worker.split_once("--server=https://").context("no --server")?;
    let (name, _) = server.split_once('.').context("no name of a service")?;
    let service = fs::read_to_string(kubernetes.join("image-service.yaml"))?;
    let is_it =
        |object: &&str| object.contains("kind: Service\n") && object.contains(&format!("  name: {name}\n"));
    let object = service.split("---\n").find(is_it).with_context(|| format!("no Service {name}"))?;
    assert!(object.contains("\n  publishNotReadyAddresses: true\n"), "{object}");
    Ok(())
}

/// Runs a command that must succeed, and returns its output.
fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    anyhow::ensure!(
        output.status.success(),
        "{command:?}: {said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

fn docker(arguments: &[&str]) -> anyhow::Result<String> {
    output_of(Command::new("docker").args(arguments))
}

/// A container that is removed when dropped.
struct Container(String);

impl Drop for Container {
    fn drop(&mut self) {
        let _ = docker(&["rm", "--force", "--volumes", &self.0]);
    }
}

#[test]
fn the_images_run_as_nobody_in_particular_and_say_how_they_are() -> anyhow::Result<()> {
    let programs = Path::new(&program("image-service")?).parent().context("a directory")?.to_owned();
    let profile = if programs.ends_with("release") { "release" } else { "dev" };
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/images/build");
    output_of(
        Command::new(build).args(["--profile", profile, "--tag", "test"]).env("TRAILER_TEST_BUILT", "yes"),
    )?;
    for image in ["trailer-images/image-service:test", "trailer-images/build-worker:test"] {
        assert_eq!(docker(&["inspect", "--format", "{{.Config.User}}", image])?, "65532:65532");
        let megabytes = docker(&["inspect", "--format", "{{.Size}}", image])?.parse::<u64>()? >> 20;
        assert!(megabytes < 100, "{image}: {megabytes} MiB");
        let refused = docker(&["run", "--rm", image]).expect_err("it listens beyond loopback").to_string();
        assert!(refused.contains("--allow-plaintext") || refused.contains("--token-file"), "{refused}");
    }
    let run = ["run", "--detach", "--read-only", "--cap-drop", "ALL", "trailer-images/image-service:test"];
    let container = Container(docker(&[run.as_slice(), &["serve", "--allow-plaintext"]].concat())?);
    let health = || docker(&["inspect", "--format", "{{.State.Health.Status}}", &container.0]);
    let begun = Instant::now();
    while health()? != "healthy" {
        let log = docker(&["logs", &container.0])?;
        anyhow::ensure!(begun.elapsed() < LIMIT * 2, "it does not become healthy: {log}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let pid = docker(&["inspect", "--format", "{{.State.Pid}}", &container.0])?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    assert!(status.contains("Uid:\t65532\t65532\t65532\t65532"), "{status}");
    docker(&["exec", &container.0, "/usr/local/bin/image-service", "token", "--subject", "alice"])?;
    Ok(())
}
