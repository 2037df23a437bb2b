//! The scheduler of long scans: in slices on blocking threads, with callers taking turns.

use super::{Index, filter::Budget, images::Images};
use crate::{access::Principal, error::Error, fair_semaphore::FairSemaphore};

/// A scheduler that runs one slice at a time.
#[derive(Clone, Debug)]
pub(super) struct Scans(FairSemaphore);

impl Default for Scans {
    fn default() -> Self {
        Self(FairSemaphore::new(1))
    }
}

impl Scans {
    /// Number of chunks run inline, after which most scans are complete.
    const INLINE_CHUNKS: usize = 2;
    /// Number of chunks in a slice, which takes about two milliseconds.
    const SLICE_CHUNKS: usize = 16;

    /// Runs a scan until it is complete.
    ///
    /// If the future is dropped, the scan ends after its current slice.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if too many scans of the caller are waiting or the index is reloaded
    /// meanwhile, and [`Error::Draining`] at shutdown.
    pub(super) async fn run<S: Send + 'static>(
        &self,
        index: &Index,
        caller: &Principal,
        begin: impl FnOnce(&Images) -> S,
        advance: fn(&mut S, &Images, Budget) -> bool,
    ) -> Result<S, Error> {
        let (load, mut scan) = {
            let images = index.images();
            (images.load, begin(&images))
        };
        if index.advance(load, &mut scan, advance, Self::INLINE_CHUNKS)? {
            return Ok(scan);
        }
        loop {
            let slice = self.0.acquire(caller).await?;
            let index = index.clone();
            let advanced = tokio::task::spawn_blocking(move || {
                let is_done = index.advance(load, &mut scan, advance, Self::SLICE_CHUNKS);
                // Dropped only here: the slice of a cancelled call keeps the turn until it ends.
                drop(slice);
                is_done.map(|is_done| (scan, is_done))
            });
            let (advanced, is_done) = advanced.await.map_err(|_| Error::Draining)??;
            if is_done {
                return Ok(advanced);
            }
            scan = advanced;
        }
    }
}

impl Index {
    /// Advances a scan by up to `chunks` within one load. Returns whether it is complete.
    fn advance<S>(
        &self,
        load: u64,
        scan: &mut S,
        advance: fn(&mut S, &Images, Budget) -> bool,
        chunks: usize,
    ) -> Result<bool, Error> {
        for _ in 0..chunks {
            // Unlocked between two chunks, so that writers get their turn.
            let images = self.images();
            if images.load != load {
                return Err(Error::Busy);
            }
            if advance(scan, &images, Budget::CHUNK) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
