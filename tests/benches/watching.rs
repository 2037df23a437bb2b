//! How long a change takes to a watcher: through another replica, and beside watchers that never read.
//!
//! `cargo bench -p tests --bench watching` prints the figures; replicas need TRAILER_TEST_POSTGRES_URL (see deploy/postgres).

#[path = "../e2e/client.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod client;
#[path = "../e2e/database.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod database;
#[path = "../e2e/stack.rs"]
#[expect(dead_code, reason = "the tests use the rest")]
mod stack;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use proto::images::{self as api, WatchImagesRequest, watch_images_response::Event};
use tonic::Streaming;

use crate::{client::Client, stack::Service};

const WATCHERS: usize = 1_000;
const INTERVAL: Duration = Duration::from_millis(10);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let seconds: u64 = std::env::var("SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(60);
    let service = Service::start().await?;
    println!("{:<46}{:>10}{:>10}{:>10}", "change to watcher", "p50 ms", "p99 ms", "max ms");
    if let Some(replica) = service.start_replica().await? {
        let mut idle = measure(&service, &replica, 500, Duration::from_millis(20)).await?;
        print("of another replica, idle otherwise", &mut idle);
    } else {
        println!("of another replica: not measured, for TRAILER_TEST_POSTGRES_URL is not set");
    }
    let count = usize::try_from(seconds * 1_000).unwrap_or(usize::MAX) / INTERVAL.as_millis() as usize;
    let mut alone = measure(&service, &service, count, INTERVAL).await?;
    print("alone, 100 changes a second", &mut alone);

    let before = resident_kib()?;
    let mut silent = Vec::new();
    let mut reader = service.builder("alice");
    for i in 0..WATCHERS {
        if i % 100 == 0 {
            reader = service.builder("alice");
        }
        silent.push(reader.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner());
    }
    let opened = resident_kib()?;
    let mut beside = measure(&service, &service, count / 2, INTERVAL).await?;
    let half = resident_kib()?;
    let mut rest = measure(&service, &service, count / 2, INTERVAL).await?;
    let end = resident_kib()?;
    beside.append(&mut rest);
    print("beside 1,000 watchers that never read", &mut beside);
    println!(
        "memory of both ends, KiB: {before} before, {opened} opened, {half} at half time, {end} at the end"
    );
    drop(silent);
    Ok(())
}

fn print(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |share: f64| {
        let index = (times.len() as f64 * share) as usize;
        times[index.min(times.len() - 1)].as_secs_f64() * 1_000.0
    };
    println!("{what:<46}{:>10.2}{:>10.2}{:>10.2}", at(0.5), at(0.99), at(1.0));
}

/// From the call of each change to its arrival at a watcher. The next change is made when its time has come, and the one before
/// has arrived.
async fn measure(
    write: &Service,
    read: &Service,
    count: usize,
    interval: Duration,
) -> anyhow::Result<Vec<Duration>> {
    let writer = write.builder("alice");
    let (image, _) = writer.create(client::image("Watched", "FROM scratch")).await?;
    let mut watch =
        read.builder("alice").images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
    while !matches!(next(&mut watch).await?, Event::Synced(_)) {}
    let mut times = Vec::with_capacity(count);
    let mut tick = tokio::time::interval(interval);
    for i in 0..count {
        tick.tick().await;
        let begun = Instant::now();
        enable(&writer, &image.id, i % 2 == 1).await?;
        loop {
            if let Event::Changed(changed) = next(&mut watch).await?
                && changed.id == image.id
                && changed.enabled() == (i % 2 == 1)
            {
                break;
            }
        }
        times.push(begun.elapsed());
    }
    writer.delete(&image.id).await?;
    Ok(times)
}

async fn next(watch: &mut Streaming<api::WatchImagesResponse>) -> anyhow::Result<Event> {
    watch.message().await?.and_then(|message| message.event).context("the watch ended")
}

async fn enable(client: &Client, id: &str, enabled: bool) -> anyhow::Result<()> {
    let id = id.to_owned();
    if enabled {
        let request = api::EnableImageRequest { id, ..Default::default() };
        client.images.clone().enable_image(request).await?;
    } else {
        let request = api::DisableImageRequest { id, ..Default::default() };
        client.images.clone().disable_image(request).await?;
    }
    Ok(())
}

fn resident_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}
