//! TLS on both services and between them: certificates of either side, and no plaintext.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::Context as _;
use image_service::Role;
use proto::images::{self as api, image_service_client::ImageServiceClient};
use tonic::{
    Code, Request,
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    answers::refused,
    authority::{Authority, Issued, flag},
    client::{channel, client, image},
    eventually::eventually_true,
    fake_engine::FakeEngine,
    stack::{LIMIT, Service, Worker},
};

/// Connects over TLS, trusting this authority and presenting a certificate if there is one.
async fn connect(addr: SocketAddr, ca: &Path, shown: Option<&Issued>) -> anyhow::Result<Channel> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(ca)?));
    if let Some(Issued { cert, key }) = shown {
        tls = tls.identity(Identity::from_pem(std::fs::read(cert)?, std::fs::read(key)?));
    }
    let endpoint = Channel::from_shared(format!("https://{addr}"))?.tls_config(tls)?;
    Ok(endpoint.timeout(LIMIT).connect().await?)
}

/// Lists images over a connection.
///
/// With TLS 1.3, a client learns that it is refused only when it first reads.
async fn list(channel: Channel, token: &str) -> Result<usize, tonic::Status> {
    let mut request = Request::new(api::ListImagesRequest::default());
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {token}").parse().expect("tokens are ASCII"));
    Ok(ImageServiceClient::new(channel).list_images(request).await?.into_inner().images.len())
}

async fn lists(addr: SocketAddr, ca: &Path, shown: Option<&Issued>, token: &str) -> anyhow::Result<usize> {
    Ok(list(connect(addr, ca, shown).await?, token).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_a_certificate_serves_whom_it_convinces() -> anyhow::Result<()> {
    let (ours, others) = (Authority::new()?, Authority::new()?);
    let issued = ours.issue()?;
    let flags = ["--tls-cert", flag(&issued.cert), "--tls-key", flag(&issued.key)];
    let service = Service::start_with(&flags).await?;
    let token = service.token("alice", &[Role::Builder]);
    assert_eq!(lists(service.addr, &ours.file(), None, &token).await?, 0);
    assert!(connect(service.addr, &others.file(), None).await.is_err(), "nobody vouches for it");
    assert!(client(service.addr, &token).list().await.is_err(), "nothing is said in the clear");
    let unknown = list(connect(service.addr, &ours.file(), None).await?, "not a token").await;
    assert_eq!(refused(unknown), (Code::Unauthenticated, "TOKEN_INVALID".to_owned()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_required_certificate_is_rejected() -> anyhow::Result<()> {
    let (ours, others) = (Authority::new()?, Authority::new()?);
    let (issued, authorities) = (ours.issue()?, ours.file());
    let flags =
        ["--tls-cert", flag(&issued.cert), "--tls-key", flag(&issued.key), "--client-ca", flag(&authorities)];
    let service = Service::start_with(&flags).await?;
    let token = service.token("alice", &[Role::Builder]);
    for shown in [None, Some(others.issue()?)] {
        let failed = lists(service.addr, &authorities, shown.as_ref(), &token).await;
        assert!(failed.is_err(), "{shown:?}");
    }
    let shown = ours.issue()?;
    assert_eq!(lists(service.addr, &authorities, Some(&shown), &token).await?, 0);
    // A certificate does not replace a token.
    let without = list(connect(service.addr, &authorities, Some(&shown)).await?, "").await;
    assert_eq!(refused(without).0, Code::Unauthenticated);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_builds_over_mutual_tls_and_answers_by_it() -> anyhow::Result<()> {
    let ours = Authority::new()?;
    let (issued, authorities) = (ours.issue()?, ours.file());
    let tls =
        ["--tls-cert", flag(&issued.cert), "--tls-key", flag(&issued.key), "--client-ca", flag(&authorities)];
    let service = Service::start_with(&tls).await?;
    let engine = FakeEngine::start().await?;
    let of_worker = ours.issue()?;
    let server = format!("https://{}", service.addr);
    let flags = [
        "--server-ca",
        flag(&authorities),
        "--client-ca",
        flag(&authorities),
        "--tls-cert",
        flag(&of_worker.cert),
        "--tls-key",
        flag(&of_worker.key),
    ];
    let worker = Worker::start_by(&service, &server, "w1", &engine.docker_host(), &flags)?;

    let shown = ours.issue()?;
    let mut client = ImageServiceClient::new(connect(service.addr, &authorities, Some(&shown)).await?);
    let token = service.token("alice", &[Role::Builder]);
    let bearer: tonic::metadata::AsciiMetadataValue = format!("Bearer {token}").parse()?;
    let mut request = Request::new(api::CreateImageRequest {
        image: Some(image("Secret", "FROM scratch")),
        ..Default::default()
    });
    request.metadata_mut().insert("authorization", bearer.clone());
    let created = client.create_image(request).await?.into_inner().image.context("an image")?;
    eventually_true("the image is built", async || {
        let mut request = Request::new(api::GetImageRequest { id: created.id.clone() });
        request.metadata_mut().insert("authorization", bearer.clone());
        let found = client.get_image(request).await?.into_inner().image.context("an image")?;
        Ok(found.status() == api::ImageStatus::BuildFinished)
    })
    .await?;

    let mut health = HealthClient::new(connect(worker.addr, &authorities, Some(&shown)).await?);
    health.check(HealthCheckRequest::default()).await?;
    assert!(HealthClient::new(channel(worker.addr)).check(HealthCheckRequest::default()).await.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_in_without_a_restart() -> anyhow::Result<()> {
    let (first, second) = (Authority::new()?, Authority::new()?);
    let issued = first.issue()?;
    let service =
        Service::start_with(&["--tls-cert", flag(&issued.cert), "--tls-key", flag(&issued.key)]).await?;
    let token = service.token("alice", &[Role::Builder]);
    let before = connect(service.addr, &first.file(), None).await?;
    assert_eq!(list(before.clone(), &token).await?, 0);
    second.issue_into(&issued)?;
    eventually_true("it is taken in", async || {
        Ok(lists(service.addr, &second.file(), None, &token).await.is_ok())
    })
    .await?;
    assert!(connect(service.addr, &first.file(), None).await.is_err());
    assert_eq!(list(before, &token).await?, 0, "a connection that there was goes on");
    // Unusable files change nothing.
    std::fs::write(&issued.key, "no key")?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(lists(service.addr, &second.file(), None, &token).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_in_tls_files_are_reported_at_startup() -> anyhow::Result<()> {
    let refusal = |flags: &[&str]| {
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        async move {
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            Service::start_with(&flags).await.err().map(|error| error.to_string()).unwrap_or_default()
        }
    };
    let issued = Authority::new()?.issue()?;
    let cert = flag(&issued.cert);
    assert!(refusal(&["--tls-cert", cert]).await.contains("--tls-key"));
    assert!(refusal(&["--tls-cert", cert, "--tls-key", cert]).await.contains(cert), "the file is named");
    Ok(())
}
