//! Writes that share a transaction.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{oneshot, watch};

use super::{Connection, Step};
use crate::{
    change::{CommittedRevision, Revision},
    error::Error,
};

/// Writes that share a transaction and its COMMIT.
///
/// The first write has the transaction to itself: if it is undone, all is rolled back, which affects no other
/// write. Each later write begins at a savepoint, to which the transaction is rolled back if the write is
/// undone. So a single write costs no savepoint.
#[derive(Debug)]
pub(super) struct Group<C> {
    connection: Arc<C>,
    begun: Instant,
    /// Number of writes so far.
    writes: usize,
    state: State,
    /// Latest revision logged by a write that is kept.
    latest: Option<Revision>,
    /// Calls that wait for the COMMIT. They have writes that are kept, or were undone after reading what
    /// these wrote.
    waiting: Vec<Answer>,
}

/// The content of a group's transaction.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum State {
    /// No writes.
    Empty,
    /// Kept writes, all before the savepoint.
    Saved,
    /// Kept writes, the last one after the savepoint, if there is a savepoint.
    Kept { has_savepoint: bool },
    /// A first write that is undone only by rolling everything back.
    Spoilt,
}

/// The transaction, while one write uses it.
#[derive(Debug)]
pub(crate) struct TransactionGuard<C> {
    connection: Arc<C>,
    back: Option<oneshot::Sender<Outcome>>,
}

/// A sender of the transaction to the write that waits for it.
pub(super) type Ticket<C> = oneshot::Sender<Result<TransactionGuard<C>, <C as Connection>::Error>>;

/// The outcome of a write.
#[derive(Debug)]
enum Outcome {
    /// Kept, with the latest revision that the write has logged.
    Commit(Option<Revision>, Answer),
    /// Undone. The sender is notified once what the write has read is committed, if its call waits for that.
    Rollback(Option<Answer>),
}

/// A sender of the result of the shared COMMIT.
type Answer = oneshot::Sender<Result<(), Error>>;

impl<C: Connection> Group<C> {
    /// Maximum number of writes per group. Postgres slows down with more than 64 savepoints in a transaction.
    const MOST: usize = 32;
    /// Time after which no further write joins, because the first one waits for the last.
    const LONGEST: Duration = Duration::from_millis(5);

    /// Creates a group in a transaction that has just begun.
    pub(super) fn new(connection: Arc<C>) -> Self {
        Self {
            connection,
            begun: Instant::now(),
            writes: 0,
            state: State::Empty,
            latest: None,
            waiting: Vec::new(),
        }
    }

    /// Reports whether another write may join.
    pub(super) fn has_room(&self) -> bool {
        match self.state {
            State::Empty => true,
            State::Spoilt => false,
            State::Saved | State::Kept { .. } => {
                self.writes < Self::MOST && self.begun.elapsed() < Self::LONGEST
            }
        }
    }

    /// Reports whether there is anything to commit.
    pub(super) fn has_writes(&self) -> bool {
        matches!(self.state, State::Saved | State::Kept { .. })
    }

    /// Lends the transaction to a write and waits until it ends. Skips a write whose call was cancelled.
    ///
    /// # Errors
    ///
    /// Returns the error of a savepoint statement, after which the transaction is lost.
    pub(super) async fn lend(&mut self, ticket: Ticket<C>) -> Result<(), C::Error> {
        if ticket.is_closed() {
            return Ok(());
        }
        self.save().await?;
        let (back, ended) = oneshot::channel();
        let guard = TransactionGuard { connection: Arc::clone(&self.connection), back: Some(back) };
        // If the call is gone, the transaction comes back at once.
        drop(ticket.send(Ok(guard)));
        self.writes += 1;
        match ended.await.unwrap_or(Outcome::Rollback(None)) {
            Outcome::Commit(revision, answer) => {
                self.latest = revision.or(self.latest);
                self.waiting.push(answer);
                self.state = State::Kept { has_savepoint: self.state == State::Saved };
                Ok(())
            }
            Outcome::Rollback(answer) => {
                self.waiting.extend(answer);
                self.undo().await
            }
        }
    }

    /// Moves the savepoint behind the kept writes, if there are any.
    async fn save(&mut self) -> Result<(), C::Error> {
        match self.state {
            State::Kept { has_savepoint: false } => self.connection.execute(Step::Save).await?,
            State::Kept { has_savepoint: true } => self.connection.execute(Step::SaveAgain).await?,
            State::Empty | State::Saved | State::Spoilt => return Ok(()),
        }
        self.state = State::Saved;
        Ok(())
    }

    /// Rolls back to the savepoint. Without one, [`end`](Self::end) rolls everything back.
    async fn undo(&mut self) -> Result<(), C::Error> {
        if self.state == State::Saved {
            return self.connection.execute(Step::Undo).await;
        }
        self.state = State::Spoilt;
        Ok(())
    }

    /// Commits the kept writes, publishes the latest revision, and notifies all waiting calls.
    ///
    /// # Errors
    ///
    /// Returns the error of the statement that ends the transaction, after which the connection must no
    /// longer be used.
    pub(super) async fn end(self, committed: &watch::Sender<CommittedRevision>) -> Result<(), C::Error> {
        if !self.has_writes() {
            let ended = self.connection.execute(Step::Rollback).await;
            answer(self.waiting, || Ok(()));
            return ended;
        }
        let ended = self.connection.execute(Step::Commit).await;
        match (&ended, self.latest) {
            (Ok(()), Some(latest)) => drop(committed.send_replace(CommittedRevision::Known(latest))),
            (Ok(()), None) => {}
            (Err(_), _) => drop(committed.send_replace(CommittedRevision::Unknown)),
        }
        answer(self.waiting, || ended.clone().map_err(of_all));
        ended
    }

    /// Fails all writes of a transaction that was lost before its COMMIT.
    pub(super) fn fail(self, error: &C::Error) {
        answer(self.waiting, || Err(of_all(error.clone())));
    }
}

/// Returns the error of a write whose transaction has failed as a whole, and which may be tried again. A failed
/// COMMIT may have taken effect nevertheless, except if there was no space.
fn of_all(error: impl Into<Error>) -> Error {
    let error = error.into();
    if matches!(error, Error::StorageFull) { error } else { Error::Busy }
}

fn answer(waiting: Vec<Answer>, result: impl Fn() -> Result<(), Error>) {
    for answer in waiting {
        // Its call may have been cancelled.
        let _ = answer.send(result());
    }
}

impl<C> TransactionGuard<C> {
    /// Returns the connection, which executes statements within the transaction.
    pub(crate) fn connection(&self) -> &C {
        &self.connection
    }

    /// Commits together with the group, and publishes the latest revision that was logged.
    ///
    /// The write is committed even if the call is cancelled meanwhile.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] also if the outcome is unknown.
    pub(crate) async fn commit(self, latest: Option<Revision>) -> Result<(), Error> {
        self.end(|answer| Outcome::Commit(latest, answer)).await
    }

    /// Undoes the write and waits until whatever it has read is committed, so that it can be reported.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if that was not committed.
    pub(crate) async fn rollback(self) -> Result<(), Error> {
        self.end(|answer| Outcome::Rollback(Some(answer))).await
    }

    async fn end(mut self, outcome: impl FnOnce(Answer) -> Outcome) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        if let Some(back) = self.back.take() {
            let _ = back.send(outcome(answer));
        }
        drop(self);
        // Without an answer, the task has ended, and the outcome is unknown.
        answered.await.unwrap_or(Err(Error::Busy))
    }
}

impl<C> Drop for TransactionGuard<C> {
    /// Returns the transaction of a write that has failed or whose call was cancelled.
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            let _ = back.send(Outcome::Rollback(None));
        }
    }
}
