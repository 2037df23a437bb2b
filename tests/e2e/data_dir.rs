//! The data directory of a SQLite catalogue, which one process at a time serves.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Output;

use anyhow::Context as _;
use tokio::process::Command;

use crate::{
    client::{client, image},
    process::program,
    programs::{Catalogue, Listening},
    stack::LIMIT,
};

/// Runs image-service with these arguments until it exits on its own.
async fn run(arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(program("image-service")?);
    let output = command.args(arguments).kill_on_drop(true).output();
    Ok(tokio::time::timeout(LIMIT, output).await.context("it does not end")??)
}

/// Checks that the service accepts a write.
async fn answers(catalogue: &Catalogue, service: &Listening, name: &str) -> anyhow::Result<()> {
    catalogue.builder("alice", service.addr).create(image(name, "FROM scratch")).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_a_data_directory_ends_at_once_and_says_why() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    let mut first = catalogue.replica("first", &[], &[]).await?;
    if catalogue.is_shared() {
        // The catalogue is elsewhere; the directory holds only the key pair, which replicas share.
        let second = catalogue.replica("second", &[], &[]).await?;
        return answers(&catalogue, &second, "By the second").await;
    }
    let data_dir = catalogue.data_dir().display().to_string();
    let second = run(&["serve", "--listen", "127.0.0.1:0", "--data-dir", &data_dir]).await?;
    let stderr = String::from_utf8_lossy(&second.stderr).into_owned();
    let wrong = run(&["serve", "--data-dir", &data_dir, "--heartbeat", "1ms"]).await?;
    assert_eq!(second.status.code(), wrong.status.code(), "as other wrong configurations: {stderr}");
    let reason = format!("another process serves the data directory {data_dir}");
    assert!(stderr.contains(&reason), "{stderr}");
    answers(&catalogue, &first, "By the first").await?;
    for entry in std::fs::read_dir(&data_dir)? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", entry.path().display());
    }

    let token = run(&["token", "--data-dir", &data_dir, "--subject", "bob", "--role", "builder"]).await?;
    assert!(token.status.success(), "{token:?}");
    let token = String::from_utf8(token.stdout)?;
    let images = client(first.addr, token.trim()).list().await?;
    assert!(images.is_empty(), "bob sees none of alice's");

    // However the process ends, the lock is released.
    first.program.kill()?;
    first.program.start_again()?;
    first.answers().await?;
    answers(&catalogue, &first, "After a kill").await?;
    first.restart().await?;
    answers(&catalogue, &first, "After an end in order").await?;
    Ok(())
}
