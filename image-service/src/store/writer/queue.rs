//! The writes that wait for their turn.

use std::sync::{Mutex, MutexGuard, PoisonError};

use sea_orm::DbErr;
use tokio::sync::{Notify, oneshot};

use super::Lent;
use crate::{
    error::Error,
    turns::{Full, Turn, Turns},
};

/// Takes the transaction to the write that waits for it.
pub(super) type Ticket = oneshot::Sender<Result<Lent, DbErr>>;

/// The writes that wait; the writer's task takes them out. Each class and caller has a bounded number, beyond which more are refused.
#[derive(Debug)]
pub(super) struct Queue {
    /// None after it was closed.
    turns: Mutex<Option<Turns<Ticket>>>,
    arrived: Notify,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            turns: Mutex::new(Some(Turns::new(Ticket::is_closed, Self::MOST_WAITING))),
            arrived: Notify::new(),
        }
    }
}

impl Queue {
    /// The most writes of one caller that wait.
    const MOST_WAITING: usize = 100;

    /// Adds a ticket.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyWrites`] when as many wait as may, and [`Error::Busy`] after it was closed.
    pub(super) fn push(&self, turn: Turn<'_>, ticket: Ticket) -> Result<(), Error> {
        let mut turns = self.turns();
        let turns = turns.as_mut().ok_or(Error::Busy)?;
        turns.push(turn, ticket).map_err(|Full { limit }| Error::TooManyWrites { limit })?;
        self.arrived.notify_one();
        Ok(())
    }

    /// Removes the ticket whose turn it is.
    pub(super) fn pop(&self) -> Option<Ticket> {
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

    fn turns(&self) -> MutexGuard<'_, Option<Turns<Ticket>>> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
