//! Machines whose clocks differ: the queue and the leases use the clock of the database.

use std::{sync::Arc, time::SystemTime};

use image_service::Role;
use proto::{
    dispatch::{Heartbeat, Started, connect_request::Message as ToService, report_event::Event},
    images::{self as api, BuildState, PendingReason},
};

use crate::{
    actor::{Actor, hello},
    client::image,
    database::Database,
    stack::Service,
};

/// Returns how far a time is ahead of this machine's clock, in seconds.
fn ahead(time: Option<prost_types::Timestamp>) -> anyhow::Result<i64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(time.unwrap_or_default().seconds - i64::try_from(now.as_secs())?)
}

fn is_the_databases(time: Option<prost_types::Timestamp>) -> anyhow::Result<bool> {
    Ok((3_500..=3_700).contains(&ahead(time)?))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_and_the_leases_go_by_the_clock_of_the_database() -> anyhow::Result<()> {
    let database = Arc::new(Database::create().await?);
    if !database.set_clock_ahead().await? {
        return Ok(());
    }
    let service = Service::start_on(database, &["--queue-timeout", "30m", "--stop-timeout", "500ms"]).await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("A", "FROM scratch")).await?;
    assert!(is_the_databases(created.create_time)? && is_the_databases(build.queue_time)?, "{build:?}");
    assert_eq!(build.pending_reason(), PendingReason::NoWorkerOnline);

    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![Event::Started(Started {})]).await;
    actor.acknowledged().await?;
    actor.say(ToService::Heartbeat(Heartbeat { number: 1, draining: false })).await;
    actor.next().await?;
    let root = service.client(&service.token("root", &[Role::Admin]));
    let listed = root.workers.clone().list_workers(api::ListWorkersRequest::default()).await?.into_inner();
    let worker = &listed.workers[0];
    assert!(worker.online && is_the_databases(worker.connect_time)?, "{worker:?}");
    assert!(is_the_databases(worker.heartbeat_time)?, "{worker:?}");

    let running = alice.get_build(&build.id).await?;
    assert!(!running.worker_offline && is_the_databases(running.start_time)?, "{running:?}");
    // Meanwhile the lease is kept, and the overdue stop is found in time.
    alice.cancel(&created.id).await?;
    let cancelled = alice.finished(&build.id).await?;
    assert_eq!(
        (cancelled.state(), cancelled.attempt, cancelled.stop_confirmed),
        (BuildState::Cancelled, 1, false)
    );
    assert!(is_the_databases(cancelled.finish_time)?, "{cancelled:?}");
    Ok(())
}
