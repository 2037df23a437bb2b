//! Lookups of registry credentials by a worker, on a real engine and a registry that requires a password.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use anyhow::Context as _;
use proto::images::{Build, BuildErrorKind, BuildState, Image};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    base_image,
    client::{Client, image},
    engine_fixture,
    eventually::eventually_true,
    process::{Program, bound_to_test, program},
    registries::{Setting, pulled},
    registry::{DockerConfig, PASSWORD, USER},
    stack::Service,
};

/// Builds an image and returns the build once it has ended. The record is deleted.
pub(crate) async fn finished(alice: &Client, wanted: Image) -> anyhow::Result<Build> {
    let (created, build) = alice.create(wanted).await?;
    let finished = alice.finished(&build.id).await?;
    alice.delete(&created.id).await?;
    Ok(finished)
}

/// Returns an image that is built from `base`, and never from a cache.
pub(crate) fn from(base: &str) -> Image {
    let run = uuid::Uuid::new_v4();
    image(&format!("From {run}"), &format!("FROM {base}\nENV RUN={run}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_counts_under_every_spelling_of_its_registry() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    setting.publish_base("crew/base").await?;
    let reference = setting.in_registry("crew/base:1");
    let host = setting.registry.addr;
    let alice = setting.alice();
    for key in [
        format!("https://{host}"),
        format!("http://{host}/"),
        format!("https://{host}/v2/"),
        format!("{host}/v1/"),
        format!("{host}/crew"),
        format!("{host}/crew/base"),
    ] {
        setting.config.write(&json!({ "auths": { &key: DockerConfig::entry(PASSWORD) } }).to_string())?;
        let build = finished(&alice, pulled(&key, &reference)).await?;
        assert_eq!(build.state(), BuildState::Succeeded, "pull with {key}: {build:?}");
        let build = finished(&alice, from(&reference)).await?;
        assert_eq!(build.state(), BuildState::Succeeded, "FROM with {key}: {build:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_with_a_path_gives_nothing_to_other_repositories() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    setting.publish_base("crew/base").await?;
    setting.publish_base("crewless/base").await?;
    let key = setting.in_registry("crew");
    setting.config.write(&json!({ "auths": { key: DockerConfig::entry(PASSWORD) } }).to_string())?;
    let alice = setting.alice();
    let (inside, outside) = (setting.in_registry("crew/base:1"), setting.in_registry("crewless/base:1"));
    let both = from(&format!("{inside} AS inside\nFROM {outside}"));
    for wanted in [pulled("Outside", &outside), from(&outside), both] {
        let build = finished(&alice, wanted).await?;
        let error = build.error.clone().context("an error")?;
        assert_eq!((build.state(), error.kind()), (BuildState::Failed, BuildErrorKind::User), "{build:?}");
        // The wording depends on the engine's version.
        let words = ["no basic auth credentials", "unauthorized", "authentication required"];
        assert!(words.iter().any(|words| error.message.contains(words)), "{error:?}");
    }
    let build = finished(&alice, from(&inside)).await?;
    assert_eq!(build.state(), BuildState::Succeeded, "{build:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_hinders_only_what_requires_credentials() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    setting.publish_base("base").await?;
    let local = format!("trailer-test/base-{}:latest", setting.run);
    base_image::import(&setting.docker, &local).await?;
    let alice = setting.alice();
    for content in ["", "\u{feff}{}", "{\"auths\": {},}"] {
        setting.config.write(content)?;
        let build = finished(&alice, from(&local)).await?;
        assert_eq!(build.state(), BuildState::Succeeded, "{build:?}");
        let reference = setting.in_registry("base:1");
        for wanted in [pulled("Private", &reference), from(&reference)] {
            let build = finished(&alice, wanted).await?;
            let error = build.error.clone().context("an error")?;
            // Who wrote the configuration of the image cannot repair the worker's file.
            assert_eq!(error.kind(), BuildErrorKind::Infrastructure, "{build:?}");
            assert!(error.message.contains("config.json: it is "), "{error:?}");
        }
    }
    setting.remove(&local).await
}

#[tokio::test(flavor = "multi_thread")]
async fn helpers_are_asked_for_their_registries_alone() -> anyhow::Result<()> {
    // The worker of this setting has no helper: builds are pinned to another one.
    let setting = Setting::start().await?;
    setting.publish_base("base").await?;
    let reference = setting.in_registry("base:1");
    let host = setting.registry.addr;
    let directory = tempfile::tempdir()?;
    let marks = directory.path().join("asked");
    let helpers = directory.path().join("helpers");
    fs::create_dir(&helpers)?;
    let answer = json!({ "Username": USER, "Secret": PASSWORD });
    for (name, script) in [
        (
            "store",
            format!(
                "[ \"$(cat)\" = {host} ] && echo '{answer}' && exit\necho 'credentials not found in native keychain'; exit 1"
            ),
        ),
        ("hangs", format!("cat >> {}; sleep 600", marks.display())),
    ] {
        let path = helpers.join(format!("docker-credential-{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let config = DockerConfig::with(PASSWORD, &[])?;
    let name = format!("helped-{}", setting.run);
    let mut worker = start_worker(&setting.service, &name, directory.path(), config.path()?).await?;
    let pinned = |mut wanted: Image| {
        if let Some(config) = &mut wanted.config {
            config.worker.clone_from(&name);
        }
        wanted
    };
    let alice = setting.alice();

    config.write(&json!({ "credsStore": "store" }).to_string())?;
    for wanted in [pulled("Stored", &reference), from(&reference)] {
        let build = finished(&alice, pinned(wanted)).await?;
        assert_eq!(build.state(), BuildState::Succeeded, "{build:?}");
    }

    let unused = json!({ "credsStore": "store", "credHelpers": { "unused.example": "hangs" } });
    config.write(&unused.to_string())?;
    let build = finished(&alice, pinned(from(&reference))).await?;
    assert_eq!(build.state(), BuildState::Succeeded, "{build:?}");
    assert!(!marks.exists(), "a helper was asked for a registry that the build does not use");

    config.write(&json!({ "credHelpers": { host.to_string(): "hangs" } }).to_string())?;
    for wanted in [pulled("Waiting", &reference), from(&setting.in_registry("other:1"))] {
        let (created, build) = alice.create(pinned(wanted)).await?;
        eventually_true("the helper is asked", async || Ok(marks.exists())).await?;
        let begun = Instant::now();
        alice.cancel(&created.id).await?;
        let cancelled = alice.finished(&build.id).await?;
        assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        fs::remove_file(&marks)?;
    }
    worker.require_life()
}

/// Starts a worker with the helpers in a directory on its `PATH`.
pub(crate) async fn start_worker(
    service: &Service,
    name: &str,
    directory: &std::path::Path,
    config: &str,
) -> anyhow::Result<Program> {
    let (_, docker_host) = engine_fixture::connect().await?;
    let token_file = directory.join("token");
    fs::write(&token_file, service.token(name, &[image_service::Role::Worker]))?;
    let path = format!("PATH={}:{}", directory.join("helpers").display(), std::env::var("PATH")?);
    let command = bound_to_test().into_iter().chain(["env".to_owned(), path, program("build-worker")?]);
    let flags = [
        ("server", format!("http://{}", service.addr)),
        ("token-file", token_file.display().to_string()),
        ("name", name.to_owned()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("docker-host", docker_host),
        ("docker-config", config.to_owned()),
        ("spool-dir", directory.join("spool").display().to_string()),
    ];
    let command = command.chain(flags.into_iter().map(|(flag, value)| format!("--{flag}={value}")));
    Program::start(directory, name, command)
}
