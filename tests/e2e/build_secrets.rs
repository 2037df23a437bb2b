//! Secrets and SSH agents that builds use by name, on the real Docker Engine that `tests/run` provides.

use std::{fs, process::Command};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bollard::Docker;
use futures_util::TryStreamExt as _;
use proto::images::{
    Build, BuildErrorKind, BuildSecret, BuildState, DockerfileSource, Image, SshAgent, build_event::Event,
    image_config::Source,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    answers::{joined_lines, lines},
    client::{Client, image, of_source},
    contexts::tar_of,
    debian_workspace::PATIENCE,
    engine_fixture::Real,
    eventually::eventually_within,
    fake_engine::FakeEngine,
    stack::{Service, Worker},
    web_server::{Answer, WebServer, commit_submodule, make_repository},
};

mod package_index;
mod ssh;

const TOKEN: &str = "tok+en/4711=ä-0815";

/// A directory of secrets.
struct Secrets(TempDir);

impl Secrets {
    /// Creates secrets, each with those who may use it.
    fn new(secrets: &[(&str, &str, Value)]) -> anyhow::Result<Self> {
        let this = Self(tempfile::tempdir()?);
        let rules: serde_json::Map<String, Value> =
            secrets.iter().map(|(name, _, rule)| ((*name).to_owned(), rule.clone())).collect();
        this.write("trailer.json", &json!({ "secrets": rules }).to_string())?;
        for (name, value, _) in secrets.iter().filter(|(_, value, _)| !value.is_empty()) {
            this.write(name, value)?;
        }
        Ok(this)
    }

    fn write(&self, name: &str, value: &str) -> anyhow::Result<()> {
        Ok(fs::write(self.0.path().join(name), value)?)
    }

    fn path(&self) -> anyhow::Result<&str> {
        self.0.path().to_str().context("a path in UTF-8")
    }
}

fn secret(id: &str, name: &str) -> BuildSecret {
    BuildSecret { id: id.to_owned(), name: name.to_owned(), ..BuildSecret::default() }
}

fn with_secrets(mut image: Image, secrets: &[BuildSecret]) -> Image {
    let config = image.config.as_mut().expect("an image has a configuration");
    config.secrets = secrets.to_vec();
    image
}

/// Builds an image and returns the build with its history.
async fn run(
    client: &Client,
    wanted: Image,
) -> anyhow::Result<(Image, Build, Vec<proto::images::BuildEvent>)> {
    let (created, build) = client.create(wanted).await?;
    let built = eventually_within(PATIENCE, "the build ends", async || {
        let build = client.get_build(&build.id).await?;
        let is_over = matches!(build.state(), BuildState::Succeeded | BuildState::Failed);
        Ok(is_over.then_some(build))
    })
    .await?;
    let history = client.history(&build.id, 0).await?;
    Ok((created, built, history))
}

/// Checks that a build fails at once, before anything of it runs, with the user's error.
async fn refused(client: &Client, wanted: Image, rule: &str) -> anyhow::Result<()> {
    let (_, build, history) = run(client, wanted).await?;
    let error = build.error.clone().unwrap_or_default();
    assert_eq!((error.kind(), build.attempt), (BuildErrorKind::User, 1), "{build:?}");
    assert!(error.message.contains(rule), "{rule}: {error:?}");
    let ran =
        history.iter().any(|event| matches!(event.event, Some(Event::StepChange(_) | Event::LogLine(_))));
    assert!(!ran, "{history:?}");
    Ok(())
}

/// Every form of a value that must be nowhere.
fn forms(value: &str) -> Vec<String> {
    let encoded: String = value.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let url = "tok%2Ben%2F4711%3D%C3%A4-0815".to_owned();
    vec![value.to_owned(), BASE64_STANDARD.encode(value)[..20].to_owned(), url, encoded]
}

/// Returns everything that an image is made of, uncompressed.
async fn exported(docker: &Docker, reference: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut parts = docker.export_image(reference);
    while let Some(part) = parts.try_next().await? {
        bytes.extend(part);
    }
    // Containerd's store exports layers as they were compressed.
    let mut found = bytes.clone();
    let mut archive = tar::Archive::new(bytes.as_slice());
    for entry in archive.entries()? {
        let mut content = Vec::new();
        if std::io::copy(&mut flate2::read::GzDecoder::new(entry?), &mut content).is_ok() {
            found.extend(content);
        }
    }
    Ok(found)
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// Returns the arguments and environments of all processes of this host, except for those of the test.
fn processes() -> Vec<u8> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        for file in ["cmdline", "environ"] {
            found.extend(fs::read(process.path().join(file)).unwrap_or_default());
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_reads_a_secret_that_nothing_else_has() -> anyhow::Result<()> {
    let secrets = Secrets::new(&[("team-token", TOKEN, json!({ "creators": ["alice"] }))])?;
    let real = Real::start_with(&["--secrets-dir", secrets.path()?]).await?;
    let (alice, bob) = (real.alice(), real.service.builder("bob"));
    let script = "set -e; s=$(/bin/busybox cat /run/secrets/token); echo \"plain $s\"; \
        printf 'cut tok+en/47'; /bin/busybox sleep 1; echo '11=ä-0815'; \
        echo \"base64 $(printf %s \"$s\" | /bin/busybox base64)\"; \
        echo 'url tok%2Ben%2F4711%3D%C3%A4-0815'; \
        [ \"$(printf %s \"$s\" | /bin/busybox md5sum | /bin/busybox cut -c1-32)\" = MD5 ]; \
        echo core $(ulimit -c); /bin/busybox sleep 2; echo end";
    let digest = |value: &str| {
        let output = Command::new("sh").args(["-c", "printf %s \"$1\" | md5sum", "sh", value]).output()?;
        anyhow::Ok(String::from_utf8(output.stdout)?[..32].to_owned())
    };
    let mount = "RUN --mount=type=secret,id=token,required=true";
    let dockerfile = |value: &str| {
        let script = script.replace("MD5", &digest(value)?);
        anyhow::Ok(real.dockerfile(&format!("{mount} {script}")))
    };
    let wanted = with_secrets(
        image(&format!("Secret {}", real.run), &dockerfile(TOKEN)?),
        &[secret("token", "team-token")],
    );
    let (created, build) = alice.create(wanted.clone()).await?;
    alice.until(&build.id, |build| build.log_bytes > 0).await?;
    let seen = processes();
    let built = alice.finished(&build.id).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    let history = alice.history(&build.id, 0).await?;
    let printed = joined_lines(&history);
    let hidden = "[secret team-token]";
    for line in ["plain", "cut", "url", "base64"] {
        assert!(printed.contains(&format!("{line} {hidden}")), "{line}: {printed:?}");
    }
    assert!(printed.iter().any(|line| line == "core 0"), "{printed:?}");
    let shown = alice.get(&created.id).await?;
    let reference = created.reference.clone();
    let records = format!("{history:?}{built:?}{shown:?}{:?}", real.docker.image_history(&reference).await?);
    let image = exported(&real.docker, &reference).await?;
    for form in forms(TOKEN) {
        // The Dockerfile of this test prints two of them by itself.
        let is_written = ["tok%2Ben%2F4711%3D%C3%A4-0815"].contains(&form.as_str());
        assert!(is_written || !records.contains(&form), "{form}: {records}");
        assert!(is_written || !contains(&image, &form), "{form} is in the image");
        assert!(is_written || !contains(&seen, &form), "{form} is in an argument or an environment");
    }

    // A new value is used by the next build.
    let other = "another-value-4712";
    secrets.write("team-token", other)?;
    let check = format!(
        "{mount} echo \"now $(/bin/busybox cat /run/secrets/token)\"; [ \"$(/bin/busybox cat /run/secrets/token)\" = {other} ]"
    );
    let rotated = with_secrets(image_named(&real, "Rotated", &check), &[secret("token", "team-token")]);
    let (rotated, built, history) = run(&alice, rotated).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    assert!(lines(&history).contains(&"now [secret team-token]"), "{:?}", lines(&history));

    // It is for images of alice that alice builds.
    refused(&bob, wanted.clone(), "this build may use").await?;
    alice.grant(&created.id, "bob", &[proto::images::Permission::Modify]).await?;
    let by_bob = bob.build(&created.id).await?;
    let failed = bob.finished(&by_bob.id).await?;
    assert!(failed.error.clone().unwrap_or_default().message.contains("this build may use"), "{failed:?}");
    // A step that does not mount it does not see it.
    let elsewhere = image_named(&real, "Elsewhere", "RUN [ ! -e /run/secrets/token ]");
    let (elsewhere, built, _) =
        run(&alice, with_secrets(elsewhere, &[secret("token", "team-token")])).await?;
    assert_eq!(built.state(), BuildState::Succeeded, "{:?}", built.error);
    real.clean(&[&reference, &rotated.reference, &elsewhere.reference]).await
}

fn image_named(real: &Real, name: &str, instructions: &str) -> Image {
    image(&format!("{name} {}", real.run), &real.dockerfile(instructions))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_build_may_not_use_fails_it_before_it_begins() -> anyhow::Result<()> {
    let secrets = Secrets::new(&[
        ("other-pool", "value", json!({ "pools": ["other"] })),
        ("own-pool", "value", json!({ "pools": ["default"] })),
        ("missing", "", json!({})),
        ("large", &"x".repeat(65_537), json!({})),
        ("empty", "-", json!({})),
    ])?;
    secrets.write("empty", "")?;
    secrets.write("unnamed", "value")?;
    let (engine, service) = (FakeEngine::start().await?, Service::start().await?);
    let flags = ["--secrets-dir", secrets.path()?];
    let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let alice = service.builder("alice");
    let uses = |name: &str| with_secrets(image(name, "FROM scratch\nENV A=b"), &[secret("id", name)]);
    for (name, rule) in [
        ("other-pool", "this build may use"),
        ("missing", "this build may use"),
        ("unnamed", "this build may use"),
        ("nowhere", "this build may use"),
        ("empty", "is empty"),
        ("large", "65,536"),
    ] {
        refused(&alice, uses(name), rule).await?;
        let mut with_agent = image(&format!("{name} agent"), "FROM scratch\nENV A=b");
        let config = with_agent.config.as_mut().context("a configuration")?;
        config.ssh_agents = vec![SshAgent { id: "default".to_owned(), name: name.to_owned() }];
        refused(&alice, with_agent, "this build may use").await?;
    }
    assert!(engine.builds().is_empty());
    assert_eq!(run(&alice, uses("own-pool")).await?.1.state(), BuildState::Succeeded);
    worker.stop().await?;
    let _without = Worker::start(&service, "w2", &engine.docker_host())?;
    refused(&alice, uses("own-pool"), "this build may use").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_context_is_fetched_with_the_credentials_of_its_host() -> anyhow::Result<()> {
    const PASSWORD: &str = "git-sesame-4711";
    let directory = tempfile::tempdir()?;
    let repositories = directory.path().join("repositories");
    fs::create_dir(&repositories)?;
    let (server, foreign) = (WebServer::start(&repositories).await?, WebServer::start(&repositories).await?);
    make_repository(
        &repositories.join("private.git"),
        &[("Dockerfile", "FROM scratch\n"), ("file", "mine")],
    )?;
    let inner = make_repository(&repositories.join("inner.git"), &[("file", "inner")])?;
    make_repository(&repositories.join("outer.git"), &[("Dockerfile", "FROM scratch\n")])?;
    commit_submodule(&repositories.join("outer.git"), "inner", &server.url("/inner.git"), &inner)?;
    server.answer("/context.tar", Answer::File(tar_of(&[("Dockerfile", b"FROM scratch\n")])?));
    server.answer("/away.tar", Answer::Redirect(foreign.url("/context.tar")));
    foreign.answer("/context.tar", Answer::File(tar_of(&[("Dockerfile", b"FROM scratch\n")])?));
    server.require(&format!("robot:{PASSWORD}"));
    foreign.require("other:credentials");

    let netrc = format!("machine 127.0.0.1:{}\nlogin robot\npassword {PASSWORD}\n", server.port());
    let wrong = format!("machine 127.0.0.1:{} login robot password wrong\n", server.port());
    let secrets = Secrets::new(&[
        ("git", &netrc, json!({})),
        ("wrong", &wrong, json!({})),
        ("token", "ghp_0123", json!({})),
    ])?;
    let (engine, service) = (FakeEngine::start().await?, Service::start().await?);
    let spool = directory.path().join("spool").display().to_string();
    let flags = ["--allow-remote", "127.0.0.1/32", "--spool-dir", &spool, "--secrets-dir", secrets.path()?];
    let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let alice = service.builder("alice");
    let of = |url: String, credentials: &str| {
        let remote_credentials = credentials.to_owned();
        let source =
            DockerfileSource { remote: url.clone(), remote_credentials, ..DockerfileSource::default() };
        of_source(&format!("{url} {credentials}"), Source::Dockerfile(source))
    };
    for path in ["/private.git", "/outer.git", "/context.tar"] {
        let (_, built, history) = run(&alice, of(server.url(path), "git")).await?;
        assert_eq!(built.state(), BuildState::Succeeded, "{path}: {:?}", built.error);
        assert!(!format!("{history:?}").contains(PASSWORD));
    }
    let inner = engine.builds().iter().filter(|build| build.files.contains_key("inner/file")).count();
    assert_eq!(inner, 1);
    for (url, credentials, rule) in [
        (server.url("/private.git"), "", "cannot fetch"),
        (server.url("/private.git"), "wrong", "cannot fetch"),
        (server.url("/context.tar"), "", "401"),
        (server.url("/context.tar"), "wrong", "401"),
        (server.url("/private.git"), "token", "netrc"),
        (server.url("/private.git"), "none", "this build may use"),
        // Another host, also after a redirect, gets none.
        (foreign.url("/private.git"), "git", "cannot fetch"),
        (server.url("/away.tar"), "git", "401"),
    ] {
        let (_, built, history) = run(&alice, of(url.clone(), credentials)).await?;
        let error = built.error.clone().unwrap_or_default();
        assert_eq!(error.kind(), BuildErrorKind::User, "{url} {credentials}: {built:?}");
        assert!(error.message.contains(rule), "{url} {credentials}: {error:?}");
        assert!(!format!("{history:?}{error:?}").contains(PASSWORD));
    }
    worker.stop().await?;
    assert!(fs::read_dir(&spool)?.next().is_none(), "nothing is left of a checkout");
    Ok(())
}
