//! A watcher that applies every event and checks it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use proto::{
    images::{self as api, watch_images_response::Event},
    watch::{ImagesWatch, Watched},
};
use tokio::time::Instant;

use super::{Random, writer::Writers};
use crate::{
    client::{Caller, Client},
    stack::LIMIT,
};

/// The pace of a watcher.
#[derive(Copy, Clone, Debug)]
pub(super) enum Reader {
    Prompt,
    Slow,
    /// A reader that sometimes pauses for longer than its pending events stay fresh.
    Halting,
}

pub(super) struct Watcher {
    identity: &'static str,
    watch: ImagesWatch<Caller>,
    request: api::WatchImagesRequest,
    reader: Reader,
    writers: Arc<Writers>,
    images: BTreeMap<String, api::Image>,
    /// Ids of the images that were reported as removed.
    removed: BTreeSet<String>,
    revision: i64,
}

impl Watcher {
    pub(super) fn new(
        identity: &'static str,
        client: Client,
        request: api::WatchImagesRequest,
        reader: Reader,
        writers: Arc<Writers>,
    ) -> Self {
        let watch = ImagesWatch::new(client.images, request.clone());
        Self {
            identity,
            watch,
            request,
            reader,
            writers,
            images: BTreeMap::new(),
            removed: BTreeSet::new(),
            revision: 0,
        }
    }

    /// Applies events until the writers are done and the result equals a list.
    pub(super) async fn follow(
        mut self,
        lister: Client,
        is_over: &AtomicBool,
        mut random: Random,
    ) -> anyhow::Result<()> {
        let mut deadline = None;
        loop {
            if is_over.load(Ordering::Acquire) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + LIMIT);
                let listed = self.list(&lister).await?;
                if listed == self.images {
                    let unseen = self.removed.iter().find(|id| !self.writers.could_see(self.identity, id));
                    anyhow::ensure!(unseen.is_none(), "{} was sent the end of {unseen:?}", self.identity);
                    return Ok(());
                }
                if Instant::now() > deadline {
                    anyhow::bail!(
                        "{} watching {:?} knows\n{:#?}\nand not\n{listed:#?}",
                        self.identity,
                        self.request,
                        self.images
                    );
                }
            }
            let pause = match self.reader {
                Reader::Prompt => 0,
                Reader::Slow => random.below(30),
                Reader::Halting if random.below(40) == 0 => 1_300,
                Reader::Halting => 0,
            };
            if pause > 0 && !is_over.load(Ordering::Acquire) {
                tokio::time::sleep(Duration::from_millis(pause as u64)).await;
            }
            let next = self.watch.next();
            if let Ok(watched) = tokio::time::timeout(Duration::from_millis(200), next).await {
                self.fold(watched?)?;
            }
        }
    }

    fn fold(&mut self, watched: Watched) -> anyhow::Result<()> {
        let event = match watched {
            Watched::Begun => {
                self.images.clear();
                self.revision = 0;
                return Ok(());
            }
            Watched::Event(event) => event,
        };
        let revision = self.watch.resume_revision().split('.').next().unwrap_or_default();
        let revision = if revision.is_empty() { 0 } else { revision.parse().context("a revision")? };
        anyhow::ensure!(
            revision >= self.revision,
            "the revision went back from {} to {revision}",
            self.revision
        );
        self.revision = revision;
        match event {
            Event::Image(image) | Event::Changed(image) => {
                let is_hidden = writer_hides(&image, self.identity);
                anyhow::ensure!(!is_hidden, "{} was sent {image:?}", self.identity);
                self.images.insert(image.id.clone(), *image);
            }
            Event::Removed(removed) => {
                self.images.remove(&removed.id);
                self.removed.insert(removed.id);
            }
            Event::Synced(_) | Event::Bookmark(_) => {}
        }
        Ok(())
    }

    async fn list(&self, lister: &Client) -> anyhow::Result<BTreeMap<String, api::Image>> {
        let mut request = api::ListImagesRequest {
            view: self.request.view,
            search: self.request.search.clone(),
            kind: self.request.kind,
            statuses: self.request.statuses.clone(),
            enabled: self.request.enabled,
            pulled: self.request.pulled,
            creator: self.request.creator.clone(),
            page_size: 1_000,
            ..api::ListImagesRequest::default()
        };
        let mut images = BTreeMap::new();
        loop {
            let page = lister.images.clone().list_images(request.clone()).await?.into_inner();
            // A watch does not say where it has found its term.
            let as_watched = |image| api::Image { search_hits: Vec::new(), ..image };
            images.extend(page.images.into_iter().map(|image| (image.id.clone(), as_watched(image))));
            if page.next_page_token.is_empty() {
                return Ok(images);
            }
            request.page_token = page.next_page_token;
        }
    }
}

/// Returns whether the description hides the image from this identity; see [`Writers`].
fn writer_hides(image: &api::Image, identity: &str) -> bool {
    image.description.split(' ').any(|word| word == format!("hidden-from-{identity}"))
}
