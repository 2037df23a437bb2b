//! Memory and startup time of the service by number of images.

use image_service::Role;
use proto::images::ListImagesRequest;

use crate::{
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seed::{self, Catalogue, Contents},
    service::Service,
};

const IMAGES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// Number of images in the hostile comparison.
///
/// With a tenth of them hostile, they are nearly as many as the default `--index-memory` admits.
const BESIDE_HOSTILE: u64 = 50_000;
const STARTS: usize = 3;

/// Measurements of several starts on one catalogue.
#[derive(Debug)]
struct Starts {
    /// Startup time until the catalogue is served, in milliseconds.
    times: Samples,
    /// Memory when the catalogue is served, in MiB.
    ready: Samples,
    /// Memory after every image has been listed once, in MiB.
    listed: Samples,
}

/// Measures memory and startup on SQLite, or on the Postgres server at `server`.
pub(crate) async fn run(server: Option<&str>, goals: &mut Table) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let url = match server {
        Some(server) => Some(seed::new_database(server, "bench_empty").await?),
        None => None,
    };
    let empty = Service::start(data.path(), url.as_deref(), &[]).await?;
    read_all(&empty).await?;
    let base = empty.memory()?;
    empty.end().await?;

    let header =
        ["images", "ready after ms", "MiB when ready", "MiB after all were listed", "MiB of the empty one"];
    let mut growth = Table::new(&header);
    for images in IMAGES {
        let catalogue = Catalogue::open(server, images, Contents::Ordinary).await?;
        let Starts { times, ready, listed } = Starts::measure(&catalogue).await?;
        growth.row(&[
            images.to_string(),
            times.to_string(),
            figure(ready.median()),
            figure(listed.median()),
            figure(base),
        ]);
        let Some((mebibytes, seconds)) = limits(images) else { continue };
        let what = format!("{} images, {}", figure(images as f64), catalogue.database());
        goals.compare(
            format!("{what}: memory above that of an empty catalogue, all listed once, MiB"),
            format!("{} MiB, {} when ready", figure(listed.median()), figure(ready.median())),
            format!("empty: {} MiB", figure(base)),
            &Samples::one(listed.median() - base),
            Goal::AtMost(mebibytes),
        );
        goals.compare(
            format!("{what}: start until the catalogue is served, ms"),
            times.to_string(),
            "",
            &times,
            Goal::AtMost(seconds * 1_000.0),
        );
    }
    growth.print(&format!("Memory and start, {}", if server.is_some() { "Postgres" } else { "SQLite" }));
    Ok(())
}

/// Measures how much memory and startup time a hostile tenth of the images adds per byte stored.
pub(crate) async fn hostile(server: Option<&str>, goals: &mut Table) -> anyhow::Result<()> {
    const MIB: f64 = (1 << 20) as f64;
    let ordinary = Catalogue::open(server, BESIDE_HOSTILE, Contents::Ordinary).await?;
    let hostile = Catalogue::open(server, BESIDE_HOSTILE, Contents::HostileTenth).await?;
    let (without, with) = (Starts::measure(&ordinary).await?, Starts::measure(&hostile).await?);
    let (bytes_without, bytes_with) = (ordinary.bytes().await?, hostile.bytes().await?);
    let stored = (bytes_with.stored - bytes_without.stored) / MIB;
    let counted = (bytes_with.counted - bytes_without.counted) / MIB;
    let what = format!(
        "{} images, {}, a tenth with 256 KiB of random text and 1,000 grants each",
        figure(BESIDE_HOSTILE as f64),
        ordinary.database()
    );
    let memory = with.listed.median() - without.listed.median();
    goals.compare(
        format!("{what}: memory over the bytes that they have more in texts and grants"),
        format!(
            "{} MiB more: {} MiB, {} when ready",
            figure(memory),
            figure(with.listed.median()),
            figure(with.ready.median())
        ),
        format!("{} MiB more stored; without: {} MiB", figure(stored), figure(without.listed.median())),
        &Samples::one(memory / stored),
        Goal::AtMost(1.0),
    );
    goals.compare(
        "the same: memory over what is counted of it against --index-memory",
        format!("{} MiB", figure(memory)),
        format!("{} MiB", figure(counted)),
        &Samples::one(memory / counted),
        Goal::AtMost(1.0),
    );
    let start = with.times.median() - without.times.median();
    goals.compare(
        "the same: times longer to start, over times as many bytes of texts and grants",
        format!("{} ms, {} ms for each MiB more", with.times, figure(start / stored)),
        format!(
            "without: {} ms, {} ms for each MiB",
            without.times,
            figure(without.times.median() / (bytes_without.stored / MIB))
        ),
        &Samples::one(
            (with.times.median() / without.times.median()) / (bytes_with.stored / bytes_without.stored),
        ),
        Goal::AtMost(1.0),
    );
    Ok(())
}

impl Starts {
    async fn measure(catalogue: &Catalogue) -> anyhow::Result<Self> {
        let (mut times, mut ready, mut listed) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..STARTS {
            let service = catalogue.service().await?;
            times.push(milliseconds(service.ready_after));
            ready.push(service.memory()?);
            read_all(&service).await?;
            listed.push(service.memory()?);
            service.end().await?;
        }
        Ok(Self { times: Samples::new(times), ready: Samples::new(ready), listed: Samples::new(listed) })
    }
}

/// Returns the limits of memory, in MiB, and of startup, in seconds.
fn limits(images: u64) -> Option<(f64, f64)> {
    match images {
        100_000 => Some((170.0, 1.5)),
        1_000_000 => Some((1.7 * 1_024.0, 12.0)),
        _ => None,
    }
}

/// Lists every image once, so that everything created on first use is in memory.
async fn read_all(service: &Service) -> anyhow::Result<()> {
    let mut images = service.client("admin", &[Role::Admin]).images;
    let mut request = ListImagesRequest { page_size: 1_000, ..Default::default() };
    loop {
        let page = images.list_images(request.clone()).await?.into_inner();
        if page.next_page_token.is_empty() {
            return Ok(());
        }
        request.page_token = page.next_page_token;
    }
}
