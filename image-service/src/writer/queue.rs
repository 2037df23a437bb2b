//! The queue of waiting writes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::{
    error::Error,
    turns::{Full, Turn, Turns},
};

/// The waiting writes, until the writer's task removes them.
///
/// The number per class and caller is bounded, and further ones are refused.
#[derive(Debug)]
pub(super) struct Queue<T> {
    /// `None` after the queue was closed.
    turns: Mutex<Option<Turns<T>>>,
    arrived: Notify,
}

impl<T> Queue<T> {
    /// Maximum number of waiting writes per caller, and of background work.
    const MOST_WAITING: usize = 100;

    /// Creates a queue that skips the tickets for which `is_gone` returns true.
    pub(super) fn new(is_gone: fn(&T) -> bool) -> Self {
        Self { turns: Mutex::new(Some(Turns::new(is_gone, Self::MOST_WAITING))), arrived: Notify::new() }
    }

    /// Adds a ticket.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many tickets of the caller or class wait, and [`Error::Busy`]
    /// after the queue was closed.
    pub(super) fn push(&self, turn: Turn<'_>, ticket: T) -> Result<(), Error> {
        let mut turns = self.turns();
        let turns = turns.as_mut().ok_or(Error::Busy)?;
        turns.push(turn, ticket).map_err(|Full { limit }| Error::TooManyWrites { limit })?;
        self.arrived.notify_one();
        Ok(())
    }

    /// Removes the next ticket.
    pub(super) fn pop(&self) -> Option<T> {
        self.turns().as_mut()?.pop()
    }

    /// Waits until the queue holds a ticket.
    pub(super) async fn arrival(&self) {
        while self.turns().as_mut().is_none_or(Turns::is_empty) {
            self.arrived.notified().await;
        }
    }

    /// Returns the number of waiting tickets.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.turns().as_ref().map_or(0, Turns::len)
    }

    /// Refuses all waiting and future tickets.
    pub(super) fn close(&self) {
        let refused = self.turns().take();
        drop(refused);
    }

    fn turns(&self) -> MutexGuard<'_, Option<Turns<T>>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
