//! Work on the images that takes longer than a moment: in slices beside the async threads, with callers in turn.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::{Budget, Index, images::Images};
use crate::{access::Principal, error::Error};

/// Whose turn it is.
#[derive(Debug)]
pub(super) struct Scans(Arc<Semaphore>);

impl Default for Scans {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Scans {
    /// How many stretches are done at once: most work is over then.
    const AT_ONCE: usize = 4;
    /// How many stretches a turn has: some two milliseconds.
    const TURN: usize = 16;

    /// Advances a scan until it is done. Dropped, the scan ends with its slice.
    ///
    /// # Errors
    ///
    /// [`Error::Draining`] at the end of the process.
    pub(super) async fn run<S: Send + 'static>(
        &self,
        index: &Index,
        _caller: &Principal,
        mut scan: S,
        advance: fn(&mut S, &Images, Budget) -> bool,
    ) -> Result<S, Error> {
        for _ in 0..Self::AT_ONCE {
            if advance(&mut scan, &index.images(), Budget::STRETCH) {
                return Ok(scan);
            }
        }
        loop {
            let _turn = self.0.acquire().await.map_err(|_| Error::Draining)?;
            let index = index.clone();
            let slice = tokio::task::spawn_blocking(move || {
                let is_done = (0..Self::TURN).any(|_| advance(&mut scan, &index.images(), Budget::STRETCH));
                (scan, is_done)
            });
            let (advanced, is_done) = slice.await.map_err(|_| Error::Draining)?;
            if is_done {
                return Ok(advanced);
            }
            scan = advanced;
        }
    }
}
