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
/// The first has the transaction to itself: if it is not kept, all is rolled back, and nobody else is concerned. Each later one begins
/// at a savepoint, to which the transaction goes back if it is not kept. So a write that is alone costs no savepoint.
#[derive(Debug)]
pub(super) struct Group<C> {
    connection: Arc<C>,
    begun: Instant,
    lent: usize,
    state: State,
    /// The latest revision that was logged by a write that is kept.
    latest: Option<Revision>,
    /// Those who wait for the COMMIT: the writes that are kept, and those that have read what these have written.
    waiting: Vec<Answer>,
}

/// The content of the transaction.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum State {
    /// Nothing yet.
    Empty,
    /// Writes that are kept, all before the savepoint.
    Saved,
    /// Writes that are kept, the last one after the savepoint, if there is one yet.
    Kept { has_savepoint: bool },
    /// A first write that is not kept.
    Spoilt,
}

/// The transaction, for as long as one write has it.
#[derive(Debug)]
pub(crate) struct Lent<C> {
    connection: Arc<C>,
    back: Option<oneshot::Sender<Outcome>>,
}

/// Takes the transaction to the write that waits for it.
pub(super) type Ticket<C> = oneshot::Sender<Result<Lent<C>, <C as Connection>::Error>>;

/// The outcome of a write.
#[derive(Debug)]
enum Outcome {
    /// It is kept, with the latest revision that it has logged.
    Commit(Option<Revision>, Answer),
    /// It is undone. Who wants to know learns when what it has read is committed.
    Rollback(Option<Answer>),
}

/// Answers a write after the shared COMMIT.
type Answer = oneshot::Sender<Result<(), Error>>;

impl<C: Connection> Group<C> {
    /// The most writes of a group. Postgres is slower with more than 64 savepoints in a transaction.
    const MOST: usize = 32;
    /// The time after which no other write joins: the first waits for the last.
    const LONGEST: Duration = Duration::from_millis(5);

    /// Forms a group in a transaction that has just begun.
    pub(super) fn new(connection: Arc<C>) -> Self {
        Self {
            connection,
            begun: Instant::now(),
            lent: 0,
            state: State::Empty,
            latest: None,
            waiting: Vec::new(),
        }
    }

    /// Returns whether another write may join.
    pub(super) fn has_room(&self) -> bool {
        match self.state {
            State::Empty => true,
            State::Spoilt => false,
            State::Saved | State::Kept { .. } => {
                self.lent < Self::MOST && self.begun.elapsed() < Self::LONGEST
            }
        }
    }

    /// Returns whether there is something to commit.
    pub(super) fn has_writes(&self) -> bool {
        matches!(self.state, State::Saved | State::Kept { .. })
    }

    /// Lends the transaction to a write, and waits until that has ended. Whose call was cancelled is passed over.
    ///
    /// # Errors
    ///
    /// Those of savepoints: the transaction is lost.
    pub(super) async fn lend(&mut self, ticket: Ticket<C>) -> Result<(), C::Error> {
        if ticket.is_closed() {
            return Ok(());
        }
        self.save().await?;
        let (back, ended) = oneshot::channel();
        let lent = Lent { connection: Arc::clone(&self.connection), back: Some(back) };
        // If nobody takes it, it comes back at once.
        drop(ticket.send(Ok(lent)));
        self.lent += 1;
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

    /// Has the savepoint after the writes that are kept, if there are any.
    async fn save(&mut self) -> Result<(), C::Error> {
        match self.state {
            State::Kept { has_savepoint: false } => self.connection.execute(Step::Save).await?,
            State::Kept { has_savepoint: true } => self.connection.execute(Step::SaveAgain).await?,
            State::Empty | State::Saved | State::Spoilt => return Ok(()),
        }
        self.state = State::Saved;
        Ok(())
    }

    /// Undoes what was written since the savepoint; without one, the end undoes it.
    async fn undo(&mut self) -> Result<(), C::Error> {
        if self.state == State::Saved {
            return self.connection.execute(Step::Undo).await;
        }
        self.state = State::Spoilt;
        Ok(())
    }

    /// Commits what is kept, publishes the latest revision, and answers all.
    ///
    /// # Errors
    ///
    /// Those of the statement that ends the transaction: the connection is not to be used any more.
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
        // A COMMIT that failed may have happened all the same.
        answer(self.waiting, || if ended.is_ok() { Ok(()) } else { Err(Error::Busy) });
        ended
    }

    /// Answers all of a transaction that was lost before its COMMIT.
    pub(super) fn fail(self, error: &C::Error) {
        answer(self.waiting, || Err(error.clone().into()));
    }
}

fn answer(waiting: Vec<Answer>, result: impl Fn() -> Result<(), Error>) {
    for answer in waiting {
        // Its call may be cancelled meanwhile.
        let _ = answer.send(result());
    }
}

impl<C> Lent<C> {
    /// Returns the connection, to execute statements within the transaction.
    pub(crate) fn connection(&self) -> &C {
        &self.connection
    }

    /// Commits with the others that share the transaction, and publishes the latest revision that was logged. If the call is
    /// cancelled meanwhile, it is committed all the same.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] also when it is unknown whether it was committed.
    pub(crate) async fn commit(self, latest: Option<Revision>) -> Result<(), Error> {
        self.end(|answer| Outcome::Commit(latest, answer)).await
    }

    /// Undoes it, and waits until whatever it has read is committed, so that the caller can be told of it.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] when that was not committed.
    pub(crate) async fn rollback(self) -> Result<(), Error> {
        self.end(|answer| Outcome::Rollback(Some(answer))).await
    }

    async fn end(mut self, outcome: impl FnOnce(Answer) -> Outcome) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        if let Some(back) = self.back.take() {
            let _ = back.send(outcome(answer));
        }
        drop(self);
        // Without an answer, the writer's task has ended, and what it did last is unknown.
        answered.await.unwrap_or(Err(Error::Busy))
    }
}

impl<C> Drop for Lent<C> {
    /// Gives back what a write has left that failed, or whose call was cancelled.
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            let _ = back.send(Outcome::Rollback(None));
        }
    }
}
