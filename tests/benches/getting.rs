//! GetImage of one in a million images, beside a bare tonic handler that runs the same SQL.

use std::time::Duration;

use image_service::Role;
use prost::Message as _;
use proto::images as api;

use crate::{
    client::{self, Client},
    load::{Load, load},
    report::{Goal, Samples, Table, figure},
    seeding::{self, Catalogue},
    service::{Running, Service},
};

const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_secs(2);

pub(crate) async fn run(catalogue: &Catalogue, table: &mut Table) -> anyhow::Result<()> {
    let service = catalogue.service(&[]).await?;
    let id = seeding::id(2).to_string();
    let answer = service.client(seeding::HALF, &[]).images.get_image(api::GetImageRequest { id }).await?;
    let message = tempfile::NamedTempFile::new()?;
    std::fs::write(message.path(), answer.into_inner().encode_to_vec())?;
    let (message, file) = (message.path().display().to_string(), catalogue.file().display().to_string());
    let bare = Running::bare(&[&message, &file]).await?;

    for (who, roles) in [("an admin", vec![Role::Admin]), (seeding::HALF, vec![Role::Builder])] {
        for concurrency in [1, 50] {
            let (mut ratios, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let own = calls(&service, who, &roles, concurrency, catalogue.images).await?;
                let peer =
                    calls_of(vec![client::client(bare.addr, "of nobody"); 1], concurrency, catalogue.images)
                        .await?;
                ratios.push(own.rate / peer.rate);
                ours.push(own);
                theirs.push(peer);
            }
            let rate = |loads: &[Load]| Samples::new(loads.iter().map(|load| load.rate).collect()).median();
            let p99 =
                |loads: &[Load]| Samples::new(loads.iter().map(|load| load.times.p99()).collect()).median();
            table.compare(
                format!("GetImage of {}, as {who}, {concurrency} at a time", figure(catalogue.images as f64)),
                format!("{}/s, p99 {} ms", figure(rate(&ours)), figure(p99(&ours))),
                format!("bare tonic, same SQL: {}/s, p99 {} ms", figure(rate(&theirs)), figure(p99(&theirs))),
                &Samples::new(ratios),
                Goal::AtLeast(0.8),
            );
        }
    }
    service.end().await
}

async fn calls(
    service: &Service,
    who: &str,
    roles: &[Role],
    concurrency: usize,
    images: u64,
) -> anyhow::Result<Load> {
    calls_of(vec![service.client(who, roles)], concurrency, images).await
}

async fn calls_of(connections: Vec<Client>, concurrency: usize, images: u64) -> anyhow::Result<Load> {
    let callers = (0..concurrency).map(|caller| connections[caller % connections.len()].clone()).collect();
    load(callers, ROUND, move |caller: Client, number| async move {
        // Half of the images, which are those of the one who calls, in no order.
        let number = number.wrapping_mul(7_368_787) % (images / 2) * 2;
        let id = seeding::id(number).to_string();
        caller.images.clone().get_image(api::GetImageRequest { id }).await?;
        Ok(())
    })
    .await
}
