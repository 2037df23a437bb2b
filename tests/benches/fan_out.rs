//! Changes to many watchers: as many as go through, and a few at a time to very many.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use image_service::Role;
use prost::Message as _;
use proto::images::{self as api, WatchImagesRequest, watch_images_response::Event};
use tokio::{sync::watch, task::JoinSet};
use tonic::transport::Channel;

use crate::{
    client::{self, Client},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seeding,
    service::{Running, Service},
};

const CONNECTIONS: usize = 100;
/// How many images change at once, and how many times others do so before the changes have come to all. No image changes again
/// before its last change has come: a watcher that is behind is told the latest states only.
const AT_ONCE: usize = 20;
const AHEAD: usize = 4;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
const OWNER: &str = "owner";

/// Watchers that count what they are told.
#[derive(Debug)]
struct Watchers {
    told: Arc<AtomicU64>,
    tasks: JoinSet<anyhow::Result<Vec<(i64, Instant)>>>,
    stop: watch::Sender<bool>,
}

/// As many changes as go through, to 1,000 watchers: those of whom each was granted every image, and admins.
pub(crate) async fn throughput(table: &mut Table) -> anyhow::Result<()> {
    const WATCHERS: usize = 1_000;
    for (who, granted, roles) in [("guests", WATCHERS, &[][..]), ("admins", 0, &[Role::Admin])] {
        let data = tempfile::tempdir()?;
        let (service, ids) = shared_with(data.path(), AT_ONCE * (AHEAD + 1), granted).await?;
        let owner = service.client(OWNER, &[Role::Builder]);
        let image = owner.get(&ids[0]).await?;
        let image = api::Image { config: None, ..image };
        let changed = api::WatchImagesResponse {
            event: Some(Event::Changed(Box::new(image.clone()))),
            resume_revision: "1234567.0123456789abcdef.0123456789abcdef".to_owned(),
        };
        let size = changed.encoded_len();
        let bare = bare(image).await?;

        let tokens: Vec<String> = (0..WATCHERS).map(|watcher| service.token(&name(watcher), roles)).collect();
        let nobody = client::client(bare.addr, "of nobody");
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let own = round(service.addr, &tokens, &owner, &ids).await?;
            let peer = round(bare.addr, &tokens, &nobody, &ids).await?;
            ratios.push(own / peer);
            ours.push(own);
            theirs.push(peer);
        }
        table.compare(
            format!(
                "changes of {size} bytes to {WATCHERS} {who}, each an identity of its own, {CONNECTIONS} connections"
            ),
            format!("{}/s", figure(Samples::new(ours).median())),
            format!("bare tonic: {}/s", figure(Samples::new(theirs).median())),
            &Samples::new(ratios),
            Goal::AtLeast(0.8),
        );
        service.end().await?;
    }
    Ok(())
}

/// Messages a second.
async fn round(
    addr: std::net::SocketAddr,
    tokens: &[String],
    writer: &Client,
    ids: &[String],
) -> anyhow::Result<f64> {
    let watchers = Watchers::open(addr, tokens, false).await?;
    let batches: Vec<&[String]> = ids.chunks(AT_ONCE).collect();
    let of_batch = (AT_ONCE * tokens.len()) as u64;
    let mut done = 0;
    let begun = Instant::now();
    // In the end all are enabled again.
    while begun.elapsed() < ROUND || done % (2 * batches.len()) != 0 {
        let is_enabled = (done / batches.len()) % 2 == 1;
        toggle(writer, batches[done % batches.len()], is_enabled).await?;
        done += 1;
        watchers.told(done.saturating_sub(AHEAD) as u64 * of_batch).await?;
    }
    watchers.told(done as u64 * of_batch).await?;
    let rate = (done as u64 * of_batch) as f64 / begun.elapsed().as_secs_f64();
    watchers.close().await?;
    Ok(rate)
}

/// A bare server whose changes are of such an image.
async fn bare(image: api::Image) -> anyhow::Result<Running> {
    let message = tempfile::NamedTempFile::new()?;
    std::fs::write(message.path(), api::GetImageResponse { image: Some(image) }.encode_to_vec())?;
    Running::bare(&[&message.path().display().to_string()]).await
}

/// Enables or disables images; the revisions of the changes.
pub(crate) async fn toggle(writer: &Client, ids: &[String], enabled: bool) -> anyhow::Result<Vec<i64>> {
    let target = |id: &String| api::BatchTarget { id: id.clone(), etag: String::new() };
    let action = if enabled { api::BatchAction::Enable } else { api::BatchAction::Disable };
    let request = api::BatchImagesRequest {
        action: action.into(),
        targets: ids.iter().map(target).collect(),
        ..Default::default()
    };
    let answer = writer.images.clone().batch_images(request).await?.into_inner();
    let changed = answer.results.into_iter().map(|result| match result.result {
        Some(api::batch_result::Result::Image(image)) => Ok(image.revision),
        refused => Err(anyhow::anyhow!("{refused:?}")),
    });
    changed.collect()
}

/// Twenty changes a second to more and more watchers.
pub(crate) async fn growth(table: &mut Table, goals: &mut Table) -> anyhow::Result<()> {
    for watchers in [10, 100, 1_000, 10_000] {
        let data = tempfile::tempdir()?;
        let (service, ids) = shared_with(data.path(), AT_ONCE, 0).await?;
        // More than one image can be granted to.
        let tokens: Vec<String> =
            (0..watchers).map(|watcher| service.token(&name(watcher), &[Role::Admin])).collect();
        let before = service.memory()?;
        let opened = Watchers::open(service.addr, &tokens, true).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let idle = service.memory()?;
        let owner = service.client(OWNER, &[Role::Builder]);
        let changes = change_steadily(&owner, &ids).await?;
        opened.told((changes.len() * watchers) as u64).await?;
        let after = service.memory()?;
        let times = opened.times(&changes).await?;
        let each = (after - before).max(0.0) * 1024.0 / watchers as f64;
        let dropped = changes.len() * watchers - times.count();
        table.row(&[
            watchers.to_string(),
            figure(times.median()),
            figure(times.p99()),
            figure(times.quantile(1.0)),
            dropped.to_string(),
            format!("{} / {} / {}", figure(before), figure(idle), figure(after)),
            figure(each),
        ]);
        if watchers == 10_000 {
            let what = "20 changes a second to 10,000 watchers";
            let of = |value: f64| Samples::new(vec![value]);
            goals.compare(
                format!("{what}: lost"),
                dropped.to_string(),
                "",
                &of(dropped as f64),
                Goal::AtMost(0.0),
            );
            let image = api::Image { config: None, ..owner.get(&ids[0]).await? };
            let bare = bare(image).await?;
            let opened = Watchers::open(bare.addr, &tokens, true).await?;
            let changes = change_steadily(&client::client(bare.addr, "of nobody"), &ids).await?;
            opened.told((changes.len() * watchers) as u64).await?;
            let peer = opened.times(&changes).await?;
            let told = |times: &Samples| {
                format!("p50 {} ms, p99 {} ms", figure(times.median()), figure(times.p99()))
            };
            goals.compare(
                format!("{what}: p99"),
                told(&times),
                format!("bare tonic: {}", told(&peer)),
                &of(times.p99()),
                Goal::AtMost(100.0),
            );
            let memory = format!("{} KiB", figure(each));
            goals.compare(format!("{what}: memory of a watcher"), memory, "", &of(each), Goal::AtMost(20.0));
        }
        service.end().await?;
    }
    Ok(())
}

/// Makes 200 changes, 20 a second: their revisions, and when each was asked for.
async fn change_steadily(writer: &Client, ids: &[String]) -> anyhow::Result<Vec<(i64, Instant)>> {
    let mut changes = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    for change in 0..200 {
        tick.tick().await;
        let begun = Instant::now();
        let is_enabled = (change / ids.len()) % 2 == 1;
        let id = std::slice::from_ref(&ids[change % ids.len()]);
        let revisions = toggle(writer, id, is_enabled).await?;
        changes.extend(revisions.into_iter().map(|revision| (revision, begun)));
    }
    Ok(changes)
}

/// A service with some images that the first so many watchers were granted.
async fn shared_with(
    data: &std::path::Path,
    images: usize,
    watchers: usize,
) -> anyhow::Result<(Service, Vec<String>)> {
    let service = Service::start(data, None, &[]).await?;
    let owner = service.client(OWNER, &[Role::Builder]);
    let mut ids = Vec::new();
    for number in 0..images {
        let mut image = client::image(&format!("Watched {number}"), "FROM scratch");
        image.template = true;
        image.description = "what it is good for, in as many words as people write ".repeat(5);
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        let answer = owner.images.clone().create_image(request).await?.into_inner();
        ids.push(answer.image.context("an image")?.id);
    }
    if watchers == 0 {
        return Ok((service, ids));
    }
    service.end().await?;
    let database = seeding::open_file(&data.join("catalogue.sqlite")).await?;
    for watcher in 0..watchers {
        let name = name(watcher);
        let grant = format!(
            "INSERT INTO grants (image, subject, \"view\", modify, \"delete\") SELECT id, '{name}', 1, 0, 0 FROM images"
        );
        seeding::execute(&database, &grant).await?;
    }
    seeding::execute(&database, "PRAGMA user_version = 0").await?;
    database.close().await?;
    Ok((Service::start(data, None, &[]).await?, ids))
}

fn name(watcher: usize) -> String {
    format!("watcher-{watcher}")
}

impl Watchers {
    /// Opens a watch for each token, on [`CONNECTIONS`], and waits until all have the first state.
    async fn open(addr: std::net::SocketAddr, tokens: &[String], notes_times: bool) -> anyhow::Result<Self> {
        let connections: Vec<Channel> = (0..CONNECTIONS).map(|_| client::channel(addr)).collect();
        let told = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for (connection, token) in connections.iter().cycle().zip(tokens) {
            let client = client::client_on(connection.clone(), token);
            let mut stream =
                client.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
            loop {
                let first =
                    stream.message().await?.and_then(|message| message.event).context("a first state")?;
                if matches!(first, Event::Synced(_)) {
                    break;
                }
            }
            let (told, mut stopped) = (Arc::clone(&told), stopped.clone());
            tasks.spawn(async move {
                let mut arrived = Vec::new();
                loop {
                    let message = tokio::select! {
                        _ = stopped.wait_for(|stopped| *stopped) => return Ok(arrived),
                        message = stream.message() => message?,
                    };
                    if let Some(Event::Changed(image)) = message.context("the watch ended")?.event {
                        if notes_times {
                            arrived.push((image.revision, Instant::now()));
                        }
                        told.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        Ok(Self { told, tasks, stop })
    }

    /// Waits until so many changes have come.
    async fn told(&self, count: u64) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.told.load(Ordering::Relaxed) < count {
            let told = self.told.load(Ordering::Relaxed);
            anyhow::ensure!(begun.elapsed() < Duration::from_secs(60), "{told} of {count} changes came");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// How long each change took to each watcher, in milliseconds.
    async fn times(self, changes: &[(i64, Instant)]) -> anyhow::Result<Samples> {
        let arrived = self.close().await?;
        let mut times = Vec::with_capacity(arrived.len());
        for (revision, at) in &arrived {
            let change = changes.binary_search_by_key(revision, |(revision, _)| *revision);
            let (_, begun) = changes[change.ok().context("a change that nobody made")?];
            times.push(milliseconds(at.duration_since(begun)));
        }
        Ok(Samples::new(times))
    }

    async fn close(mut self) -> anyhow::Result<Vec<(i64, Instant)>> {
        self.stop.send_replace(true);
        let mut all = Vec::new();
        while let Some(arrived) = self.tasks.join_next().await {
            all.append(&mut arrived??);
        }
        Ok(all)
    }
}
