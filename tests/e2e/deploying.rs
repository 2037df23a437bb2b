//! What is deployed fits the programs: every flag and every variable in the manifests and the images exists.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Context as _;
use clap::{Command, CommandFactory as _};

/// The flags and the variables of a program, as a command line and an environment have them.
fn known(command: &Command) -> BTreeSet<String> {
    let of_this = command.get_arguments().flat_map(|argument| {
        let flag = argument.get_long().map(|long| format!("--{long}"));
        let variable = argument.get_env().map(|variable| variable.to_string_lossy().into_owned());
        flag.into_iter().chain(variable)
    });
    of_this.chain(command.get_subcommands().flat_map(known)).collect()
}

/// The flags and our variables in a text.
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
        // The engine beside a worker has flags of its own, and Docker has for health checks.
        let ours = text.split("- name: engine\n          image:").next().unwrap_or_default();
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
