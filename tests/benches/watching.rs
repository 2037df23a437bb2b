//! How long a change takes to a watcher: through another replica, and beside watchers that never read.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use image_service::Role;
use proto::images::{WatchImagesRequest, WatchImagesResponse, watch_images_response::Event};
use tonic::Streaming;

use crate::{
    client,
    fan_out::toggle,
    load::milliseconds,
    report::{Samples, Table, figure},
    seeding,
    service::Service,
};

const SILENT: usize = 1_000;

pub(crate) async fn run(server: Option<&str>) -> anyhow::Result<()> {
    let mut table = Table::new(&["change to watcher", "p50 ms", "p99 ms", "max ms", "MiB before / after"]);
    let data = tempfile::tempdir()?;
    if let Some(server) = server {
        let url = seeding::new_database(server, "bench_watching").await?;
        let here = Service::start(data.path(), Some(&url), &[]).await?;
        let there = Service::start(data.path(), Some(&url), &[]).await?;
        measure(&mut table, "of another replica, 50 changes a second", &here, &there, 500, 20).await?;
        there.end().await?;
        here.end().await?;
    }
    let service = Service::start(data.path(), None, &[]).await?;
    measure(&mut table, "alone, 100 changes a second", &service, &service, 1_000, 10).await?;
    let mut silent = Vec::new();
    let mut reader = service.client("alice", &[Role::Builder]);
    for watcher in 0..SILENT {
        if watcher % 100 == 0 {
            reader = service.client("alice", &[Role::Builder]);
        }
        silent.push(reader.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner());
    }
    for half in ["first", "second"] {
        let what = format!("beside 1,000 watchers that never read, {half} 1,000 changes");
        measure(&mut table, &what, &service, &service, 1_000, 10).await?;
    }
    drop(silent);
    service.end().await?;
    table.print("Watching");
    Ok(())
}

/// From the call of each change to its arrival. The next change is made when its time has come, and the one before has arrived.
async fn measure(
    table: &mut Table,
    what: &str,
    write: &Service,
    read: &Service,
    count: usize,
    interval_ms: u64,
) -> anyhow::Result<()> {
    let before = read.memory()?;
    let writer = write.client("alice", &[Role::Builder]);
    let (image, _) = writer.create(client::image("Watched", "FROM scratch")).await?;
    let watch = read.client("alice", &[Role::Builder]).images.clone();
    let mut watch = watch.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
    while !matches!(next(&mut watch).await?, Event::Synced(_)) {}
    let mut times = Vec::with_capacity(count);
    let mut tick = tokio::time::interval(Duration::from_millis(interval_ms));
    for change in 0..count {
        tick.tick().await;
        let begun = Instant::now();
        let enabled = !change.is_multiple_of(2);
        toggle(&writer, std::slice::from_ref(&image.id), enabled).await?;
        while !matches!(next(&mut watch).await?, Event::Changed(changed)
            if changed.id == image.id && changed.enabled() == enabled)
        {}
        times.push(milliseconds(begun.elapsed()));
    }
    writer.delete(&image.id).await?;
    let times = Samples::new(times);
    table.row(&[
        what.to_owned(),
        figure(times.median()),
        figure(times.p99()),
        figure(times.quantile(1.0)),
        format!("{} / {}", figure(before), figure(read.memory()?)),
    ]);
    Ok(())
}

async fn next(watch: &mut Streaming<WatchImagesResponse>) -> anyhow::Result<Event> {
    watch.message().await?.and_then(|message| message.event).context("the watch ended")
}
