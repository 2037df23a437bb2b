//! Flushes of a connection, which responses wait for so that little of them is buffered while the client does not read.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// The flushes of a connection: after each, all that was written before is in the hands of the system.
#[derive(Debug, Default)]
pub struct Flushes {
    count: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl Flushes {
    /// Counts a flush, and wakes what waits for it.
    pub(super) fn flushed(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for waker in waiting {
            waker.wake();
        }
    }

    /// Returns the number of flushes so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Waits for a flush after the first `seen` ones.
    pub fn poll_after(&self, seen: u64, cx: &mut Context<'_>) -> Poll<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.count() != seen {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_response_waits_for_the_next_flush() {
        let flushes = Flushes::default();
        flushes.flushed();
        std::future::poll_fn(|cx| flushes.poll_after(0, cx)).await;
        let waiting = std::future::poll_fn(|cx| flushes.poll_after(1, cx));
        let flushing = async {
            tokio::task::yield_now().await;
            flushes.flushed();
        };
        tokio::join!(waiting, flushing);
        assert_eq!(flushes.count(), 2);
    }
}
