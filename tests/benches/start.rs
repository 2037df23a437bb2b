//! Memory and start of a service by the number of images.

use image_service::Role;
use proto::images::ListImagesRequest;

use crate::{
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seeding::{self, Catalogue},
    service::Service,
};

const IMAGES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
const STARTS: usize = 3;

/// Measures on SQLite, or on the Postgres server at `server`.
pub(crate) async fn run(server: Option<&str>, goals: &mut Table) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let url = match server {
        Some(server) => Some(seeding::new_database(server, "bench_empty").await?),
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
        let catalogue = match server {
            Some(server) => Catalogue::on_postgres(server, images).await?,
            None => Catalogue::on_sqlite(images).await?,
        };
        let (mut times, mut memory) = (Vec::new(), (Vec::new(), Vec::new()));
        for _ in 0..STARTS {
            let service = catalogue.service().await?;
            times.push(milliseconds(service.ready_after));
            memory.0.push(service.memory()?);
            read_all(&service).await?;
            memory.1.push(service.memory()?);
            service.end().await?;
        }
        let (times, ready, read) = (Samples::new(times), Samples::new(memory.0), Samples::new(memory.1));
        growth.row(&[
            images.to_string(),
            times.to_string(),
            figure(ready.median()),
            figure(read.median()),
            figure(base),
        ]);
        let Some((mebibytes, seconds)) = limits(images) else { continue };
        let what = format!("{} images, {}", figure(images as f64), catalogue.database());
        goals.compare(
            format!("{what}: memory above that of an empty catalogue, all listed once, MiB"),
            format!("{} MiB, {} when ready", figure(read.median()), figure(ready.median())),
            format!("empty: {} MiB", figure(base)),
            &Samples::one(read.median() - base),
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

/// Returns the MiB and the seconds to reach.
fn limits(images: u64) -> Option<(f64, f64)> {
    match images {
        100_000 => Some((170.0, 1.5)),
        1_000_000 => Some((1.7 * 1_024.0, 12.0)),
        _ => None,
    }
}

/// Lists every image once, so that whatever is made on first use is there.
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
