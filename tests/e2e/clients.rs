//! Clients in other languages, with stubs that `tests/clients/generate` generates from the protocol.

use std::{env, path::Path, process::Stdio};

use anyhow::Context as _;
use image_service::Role;
use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use crate::{
    fake_engine::FakeEngine,
    stack::{LIMIT, Service, Worker},
};

#[tokio::test(flavor = "multi_thread")]
async fn stubs_for_python_list_build_and_watch() -> anyhow::Result<()> {
    list_build_and_watch("From Python", &["/usr/bin/python3", "client.py"], ("PYTHONPATH", "gen/python"))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn stubs_for_typescript_list_build_and_watch() -> anyhow::Result<()> {
    list_build_and_watch("From TypeScript", &["node", "build/client.mjs"], ("NODE_ENV", "test")).await
}

/// Runs a client that builds an image of this name, and checks its report.
async fn list_build_and_watch(name: &str, client: &[&str], variable: (&str, &str)) -> anyhow::Result<()> {
    let clients = env::var("TRAILER_TEST_CLIENTS").context(
        "TRAILER_TEST_CLIENTS is not set: tests/run sets it to the directory that tests/clients/generate has filled",
    )?;
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let report = Command::new(client[0])
        .args(&client[1..])
        .args([service.addr.to_string(), service.token("alice", &[Role::Builder])])
        .current_dir(Path::new(&clients))
        .env(variable.0, variable.1)
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output();
    let report = timeout(2 * LIMIT, report).await??;
    anyhow::ensure!(report.status.success(), "{client:?}: {}", report.status);
    let report: Value = serde_json::from_slice(&report.stdout)?;
    let has = |kind: &str| report["events"].as_array().is_some_and(|kinds| kinds.contains(&json!(kind)));
    assert_eq!((&report["listed"], &report["state"]), (&json!([name]), &json!("BUILD_STATE_SUCCEEDED")));
    // The spelling is that of each language.
    assert!(has("state_change") || has("stateChange"), "{report}");
    Ok(())
}
