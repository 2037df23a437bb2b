//! Loads the index from the database: every image by key, in small reads, by several readers side by side.

use std::sync::Arc;

use tokio::{
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
};
use uuid::Uuid;

use super::{entry::Entry, images::Images, signatures::Trigrams};
use crate::{error::Error, image::ImageId, store::Store};

/// How many readers there are.
const READERS: u64 = 2;

/// How many images one read brings. A configuration has up to 256 KiB.
const READ_AT_ONCE: u64 = 200;

type Loaded = Vec<(Arc<Entry>, Trigrams)>;

/// Loads all images, each as it was at some time since the call.
///
/// # Errors
///
/// Those of the database.
pub(super) async fn load(store: &Store) -> Result<Images, Error> {
    let mut divisions = store.divide_records(READERS).await?;
    divisions.insert(0, ImageId(Uuid::nil()));
    divisions.push(ImageId(Uuid::max()));
    // Full when the images are put in their places more slowly than they are read.
    let (pages, mut loaded) = mpsc::channel::<Loaded>(4);
    let putting = spawn_blocking(move || {
        let mut images = Images::default();
        while let Some(page) = loaded.blocking_recv() {
            for (entry, trigrams) in page {
                images.put(entry, Some(&trigrams));
            }
        }
        images
    });
    let mut readers = JoinSet::new();
    for range in divisions.windows(2) {
        readers.spawn(read(store.clone(), range[0], range[1], pages.clone()));
    }
    drop(pages);
    while let Some(ended) = readers.join_next().await {
        ended.map_err(|panicked| Error::Internal(Box::new(panicked)))??;
    }
    putting.await.map_err(|panicked| Error::Internal(Box::new(panicked)))
}

async fn read(
    store: Store,
    mut after: ImageId,
    until: ImageId,
    pages: mpsc::Sender<Loaded>,
) -> Result<(), Error> {
    loop {
        let page = store.records(after, until, READ_AT_ONCE).await?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = last.image.id;
        let mut loaded = Vec::with_capacity(page.len());
        for read in page {
            let entry = Entry::new(read, None);
            let trigrams = Trigrams::of([entry.text()]);
            loaded.push((Arc::new(entry), trigrams));
        }
        // Fails only when what puts them in their places has panicked, which is told there.
        if pages.send(loaded).await.is_err() {
            return Ok(());
        }
    }
}
