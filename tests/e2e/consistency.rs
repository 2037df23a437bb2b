//! Watches under disturbance: in the end each watcher knows exactly what a list returns, and on the way it
//! receives nothing that it may not see.

mod watcher;
mod writer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use image_service::Role;
use proto::images::{self as api, ImageStatus};

use self::{
    watcher::{Reader, Watcher},
    writer::Writers,
};
use crate::{
    client::{Client, client},
    fake_engine::FakeEngine,
    proxy::Proxy,
    stack::{Service, Worker, number},
};

/// Reproducible pseudo-random numbers (xorshift64).
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or_default() % limit
    }
}

/// Subjects that write, by number; [`GUESTS`] may be granted access.
const OWNERS: [&str; 2] = ["alice", "bob"];
const GUESTS: [&str; 3] = ["bob", "carol", "dave"];

fn queries() -> Vec<api::WatchImagesRequest> {
    let any = api::WatchImagesRequest::default;
    vec![
        any(),
        api::WatchImagesRequest { search: "STRASSE".to_owned(), ..any() },
        api::WatchImagesRequest { search: "%".to_owned(), ..any() },
        api::WatchImagesRequest { enabled: Some(true), ..any() },
        api::WatchImagesRequest { kind: api::ImageKind::Template.into(), ..any() },
        api::WatchImagesRequest {
            statuses: vec![ImageStatus::BuildFinished.into(), ImageStatus::BuildPending.into()],
            ..any()
        },
        api::WatchImagesRequest { creator: "alice".to_owned(), view: api::ImageView::Full.into(), ..any() },
    ]
}

/// Runs writers on `write` and watchers on `read`, and compares the results in the end.
async fn follow(seed: u64, write: &Service, read: &Service, steps: usize) -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let _worker = Worker::start(write, "w1", &engine.docker_host())?;
    let proxy = Arc::new(Proxy::start(read.addr).await?);
    let mut random = Random::new(seed);
    let writers = Arc::new(Writers::default());
    let is_over = Arc::new(AtomicBool::new(false));
    let mut watching = tokio::task::JoinSet::new();
    for (i, request) in queries().into_iter().cycle().take(14).enumerate() {
        let identity = ["root", "alice", "bob", "carol", "dave"][i % 5];
        let role = if identity == "root" { Role::Admin } else { Role::Builder };
        let token = read.token(identity, &[role]);
        let addr = if random.below(2) == 0 { proxy.addr() } else { read.addr };
        let reader = match random.below(4) {
            0 => Reader::Slow,
            1 => Reader::Halting,
            _ => Reader::Prompt,
        };
        let watcher = Watcher::new(identity, client(addr, &token), request, reader, Arc::clone(&writers));
        let lister = client(read.addr, &token);
        let (is_over, random) = (Arc::clone(&is_over), Random::new(seed * 100 + i as u64));
        watching.spawn(async move { watcher.follow(lister, &is_over, random).await });
    }
    let mut cutting = tokio::task::JoinSet::new();
    let cutter = Arc::clone(&proxy);
    cutting.spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            cutter.cut();
        }
    });
    let clients: Vec<Client> = OWNERS.iter().map(|owner| write.builder(owner)).collect();
    for _ in 0..steps {
        writers.step(&clients, &mut random).await?;
    }
    is_over.store(true, Ordering::Release);
    // A watcher that keeps being cut would still get there, but this ends sooner.
    cutting.abort_all();
    while let Some(watched) = watching.join_next().await {
        watched??;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_watcher_ends_with_what_a_list_gives_it() -> anyhow::Result<()> {
    let seeds = match std::env::var("TRAILER_TEST_SEED") {
        Ok(seed) => vec![seed.parse()?],
        Err(_) => (1..=number("TRAILER_TEST_HISTORIES", 12)).collect(),
    };
    for seed in seeds {
        let service = Service::start().await?;
        follow(seed, &service, &service, 60).await.map_err(|error| error.context(format!("seed {seed}")))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_of_one_replica_follow_what_another_writes() -> anyhow::Result<()> {
    let write = Service::start().await?;
    let Some(read) = write.start_replica().await? else {
        // SQLite has no replicas.
        return Ok(());
    };
    follow(11, &write, &read, 150).await
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_without_a_notification_are_found() -> anyhow::Result<()> {
    let write = Service::start().await?;
    let Some(read) = write.start_replica().await? else {
        return Ok(());
    };
    let database = Arc::clone(write.database());
    let mut deafening = tokio::task::JoinSet::new();
    deafening.spawn(async move {
        loop {
            database.end_listeners().await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        #[expect(unreachable_code, reason = "it says what the errors are")]
        Ok::<(), anyhow::Error>(())
    });
    follow(21, &write, &read, 100).await?;
    anyhow::ensure!(deafening.try_join_next().is_none(), "the listeners were not ended");
    Ok(())
}
