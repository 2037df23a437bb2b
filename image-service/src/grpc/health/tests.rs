use std::time::Duration;

use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus as Status,
    health_client::HealthClient,
};

use super::*;

const LIMIT: Duration = Duration::from_secs(10);

/// Waits until the watch of a service reports this status.
async fn until(
    statuses: &mut tonic::Streaming<HealthCheckResponse>,
    expected: Status,
) -> Result<(), tonic::Status> {
    let waiting = async {
        while let Some(message) = statuses.message().await? {
            if message.status() == expected {
                return Ok(());
            }
        }
        Err(tonic::Status::unknown("the watch ended"))
    };
    let waited = tokio::time::timeout(LIMIT, waiting).await;
    waited.unwrap_or_else(|_| Err(tonic::Status::unknown(format!("it is never {expected:?}"))))
}

#[tokio::test]
async fn workers_are_served_before_the_catalogue_is_loaded() -> Result<(), tonic::Status> {
    let (store_answers, store) = watch::channel(true);
    let (catalogue_ready, catalogue) = watch::channel(false);
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let (storage_full, storage) = watch::channel(false);
    let readiness = Readiness { store_answers: store, catalogue_ready: catalogue, storage_full: storage };
    let mut health = HealthClient::new(service(readiness, &shutdown, &tasks).await);
    let request = |name: &str| HealthCheckRequest { service: name.to_owned() };
    for name in ["", IMAGES, BUILDS, ACCESS, CONTEXTS, WORKERS] {
        let answer = health.check(request(name)).await?.into_inner();
        assert_eq!(answer.status(), Status::NotServing, "{name:?}");
    }
    let mut dispatch = health.watch(request(DISPATCH)).await?.into_inner();
    let mut images = health.watch(request(IMAGES)).await?.into_inner();
    let mut server = health.watch(request("")).await?.into_inner();
    until(&mut dispatch, Status::Serving).await?;

    catalogue_ready.send_replace(true);
    until(&mut images, Status::Serving).await?;
    until(&mut server, Status::Serving).await?;

    // Without the database nothing serves, whatever the state of the catalogue.
    store_answers.send_replace(false);
    for statuses in [&mut dispatch, &mut images, &mut server] {
        until(statuses, Status::NotServing).await?;
    }
    catalogue_ready.send_replace(false);
    store_answers.send_replace(true);
    until(&mut dispatch, Status::Serving).await?;
    assert_eq!(health.check(request("")).await?.into_inner().status(), Status::NotServing);
    catalogue_ready.send_replace(true);
    for statuses in [&mut images, &mut server] {
        until(statuses, Status::Serving).await?;
    }

    // A full disk stops uploads alone.
    let mut uploads = health.watch(request(CONTEXTS)).await?.into_inner();
    until(&mut uploads, Status::Serving).await?;
    storage_full.send_replace(true);
    until(&mut uploads, Status::NotServing).await?;
    assert_eq!(health.check(request("")).await?.into_inner().status(), Status::Serving);
    storage_full.send_replace(false);
    until(&mut uploads, Status::Serving).await?;

    shutdown.cancel();
    for statuses in [&mut dispatch, &mut images, &mut server] {
        until(statuses, Status::NotServing).await?;
        while statuses.message().await?.is_some() {}
    }
    Ok(())
}
