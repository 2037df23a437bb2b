//! The scheduler of long scans: in slices on blocking threads, with callers taking turns.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::{Index, filter::Budget, images::Images};
use crate::{
    access::Principal,
    error::Error,
    turns::{Turn, Turns},
};

/// A queue of scans that runs one slice at a time.
#[derive(Clone, Debug)]
pub(super) struct Scans(Arc<Mutex<Queue>>);

#[derive(Debug)]
struct Queue {
    /// Set while a scan has the turn.
    is_taken: bool,
    waiting: Turns<oneshot::Sender<Slice>>,
}

/// The turn of a scan, held until dropped.
#[derive(Debug)]
struct Slice {
    /// `None` once the turn was passed on.
    scans: Option<Scans>,
}

impl Default for Scans {
    fn default() -> Self {
        let waiting = Turns::new(oneshot::Sender::is_closed, Self::MOST_WAITING);
        Self(Arc::new(Mutex::new(Queue { is_taken: false, waiting })))
    }
}

impl Scans {
    /// Maximum number of scans of one caller that wait: as many as it may have calls and streams.
    const MOST_WAITING: usize = 2_000;
    /// Number of chunks run inline, after which most scans are complete.
    const INLINE_CHUNKS: usize = 8;
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
            let slice = self.turn(caller).await?;
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

    async fn turn(&self, caller: &Principal) -> Result<Slice, Error> {
        let (ticket, turn) = oneshot::channel();
        {
            let mut queue = self.queue();
            if !queue.is_taken {
                queue.is_taken = true;
                return Ok(Slice { scans: Some(self.clone()) });
            }
            queue.waiting.push(Turn::Caller(caller), ticket).map_err(|_| Error::Busy)?;
        }
        turn.await.map_err(|_| Error::Draining)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Drop for Slice {
    /// Passes the turn to the next scan that still waits.
    fn drop(&mut self) {
        let Some(scans) = self.scans.take() else {
            return;
        };
        loop {
            let next = {
                let mut queue = scans.queue();
                let next = queue.waiting.pop();
                queue.is_taken = next.is_some();
                next
            };
            let Some(next) = next else {
                return;
            };
            match next.send(Self { scans: Some(scans.clone()) }) {
                Ok(()) => return,
                // The scan was cancelled meanwhile.
                Err(mut slice) => slice.scans = None,
            }
        }
    }
}
