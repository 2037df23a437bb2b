//! The loader of the index: several concurrent readers read all images by key, in small pages.

use std::{cmp::Reverse, sync::Arc};

use tokio::{
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
};
use uuid::Uuid;

use super::{entry::Entry, images::Images, signatures::Signatures};
use crate::{error::Error, image::ImageId, store::Store};

/// Number of readers, and of threads that compute signatures.
const READERS: usize = 2;

/// Number of images per read. A configuration has up to 256 KiB.
const READ_BATCH: u64 = 200;

/// Loads all images, each as of some time after the call.
///
/// # Errors
///
/// Returns an error if the database cannot be read or a task panics.
pub(super) async fn load(store: &Store) -> Result<Images, Error> {
    let mut divisions = store.divide_records(READERS as u64).await?;
    divisions.insert(0, ImageId(Uuid::nil()));
    divisions.push(ImageId(Uuid::max()));
    // Bounded, for the case that images are collected more slowly than they are read.
    let (pages, mut loaded) = mpsc::channel::<Vec<Arc<Entry>>>(4);
    let mut readers = JoinSet::new();
    for range in divisions.windows(2) {
        readers.spawn(read(store.clone(), range[0], range[1], pages.clone()));
    }
    drop(pages);
    let mut entries = Vec::new();
    while let Some(page) = loaded.recv().await {
        entries.extend(page);
    }
    while let Some(ended) = readers.join_next().await {
        ended.map_err(panicked)??;
    }
    arrange(entries).await
}

/// Assigns slots to the images and builds the lookup structures.
///
/// Images updated at about the same time share a block, so that a search in update order skips the blocks
/// that do not contain its term.
pub(super) async fn arrange(mut entries: Vec<Arc<Entry>>) -> Result<Images, Error> {
    let entries = spawn_blocking(move || {
        entries.sort_unstable_by_key(|entry| (entry.image.updated_at, Reverse(entry.image.id)));
        Arc::new(entries)
    });
    let entries = entries.await.map_err(panicked)?;
    let chunks = Signatures::chunk_count(entries.len());
    let mut making = JoinSet::new();
    for chunks in [0..chunks / 2, chunks / 2..chunks] {
        let entries = Arc::clone(&entries);
        making.spawn_blocking(move || {
            let first = chunks.start;
            (first, chunks.map(|chunk| Signatures::chunk(&entries, chunk)).collect::<Vec<_>>())
        });
    }
    let mut made = Vec::new();
    while let Some(ended) = making.join_next().await {
        made.push(ended.map_err(panicked)?);
    }
    made.sort_unstable_by_key(|(first, _)| *first);
    let signatures = Signatures::new(made.into_iter().flat_map(|(_, chunks)| chunks).collect());
    spawn_blocking(move || Images::new(&entries, signatures)).await.map_err(panicked)
}

fn panicked(error: tokio::task::JoinError) -> Error {
    Error::Internal(Box::new(error))
}

async fn read(
    store: Store,
    mut after: ImageId,
    until: ImageId,
    pages: mpsc::Sender<Vec<Arc<Entry>>>,
) -> Result<(), Error> {
    loop {
        let (page, last) = store.records(after, until, READ_BATCH).await?;
        let Some(last) = last else {
            return Ok(());
        };
        after = last;
        let loaded = page.into_iter().map(|read| Arc::new(Entry::new(read, None))).collect();
        // The receiver is dropped once another reader has failed.
        if pages.send(loaded).await.is_err() {
            return Ok(());
        }
    }
}
