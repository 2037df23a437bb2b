//! Sources of the keys, before the port is bound and while the service runs.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser as _;
use http::StatusCode;
use image_service::{Bound, Cli, Command, Role};
use serde_json::json;
use tokio::{net::TcpListener, time::Instant};

use super::{claims, file, name, refusal, until, with};
use crate::{
    issuer::{KeyServer, SigningKey, jwks},
    stack::{LIMIT, Service},
};

/// Starts a service with these flags, as far as binding its port.
async fn bind(data: &Path, flags: &[&str]) -> anyhow::Result<Bound> {
    bind_to("127.0.0.1:0", data, flags).await
}

async fn bind_to(listen: &str, data: &Path, flags: &[&str]) -> anyhow::Result<Bound> {
    let data = data.to_str().context("a path in UTF-8")?;
    let fixed = ["image-service", "serve", "--listen", listen, "--data-dir", data];
    let Command::Serve(config) = Cli::try_parse_from(fixed.iter().chain(flags))?.command else {
        anyhow::bail!("the flags are those of another command");
    };
    Ok(image_service::bind(config).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_is_fetched_at_once_but_not_again_and_again() -> anyhow::Result<()> {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::rsa("new"));
    let server = KeyServer::start(jwks(&[&old])).await?;
    let service = Service::start_with(&["--jwks", &server.url(), "--jwks-refresh", "1h"]).await?;
    let (old, old_key) = (old.token(&claims("alice")), old);
    assert_eq!(refusal(&service, &old).await, "");

    let begun = Instant::now();
    server.set(StatusCode::OK, jwks(&[&new]));
    until(&service, &new.token(&claims("alice")), "").await?;
    assert_eq!(refusal(&service, &old).await, "TOKEN_INVALID", "it was remembered, but its key is gone");
    assert_eq!(server.fetches(), 2);

    let strangers: Vec<String> = (0..50)
        .map(|number| {
            let header = with(old_key.header(), "kid", json!(format!("stranger-{number}")));
            old_key.token_with(&header, &claims("alice"))
        })
        .collect();
    let calls = strangers.iter().map(|token| refusal(&service, token));
    let refusals = futures_util::future::join_all(calls).await;
    assert!(refusals.iter().all(|refusal| refusal == "TOKEN_INVALID"));
    let allowed = 2 + usize::try_from(begun.elapsed().as_secs() / 10)?;
    assert!(server.fetches() <= allowed, "{} fetches", server.fetches());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_read_again() -> anyhow::Result<()> {
    let (old, new) = (SigningKey::p256("old"), SigningKey::p256("new"));
    let file = file(&[&old])?;
    let service = Service::start_with(&["--jwks", name(&file)]).await?;
    let (old_token, new_token) = (old.token(&claims("alice")), new.token(&claims("alice")));
    assert_eq!(refusal(&service, &old_token).await, "");
    assert_eq!(refusal(&service, &new_token).await, "TOKEN_INVALID");

    std::fs::write(&file, jwks(&[&old, &new]))?;
    until(&service, &new_token, "").await?;
    assert_eq!(refusal(&service, &old_token).await, "");
    std::fs::write(&file, jwks(&[&new]))?;
    until(&service, &old_token, "TOKEN_INVALID").await?;
    assert_eq!(refusal(&service, &new_token).await, "");
    // An empty set of keys is valid, and then no token is trusted.
    std::fs::write(&file, jwks(&[]))?;
    until(&service, &new_token, "TOKEN_INVALID").await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_good_keys_stay_while_the_provider_is_broken() -> anyhow::Result<()> {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("new"));
    let server = KeyServer::start(jwks(&[&old])).await?;
    let service = Service::start_with(&["--jwks", &server.url(), "--jwks-refresh", "1s"]).await?;
    let (old_token, new_token) = (old.token(&claims("alice")), new.token(&claims("alice")));
    for (status, document) in [
        (StatusCode::SERVICE_UNAVAILABLE, jwks(&[&new])),
        (StatusCode::OK, "<html>maintenance</html>".to_owned()),
    ] {
        server.set(status, document);
        // One fetch may already be under way, and a fetch is known to be complete only when the next one
        // starts.
        let count = server.fetches() + 3;
        tokio::time::timeout(LIMIT, server.fetched(count)).await?;
        assert_eq!(refusal(&service, &old_token).await, "");
        assert_eq!(refusal(&service, &new_token).await, "TOKEN_INVALID");
    }
    server.set(StatusCode::OK, jwks(&[&new]));
    until(&service, &new_token, "").await?;
    assert_eq!(refusal(&service, &old_token).await, "TOKEN_INVALID");
    service.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_pair_of_the_data_directory_is_not_trusted_beside_a_jwks() -> anyhow::Result<()> {
    let key = SigningKey::ed25519("e");
    let file = file(&[&key])?;
    let service = Service::start_with(&["--jwks", name(&file)]).await?;
    assert_eq!(refusal(&service, &service.token("alice", &[Role::Admin])).await, "TOKEN_INVALID");
    assert_eq!(refusal(&service, "").await, "TOKEN_MISSING");
    assert_eq!(refusal(&service, &key.token(&claims("alice"))).await, "");

    let directory = tempfile::tempdir()?;
    let data = directory.path().join("data");
    bind(&data, &["--jwks", name(&file)]).await?;
    assert!(data.join("catalogue.sqlite").exists() && !data.join("token-signing-key.der").exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_no_port_is_bound() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let written = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).map(|()| path.display().to_string())
    };
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?;
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let url = |addr: SocketAddr| format!("http://{addr}/jwks");
    let missing = KeyServer::start(String::new()).await?;
    missing.set(StatusCode::NOT_FOUND, String::new());
    let moved = KeyServer::start(String::new()).await?;
    moved.set(StatusCode::FOUND, jwks(&[&SigningKey::ed25519("e")]));
    let html = KeyServer::start("<html></html>".to_owned()).await?;
    let large = format!("{}{}", jwks(&[&SigningKey::ed25519("e")]), " ".repeat(1024 * 1024));
    let large_file = written("large", &large)?;
    let large = KeyServer::start(large).await?;

    let broken = [
        (directory.path().join("missing").display().to_string(), "cannot read the file: No such file"),
        (directory.path().display().to_string(), "cannot read the file: Is a directory"),
        (written("garbage", "garbage")?, "it is not a JWKS: expected value"),
        (written("empty", r#"{"keys": []}"#)?, "it has no key for EdDSA, RS256 or ES256"),
        (large_file, "it is larger than 1048576 bytes"),
        (url(closed), "cannot fetch it"),
        (url(silent.local_addr()?), "it did not arrive within 10 s"),
        (missing.url(), "the server responded with 404"),
        (moved.url(), "the server responded with 302"),
        (html.url(), "it is not a JWKS: expected value"),
        (large.url(), "it is larger than 1048576 bytes"),
    ];
    let begun = Instant::now();
    let failing = broken.iter().enumerate().map(|(number, (place, expected))| {
        let data = directory.path().join(format!("data-{number}"));
        async move {
            let error = bind(&data, &["--jwks", place]).await.expect_err("it does not start");
            let text = format!("{error:#}");
            let expected = format!("cannot load the JWKS {place}: {expected}");
            assert!(text.starts_with(&expected), "{text}\n{expected}");
        }
    });
    tokio::time::timeout(LIMIT, futures_util::future::join_all(failing)).await?;
    assert!(missing.fetches() > 1, "it may only be starting");
    assert!(begun.elapsed() < Duration::from_secs(15));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_may_start_later_than_the_service() -> anyhow::Result<()> {
    let key = SigningKey::ed25519("e");
    let server = KeyServer::start(jwks(&[&key])).await?;
    server.set(StatusCode::SERVICE_UNAVAILABLE, String::new());
    let recovering = async {
        server.fetched(2).await;
        server.set(StatusCode::OK, jwks(&[&key]));
    };
    let flags = ["--jwks", &server.url()];
    let (service, ()) = tokio::join!(Service::start_with(&flags), recovering);
    assert_eq!(refusal(&service?, &key.token(&claims("alice"))).await, "");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_that_do_not_fit_are_refused() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    for (flags, expected) in [
        (&["--issuer", "i"][..], "--jwks <FILE|URL>"),
        (&["--audience", "a"], "--jwks <FILE|URL>"),
        (&["--roles-claim", "r"], "--jwks <FILE|URL>"),
        (&["--jwks-refresh", "1m"], "--jwks <FILE|URL>"),
        (&["--jwks", ""], "must name a file, or an http or https URL"),
        (&["--jwks", "https://user:secret@id.example/"], "must not contain credentials"),
        (&["--jwks", "f", "--issuer", ""], "a value is required for '--issuer <ISSUER>'"),
        (&["--jwks", "f", "--jwks-refresh", "10ms"], "--jwks-refresh must be at least 1s"),
    ] {
        let error = bind(directory.path(), flags).await.expect_err("it does not start");
        assert!(format!("{error:#}").contains(expected), "{flags:?}: {error:#}");
    }
    for flags in [&["--anonymous"][..], &["--anonymous", "--allow-plaintext"]] {
        let error = bind_to("0.0.0.0:0", directory.path(), flags).await.expect_err("it does not start");
        assert!(format!("{error:#}").contains("loopback"), "{flags:?}: {error:#}");
    }
    Ok(())
}
