//! Any number of watchers of one server.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use proto::images::{WatchImagesRequest, watch_images_response::Event};
use tokio::{sync::watch, task::JoinSet};
use tonic::transport::Channel;

use crate::{client, load::milliseconds, report::Samples};

pub(super) const CONNECTIONS: usize = 100;
const LIMIT: Duration = Duration::from_secs(60);

/// Watchers that count the changes they receive.
#[derive(Debug)]
pub(super) struct Watchers {
    arrived: Arc<AtomicU64>,
    tasks: JoinSet<anyhow::Result<Vec<(i64, Instant)>>>,
    stop: watch::Sender<bool>,
}

impl Watchers {
    /// Opens a watch for each token, over [`CONNECTIONS`] connections, and waits for the initial states.
    pub(super) async fn open(addr: SocketAddr, tokens: &[String], notes_times: bool) -> anyhow::Result<Self> {
        let connections: Vec<Channel> = (0..CONNECTIONS).map(|_| client::channel(addr)).collect();
        let arrived = Arc::new(AtomicU64::new(0));
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
            let (counted, mut stopped) = (Arc::clone(&arrived), stopped.clone());
            tasks.spawn(async move {
                let mut times = Vec::new();
                loop {
                    let message = tokio::select! {
                        _ = stopped.wait_for(|stopped| *stopped) => return Ok(times),
                        message = stream.message() => message?,
                    };
                    if let Some(Event::Changed(image)) = message.context("the watch ended")?.event {
                        if notes_times {
                            times.push((image.revision, Instant::now()));
                        }
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        Ok(Self { arrived, tasks, stop })
    }

    /// Waits until `count` changes have arrived.
    pub(super) async fn wait_for(&self, count: u64) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let arrived = self.arrived.load(Ordering::Relaxed);
            if arrived >= count {
                return Ok(());
            }
            anyhow::ensure!(begun.elapsed() < LIMIT, "{arrived} of {count} changes arrived");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Closes the watches and returns the latency of each change to each watcher, in milliseconds.
    pub(super) async fn times(self, changes: &[(i64, Instant)]) -> anyhow::Result<Samples> {
        let arrived = self.close().await?;
        let mut times = Vec::with_capacity(arrived.len());
        for (revision, at) in &arrived {
            let change = changes.binary_search_by_key(revision, |(revision, _)| *revision);
            let (_, begun) = changes[change.ok().context("a change that nobody made")?];
            times.push(milliseconds(at.duration_since(begun)));
        }
        Ok(Samples::new(times))
    }

    pub(super) async fn close(mut self) -> anyhow::Result<Vec<(i64, Instant)>> {
        self.stop.send_replace(true);
        let mut all = Vec::new();
        while let Some(arrived) = self.tasks.join_next().await {
            all.append(&mut arrived??);
        }
        Ok(all)
    }
}
