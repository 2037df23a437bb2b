//! Callers that use as much as their limits allow.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use proto::images::{self as api, ListImagesRequest, WatchImagesRequest};
use tokio::{runtime, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::client::{self, Client};

/// Pause after a call that was refused or failed.
const PAUSE: Duration = Duration::from_millis(50);
const CONNECTIONS: usize = 10;

/// The behaviour of a greedy caller.
#[derive(Clone, Debug)]
pub(super) enum Greed {
    /// `at_once` concurrent searches in an endless loop.
    Searches { at_once: usize, terms: Vec<String> },
    /// `count` watches, each with its own search term, while the images in `changing` keep changing.
    Watches { count: usize, changing: Vec<String> },
    /// `at_once` concurrent previews of a batch over `images`.
    Previews { at_once: usize, images: Vec<String> },
}

/// A greedy caller that runs on its own low-priority thread until dropped.
///
/// It stands for a client on another machine: only its load on the service should affect the results, not its
/// own CPU time.
#[derive(Debug)]
pub(super) struct Greedy {
    counts: Arc<Counts>,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

/// Numbers of answers, of refusals with `RESOURCE_EXHAUSTED`, and of other errors.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) answered: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) failed: AtomicU64,
}

impl Greedy {
    pub(super) fn start(addr: SocketAddr, token: &str, greed: Greed) -> anyhow::Result<Self> {
        let (counts, stop) = (Arc::new(Counts::default()), CancellationToken::new());
        let (counted, stopped, token) = (Arc::clone(&counts), stop.clone(), token.to_owned());
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::Builder::new().name("greedy".to_owned()).spawn(move || {
            // On Linux this applies to the current thread only. If it fails, the figures are merely worse.
            let _ = rustix::process::nice(10);
            runtime.block_on(async {
                let callers = (0..CONNECTIONS).map(|_| client::client(addr, &token)).collect();
                let mut tasks = greed.spawn(callers, &counted);
                stopped.cancelled().await;
                tasks.abort_all();
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { counts, stop, thread: Some(thread) })
    }

    /// Waits until a call of the greedy caller was answered or refused.
    pub(super) async fn begun(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.counts.answered.load(Relaxed) + self.counts.refused.load(Relaxed) == 0 {
            let failed = self.counts.failed.load(Relaxed);
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "no answer came, {failed} calls failed"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    pub(super) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }
}

impl Drop for Greedy {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed.
            let _ = thread.join();
        }
    }
}

impl Greed {
    fn spawn(self, callers: Vec<Client>, counts: &Arc<Counts>) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let mut callers = callers.into_iter().cycle();
        let mut next = || callers.next().expect("there is one");
        match self {
            Self::Searches { at_once, terms } => {
                for number in 0..at_once {
                    tasks.spawn(search(next(), terms[number % terms.len()].clone(), Arc::clone(counts)));
                }
            }
            Self::Watches { count, changing } => {
                for number in 0..count {
                    tasks.spawn(watch(next(), format!("term {number:04}"), Arc::clone(counts)));
                }
                tasks.spawn(change(next(), changing, Arc::clone(counts)));
            }
            Self::Previews { at_once, images } => {
                let target = |id: &String| api::BatchTarget { id: id.clone(), etag: String::new() };
                let request = api::BatchImagesRequest {
                    action: api::BatchAction::Disable.into(),
                    targets: images.iter().map(target).collect(),
                    validate_only: true,
                    ..Default::default()
                };
                for _ in 0..at_once {
                    tasks.spawn(preview(next(), request.clone(), Arc::clone(counts)));
                }
            }
        }
        tasks
    }
}

impl Counts {
    /// Counts the outcome of a call, and pauses if the call failed.
    async fn count<T>(&self, outcome: Result<T, Status>) -> Option<T> {
        match outcome {
            Ok(answer) => {
                self.answered.fetch_add(1, Relaxed);
                return Some(answer);
            }
            Err(status) if status.code() == Code::ResourceExhausted => self.refused.fetch_add(1, Relaxed),
            Err(_) => self.failed.fetch_add(1, Relaxed),
        };
        tokio::time::sleep(PAUSE).await;
        None
    }
}

async fn search(caller: Client, term: String, counts: Arc<Counts>) {
    let first = ListImagesRequest { search: term, ..Default::default() };
    let mut request = first.clone();
    loop {
        let page = caller.images.clone().list_images(request.clone()).await;
        let token = counts.count(page).await.map(|page| page.into_inner().next_page_token);
        match token {
            Some(token) if !token.is_empty() => request.page_token = token,
            // Restarts at the first page, after a refusal too: the page token may belong to an evicted query.
            Some(_) | None => request = first.clone(),
        }
    }
}

async fn watch(caller: Client, term: String, counts: Arc<Counts>) {
    let request = WatchImagesRequest { search: term, ..Default::default() };
    loop {
        let opened = caller.images.clone().watch_images(request.clone()).await;
        let Some(stream) = counts.count(opened).await else { continue };
        let mut stream = stream.into_inner();
        while let Some(Some(_)) = counts.count(stream.message().await).await {}
    }
}

/// Toggles one image after another, about fifty times per second.
async fn change(caller: Client, images: Vec<String>, counts: Arc<Counts>) {
    for (number, id) in images.iter().cycle().enumerate() {
        let changed = if (number / images.len()).is_multiple_of(2) {
            let request = api::DisableImageRequest { id: id.clone(), ..Default::default() };
            caller.images.clone().disable_image(request).await.map(|_| ())
        } else {
            let request = api::EnableImageRequest { id: id.clone(), ..Default::default() };
            caller.images.clone().enable_image(request).await.map(|_| ())
        };
        counts.count(changed).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn preview(caller: Client, request: api::BatchImagesRequest, counts: Arc<Counts>) {
    loop {
        let previewed = caller.images.clone().batch_images(request.clone()).await;
        counts.count(previewed).await;
    }
}

/// Creates `count` images with configurations of about 200 KiB and returns their ids.
pub(super) async fn create_large(owner: &Client, count: usize) -> anyhow::Result<Vec<String>> {
    let mut ids = Vec::new();
    for number in 0..count {
        let lines: String =
            (0..5_000).map(|line| format!("RUN echo {number} {line} of a long one\n")).collect();
        let mut image = client::image(&format!("Large {number}"), &format!("FROM scratch\n{lines}"));
        image.template = true;
        let request = api::CreateImageRequest { image: Some(image), ..Default::default() };
        let created = owner.images.clone().create_image(request).await?.into_inner();
        ids.push(created.image.context("an image")?.id);
    }
    Ok(ids)
}
