//! Registry credentials, which must not leave the worker.

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE};
use bollard::query_parameters::RemoveImageOptionsBuilder;
use image_service::Role;
use proto::images::{BuildErrorKind, BuildState};

use crate::{
    base_image,
    client::{image, repository_under},
    engine_fixture,
    process::{Program, bound_to_test, program},
    registry::{PASSWORD, Registry, USER},
    stack::Service,
};

const WRONG: &str = "wrong-password-0815";

/// Returns every form in which a password may travel.
fn forms(password: &str) -> Vec<Vec<u8>> {
    let pair = format!("{USER}:{password}");
    // Base64 of a text that contains the password, for each alignment.
    let part = |encode: &dyn Fn(&str) -> String| {
        (0..3)
            .map(|shift| {
                encode(&format!("{}{password}", "x".repeat(shift)))[shift + 2..]
                    .trim_end_matches('=')
                    .to_owned()
            })
            .map(|text| text[..text.len() - 3].to_owned())
            .collect::<Vec<_>>()
    };
    let standard = part(&|text| BASE64_STANDARD.encode(text));
    let url_safe = part(&|text| BASE64_URL_SAFE.encode(text));
    let forms = [vec![password.to_owned(), BASE64_STANDARD.encode(pair)], standard, url_safe].concat();
    forms.into_iter().map(String::into_bytes).collect()
}

fn holds_secret(text: &[u8]) -> bool {
    let secrets = [PASSWORD, WRONG].into_iter().flat_map(forms);
    secrets.into_iter().any(|secret| text.windows(secret.len()).any(|window| window == secret))
}

/// Scans the arguments of all processes on this host until stopped; returns those with a secret.
fn look_at_processes(stop: &AtomicBool) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    while !stop.load(Ordering::Relaxed) {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            // A process may end meanwhile.
            let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if holds_secret(&arguments) {
                found.insert(String::from_utf8_lossy(&arguments).into_owned());
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    found
}

#[test]
fn a_secret_is_found_in_every_form() {
    let header =
        serde_json::json!({"username": USER, "password": PASSWORD, "serveraddress": "x"}).to_string();
    for text in [format!("a {PASSWORD}."), BASE64_STANDARD.encode(&header), BASE64_URL_SAFE.encode(&header)] {
        assert!(holds_secret(text.as_bytes()), "{text}");
    }
    assert!(!holds_secret(USER.as_bytes()) && !holds_secret(b"sesame"));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_credential_is_in_any_record_log_error_or_argument() -> anyhow::Result<()> {
    let (docker, docker_host) = engine_fixture::connect().await?;
    let (good, bad) = (Registry::start().await?, Registry::start().await?);
    let prefixes = [&good, &bad].map(|registry| format!("--repository-prefix={}/team/", registry.addr));
    let service = Service::start_with(&prefixes.each_ref().map(String::as_str)).await?;
    let run = uuid::Uuid::new_v4().simple().to_string();
    let base = format!("trailer-test/base-{run}:latest");
    base_image::import(&docker, &base).await?;
    let directory = tempfile::tempdir()?;
    let auth =
        |password: &str| serde_json::json!({ "auth": BASE64_STANDARD.encode(format!("{USER}:{password}")) });
    let auths = serde_json::json!({ "auths": {
        good.addr.to_string(): auth(PASSWORD), bad.addr.to_string(): auth(WRONG),
    }});
    fs::write(directory.path().join("config.json"), auths.to_string())?;
    let name = format!("w-{run}");
    let token_file = directory.path().join("token");
    fs::write(&token_file, service.token(&name, &[Role::Worker]))?;
    // A separate process that logs everything it can.
    let command = bound_to_test().into_iter().chain([
        "env".to_owned(),
        "RUST_LOG=trace".to_owned(),
        program("build-worker")?,
    ]);
    let flags = [
        ("server", format!("http://{}", service.addr)),
        ("token-file", token_file.display().to_string()),
        ("name", name.clone()),
        ("listen", "127.0.0.1:0".to_owned()),
        ("allow-local", "trailer-test/*".to_owned()),
        ("docker-host", docker_host),
        ("docker-config", directory.path().display().to_string()),
        ("spool-dir", directory.path().join("spool").display().to_string()),
    ];
    let command = command.chain(flags.into_iter().map(|(flag, value)| format!("--{flag}={value}")));
    let mut worker = Program::start(directory.path(), &name, command)?;
    let stop = Arc::new(AtomicBool::new(false));
    let looking = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || look_at_processes(&stop)
    });

    let alice = service.builder("alice");
    let mut responses = String::new();
    for (registry, state) in [(&good, BuildState::Succeeded), (&bad, BuildState::Failed)] {
        let mut wanted = image("Pushed", &format!("FROM {base}\nENV RUN={run}\nENV AT={}\n", registry.addr));
        wanted.repository = repository_under(format!("{}/team", registry.addr), "alice", "pushed");
        if let Some(config) = &mut wanted.config {
            config.push = true;
        }
        let (created, build) = alice.create(wanted).await?;
        let finished = alice.finished(&build.id).await?;
        assert_eq!(finished.state(), state, "{finished:?}");
        if state == BuildState::Failed {
            let error = finished.error.clone().context("an error")?;
            assert_eq!(error.kind(), BuildErrorKind::User);
            assert!(error.step.contains("push"), "{error:?}");
        }
        let history = alice.history(&build.id, 0).await?;
        responses.push_str(&format!("{finished:?} {history:?} {:?}", alice.get(&created.id).await?));
        if state == BuildState::Succeeded {
            let options = RemoveImageOptionsBuilder::new().force(true).build();
            docker.remove_image(&created.reference, Some(options), None).await?;
        }
    }
    worker.require_life()?;
    stop.store(true, Ordering::Relaxed);
    let processes = looking.join().map_err(|_| anyhow::anyhow!("the processes were not looked at"))?;
    assert_eq!(processes, BTreeSet::new());
    assert!(!holds_secret(responses.as_bytes()), "{responses}");
    let log = fs::read(directory.path().join(format!("{name}.log")))?;
    let text = String::from_utf8_lossy(&log);
    assert!(text.contains("TRACE"), "it logs everything");
    let leaking: Vec<&str> = text.lines().filter(|line| holds_secret(line.as_bytes())).collect();
    assert!(leaking.is_empty(), "{leaking:#?}");
    let options = RemoveImageOptionsBuilder::new().force(true).build();
    docker.remove_image(&base, Some(options), None).await?;
    Ok(())
}
