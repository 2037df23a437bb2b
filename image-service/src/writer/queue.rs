//! The writes that wait for their turn.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::{
    error::Error,
    turns::{Full, Turn, Turns},
};

/// The writes that wait; the writer's task takes them out. Each class and caller has a bounded number, beyond which more are refused.
#[derive(Debug)]
pub(super) struct Queue<T> {
    /// None after it was closed.
    turns: Mutex<Option<Turns<T>>>,
    arrived: Notify,
}

impl<T> Queue<T> {
    /// The most writes of one caller that wait.
    const MOST_WAITING: usize = 100;

    /// Creates a queue whose tickets are passed over once `is_gone` says that nobody waits for them.
    pub(super) fn new(is_gone: fn(&T) -> bool) -> Self {
        Self { turns: Mutex::new(Some(Turns::new(is_gone, Self::MOST_WAITING))), arrived: Notify::new() }
    }

    /// Adds a ticket.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyWrites`] when as many wait as may, and [`Error::Busy`] after it was closed.
    pub(super) fn push(&self, turn: Turn<'_>, ticket: T) -> Result<(), Error> {
        let mut turns = self.turns();
        let turns = turns.as_mut().ok_or(Error::Busy)?;
        turns.push(turn, ticket).map_err(|Full { limit }| Error::TooManyWrites { limit })?;
        self.arrived.notify_one();
        Ok(())
    }

    /// Removes the ticket whose turn it is.
    pub(super) fn pop(&self) -> Option<T> {
        self.turns().as_mut()?.pop()
    }

    /// Waits until somebody waits.
    pub(super) async fn arrival(&self) {
        while self.turns().as_mut().is_none_or(Turns::is_empty) {
            self.arrived.notified().await;
        }
    }

    /// Returns how many wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.turns().as_ref().map_or(0, Turns::len)
    }

    /// Refuses those that wait, and whoever comes.
    pub(super) fn close(&self) {
        let refused = self.turns().take();
        drop(refused);
    }

    fn turns(&self) -> MutexGuard<'_, Option<Turns<T>>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
