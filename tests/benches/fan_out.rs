//! Fan-out of changes: the maximum throughput, and a few at a time to very many watchers.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use image_service::Role;
use prost::Message as _;
use proto::images::{self as api, watch_images_response::Event};

use self::watchers::{CONNECTIONS, Watchers};
use crate::{
    bare,
    client::{self, Client},
    report::{Goal, Samples, Table, figure},
    seed,
    service::{DATABASE, Running, Service},
};

mod watchers;

/// Number of images in a batch of changes.
///
/// Up to `AHEAD` further batches are sent before a batch has reached all watchers. No image changes again
/// before its last change has arrived, because a watcher that is behind gets only the latest states.
const AT_ONCE: usize = 20;
const AHEAD: usize = 4;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
const OWNER: &str = "owner";
/// Largest number of watchers. They are admins, because an image cannot have so many grants.
const MANY: usize = 10_000;

/// The result of a steady load.
#[derive(Debug)]
struct Steady {
    times: Samples,
    lost: usize,
    /// Memory before and after opening the watches, and after the changes, in MiB; `None` for the peer.
    memory: Option<[f64; 3]>,
}

/// Measures the maximum rate of changes to 1,000 watchers, first guests with grants and then admins.
pub(crate) async fn throughput(goals: &mut Table) -> anyhow::Result<()> {
    const WATCHERS: usize = 1_000;
    for (who, granted, roles) in [("guests", WATCHERS, &[][..]), ("admins", 0, &[Role::Admin])] {
        let data = tempfile::tempdir()?;
        let (service, ids) = shared_with(data.path(), AT_ONCE * (AHEAD + 1), granted).await?;
        let owner = service.client(OWNER, &[Role::Builder]);
        let tokens: Vec<String> = (0..WATCHERS).map(|watcher| service.token(&name(watcher), roles)).collect();
        let (image, size) = changed(&service, &tokens[0], &ids[0]).await?;
        let bare = bare(image).await?;
        let peer = client::client(bare.addr, &service.token(OWNER, &[Role::Builder]));
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let own = round(service.addr, &tokens, &owner, &ids).await?;
            let bare = round(bare.addr, &tokens, &peer, &ids).await?;
            ratios.push(own / bare);
            ours.push(own);
            theirs.push(bare);
        }
        goals.compare(
            format!(
                "changes of {size} bytes to {WATCHERS} {who}, each an identity of its own, {CONNECTIONS} connections"
            ),
            format!("{}/s", figure(Samples::new(ours).median())),
            format!("bare tonic: {}/s", figure(Samples::new(theirs).median())),
            &Samples::new(ratios),
            Goal::AtLeast(0.9),
        );
        service.end().await?;
    }
    Ok(())
}

/// Runs one round and returns the messages per second.
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
    // Continues until every image is enabled again.
    while begun.elapsed() < ROUND || done % (2 * batches.len()) != 0 {
        let is_enabled = (done / batches.len()) % 2 == 1;
        toggle(writer, batches[done % batches.len()], is_enabled).await?;
        done += 1;
        watchers.wait_for(done.saturating_sub(AHEAD) as u64 * of_batch).await?;
    }
    watchers.wait_for(done as u64 * of_batch).await?;
    let rate = (done as u64 * of_batch) as f64 / begun.elapsed().as_secs_f64();
    watchers.close().await?;
    Ok(rate)
}

/// Returns an image as a watcher receives it, and the encoded size of the whole message.
async fn changed(service: &Service, token: &str, id: &str) -> anyhow::Result<(api::Image, usize)> {
    // Like a watch, a list leaves the configuration out.
    let request = api::ListImagesRequest { page_size: 1_000, ..Default::default() };
    let page = client::client(service.addr, token).images.list_images(request).await?.into_inner();
    let image = page.images.into_iter().find(|image| image.id == id).context("the watcher sees the image")?;
    let message = api::WatchImagesResponse {
        event: Some(Event::Changed(Box::new(image.clone()))),
        resume_revision: "1234567.0123456789abcdef.0123456789abcdef".to_owned(),
    };
    Ok((image, message.encoded_len()))
}

/// Starts a bare server that sends changes of `image`.
async fn bare(image: api::Image) -> anyhow::Result<Running> {
    let answers = tempfile::tempdir()?;
    let answer = api::GetImageResponse { image: Some(image) };
    std::fs::write(answers.path().join(bare::IMAGE), answer.encode_to_vec())?;
    Running::bare(&[&answers.path().display().to_string()]).await
}

/// Enables or disables images and returns the revisions of the changes.
async fn toggle(writer: &Client, ids: &[String], enabled: bool) -> anyhow::Result<Vec<i64>> {
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

/// Measures twenty changes per second to a growing number of watchers.
pub(crate) async fn growth(goals: &mut Table) -> anyhow::Result<()> {
    let mut growth = Table::new(&[
        "watchers, 20 changes/s",
        "p50 ms",
        "p99 ms",
        "max ms",
        "lost",
        "p50 / p99 / max ms of bare tonic",
        "MiB before / opened / after",
        "KiB a watcher",
    ]);
    for watchers in [10, 100, 1_000, MANY] {
        let rounds = if watchers == MANY { 3 } else { 1 };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let data = tempfile::tempdir()?;
            let (service, ids) = shared_with(data.path(), AT_ONCE, 0).await?;
            let tokens: Vec<String> =
                (0..watchers).map(|watcher| service.token(&name(watcher), &[Role::Admin])).collect();
            let owner = service.client(OWNER, &[Role::Builder]);
            ours.push(steady(&owner, service.addr, Some(&service), &tokens, &ids).await?);
            let (image, _) = changed(&service, &tokens[0], &ids[0]).await?;
            let peer_token = service.token(OWNER, &[Role::Builder]);
            service.end().await?;
            let bare = bare(image).await?;
            let peer = client::client(bare.addr, &peer_token);
            theirs.push(steady(&peer, bare.addr, None, &tokens, &ids).await?);
        }
        growth.row(&cells(watchers, &ours[0], &theirs[0]));
        if watchers == MANY {
            judge(&ours, &theirs, goals);
        }
    }
    growth.print("Watchers");
    Ok(())
}

fn cells(watchers: usize, own: &Steady, peer: &Steady) -> [String; 8] {
    let quantiles = |times: &Samples| [times.median(), times.p99(), times.quantile(1.0)].map(figure);
    let [p50, p99, max] = quantiles(&own.times);
    let memory = own.memory.unwrap_or_default();
    [
        watchers.to_string(),
        p50,
        p99,
        max,
        own.lost.to_string(),
        quantiles(&peer.times).join(" / "),
        memory.map(figure).join(" / "),
        figure(own.kibibytes_each(watchers)),
    ]
}

fn judge(ours: &[Steady], theirs: &[Steady], goals: &mut Table) {
    let what = format!("20 changes a second to {MANY} watchers");
    let lost = Samples::new(ours.iter().map(|own| own.lost as f64).collect());
    goals.compare(
        format!("{what}: lost, at most"),
        "",
        "",
        &Samples::one(lost.quantile(1.0)),
        Goal::AtMost(0.0),
    );
    let ratios = ours.iter().zip(theirs).map(|(own, peer)| own.times.p99() / peer.times.p99());
    let summary = |all: &[Steady]| {
        let median = |quantile: fn(&Samples) -> f64| {
            figure(Samples::new(all.iter().map(|one| quantile(&one.times)).collect()).median())
        };
        format!("p50 {} ms, p99 {} ms", median(Samples::median), median(Samples::p99))
    };
    goals.compare(
        format!("{what}: p99"),
        summary(ours),
        format!("bare tonic: {}", summary(theirs)),
        &Samples::new(ratios.collect()),
        Goal::AtMost(1.5),
    );
    let each = Samples::new(ours.iter().map(|own| own.kibibytes_each(MANY)).collect());
    goals.compare(format!("{what}: KiB a watcher"), "", "", &each, Goal::AtMost(12.0));
}

impl Steady {
    fn kibibytes_each(&self, watchers: usize) -> f64 {
        let [before, _, after] = self.memory.unwrap_or_default();
        (after - before).max(0.0) * 1024.0 / watchers as f64
    }
}

/// Opens the watches and makes 200 changes, 20 per second.
///
/// The memory of `service` is measured, if it is given.
async fn steady(
    writer: &Client,
    addr: std::net::SocketAddr,
    service: Option<&Service>,
    tokens: &[String],
    ids: &[String],
) -> anyhow::Result<Steady> {
    let memory = || service.map_or(Ok(0.0), Service::memory);
    let before = memory()?;
    let watchers = Watchers::open(addr, tokens, true).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let opened = memory()?;
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
    let sent = changes.len() * tokens.len();
    // Changes that have not arrived by the end of this wait count as lost.
    let _ = watchers.wait_for(sent as u64).await;
    let after = memory()?;
    let times = watchers.times(&changes).await?;
    let memory = service.map(|_| [before, opened, after]);
    Ok(Steady { lost: sent - times.count(), times, memory })
}

/// Starts a service with images that are granted to the first `watchers` watchers.
async fn shared_with(data: &Path, images: usize, watchers: usize) -> anyhow::Result<(Service, Vec<String>)> {
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
    let database = seed::open_file(&data.join(DATABASE)).await?;
    for watcher in 0..watchers {
        let grant = format!(
            "INSERT INTO grants (image, grantee, \"view\", modify, \"delete\") SELECT id, '{}', 1, 0, 0 FROM images",
            seed::grantee(&name(watcher))
        );
        seed::execute(&database, &grant).await?;
    }
    database.close().await?;
    Ok((Service::start(data, None, &[]).await?, ids))
}

fn name(watcher: usize) -> String {
    format!("watcher-{watcher}")
}
