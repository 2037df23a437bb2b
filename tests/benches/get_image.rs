//! `GetImage` on a catalogue of 100,000 images, beside a bare handler.

use std::time::Duration;

use image_service::Role;
use prost::Message as _;
use proto::images as api;

use crate::{
    bare,
    client::{self, Client},
    load::{Load, load},
    report::{Goal, Samples, Table, figure},
    seed::{self, Catalogue},
    service::Running,
};

const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_secs(2);

pub(crate) async fn run(catalogue: &Catalogue, goals: &mut Table) -> anyhow::Result<()> {
    let service = catalogue.service().await?;
    let id = seed::id(2).to_string();
    let answer = service.client(seed::HALF, &[]).images.get_image(api::GetImageRequest { id }).await?;
    let answers = tempfile::tempdir()?;
    std::fs::write(answers.path().join(bare::IMAGE), answer.into_inner().encode_to_vec())?;
    let answers = answers.path().display().to_string();
    let plain = Running::bare(&[&answers]).await?;
    let select = match &catalogue.url {
        Some(url) => Some(Running::bare(&[&answers, url]).await?),
        None => None,
    };
    for (who, roles) in [("admin", &[Role::Admin][..]), (seed::HALF, &[Role::Builder])] {
        for concurrency in [1, 50] {
            // A single call waits until the database confirms that nothing is newer; concurrent calls share
            // one such query.
            let (peer, name, goal) = match &select {
                Some(select) if concurrency == 1 => (select, "bare tonic with SELECT 1", 0.8),
                _ => (&plain, "bare tonic", 0.7),
            };
            let token = service.token(who, roles);
            let (mut ratios, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let own = calls(client::client(service.addr, &token), concurrency, catalogue.images).await?;
                let bare = calls(client::client(peer.addr, &token), concurrency, catalogue.images).await?;
                ratios.push(own.rate / bare.rate);
                ours.push(own);
                theirs.push(bare);
            }
            goals.compare(
                format!(
                    "GetImage of {}, {}, as {who}, {concurrency} at a time",
                    figure(catalogue.images as f64),
                    catalogue.database()
                ),
                summary(&ours),
                format!("{name}: {}", summary(&theirs)),
                &Samples::new(ratios),
                Goal::AtLeast(goal),
            );
        }
    }
    service.end().await
}

fn summary(loads: &[Load]) -> String {
    let median = |value: fn(&Load) -> f64| figure(Samples::new(loads.iter().map(value).collect()).median());
    format!("{}/s, p99 {} ms", median(|load| load.rate), median(|load| load.times.p99()))
}

async fn calls(caller: Client, concurrency: usize, images: u64) -> anyhow::Result<Load> {
    load(vec![caller; concurrency], ROUND, move |caller: Client, number| async move {
        // The half of the images that the subject `HALF` created, in pseudo-random order.
        let number = number.wrapping_mul(7_368_787) % (images / 2) * 2;
        let id = seed::id(number).to_string();
        caller.images.clone().get_image(api::GetImageRequest { id }).await?;
        Ok(())
    })
    .await
}
