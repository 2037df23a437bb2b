//! The writer: a task that owns the write connection and lends its transaction to one write at a time.
//!
//! Writes that wait together share a transaction and its COMMIT; [`Group`] isolates them from each other.
//! [`Turns`](crate::turns::Turns) decides the order in which they are served. Only the task begins and ends
//! transactions, so a cancelled call neither leaves one open nor interrupts a COMMIT and what follows it.

use std::{
    fmt::{Debug, Display},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::group::TransactionGuard;
use self::{
    group::{Group, Ticket},
    queue::Queue,
};
use crate::{
    change::{CommittedRevision, Revision},
    error::Error,
    turns::Turn,
};

mod group;
mod queue;

/// A connection that writes to the database.
pub(crate) trait Connection: Debug + Send + Sync + Sized + 'static {
    type Error: Clone + Debug + Display + Into<Error> + Send + Sync;

    /// Opens a new connection after one has broken.
    ///
    /// # Errors
    ///
    /// Returns an error if the database cannot be reached or refuses the connection.
    fn open(url: &str) -> impl Future<Output = Result<Self, Self::Error>> + Send;

    /// Executes a step of a transaction.
    ///
    /// # Errors
    ///
    /// Returns an error if the step fails or takes too long. The outcome of a failed [`Step::Commit`] is
    /// unknown.
    fn execute(&self, step: Step) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Returns the latest revision, within a transaction.
    ///
    /// # Errors
    ///
    /// Returns an error if the revision cannot be read.
    fn latest(&self) -> impl Future<Output = Result<Revision, Self::Error>> + Send;

    /// Closes the connection once it is no longer in use.
    fn close(self: Arc<Self>) -> impl Future<Output = ()> + Send;

    /// Reports whether a connection is no longer usable after this error.
    fn is_lost(error: &Self::Error) -> bool;
}

/// A step of a transaction.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Start of a transaction, alongside which no other writes.
    Begin,
    /// First savepoint.
    Save,
    /// Savepoint after the latest writes, in place of the former one.
    SaveAgain,
    /// Rollback to the savepoint, which stays.
    Undo,
    Commit,
    Rollback,
}

/// A handle to the writer's task, which ends when it is closed or the last handle is dropped.
#[derive(Debug)]
pub(crate) struct Writer<C: Connection> {
    handle: Arc<Handle<C>>,
}

#[derive(Debug)]
struct Handle<C: Connection> {
    queue: Arc<Queue<Ticket<C>>>,
    committed: watch::Receiver<CommittedRevision>,
    closing: CancellationToken,
    task: TaskTracker,
}

/// The writer's task, which owns the connection.
#[derive(Debug)]
struct Task<C: Connection> {
    url: String,
    /// `None` after the connection has broken.
    connection: Option<Arc<C>>,
    queue: Arc<Queue<Ticket<C>>>,
    committed: watch::Sender<CommittedRevision>,
}

impl<C: Connection> Writer<C> {
    /// Longest wait for a turn.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Starts the task on a connection to a database whose latest revision is `latest`.
    ///
    /// A connection that breaks is replaced by a new one to `url`.
    pub(crate) fn start(url: &str, connection: C, latest: Revision) -> Self {
        let queue = Arc::new(Queue::new(Ticket::is_closed));
        let (sender, committed) = watch::channel(CommittedRevision::Known(latest));
        let task = Task {
            url: url.to_owned(),
            connection: Some(Arc::new(connection)),
            queue: Arc::clone(&queue),
            committed: sender,
        };
        let (closing, tasks) = (CancellationToken::new(), TaskTracker::new());
        tasks.spawn(task.run(closing.clone()));
        tasks.close();
        Self { handle: Arc::new(Handle { queue, committed, closing, task: tasks }) }
    }

    /// Waits for a turn and lends the transaction.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] at once if too many writes of the caller or class wait, and
    /// [`Error::Busy`] if the turn does not come within a minute or the writer is closed. If no transaction
    /// can be begun, returns the error of the connection.
    pub(crate) async fn begin(&self, turn: Turn<'_>) -> Result<TransactionGuard<C>, Error> {
        let (ticket, turn_comes) = oneshot::channel();
        self.handle.queue.push(turn, ticket)?;
        match timeout(Self::PATIENCE, turn_comes).await {
            Ok(Ok(guard)) => guard.map_err(Into::into),
            Ok(Err(_)) | Err(_) => Err(Error::Busy),
        }
    }

    /// Watches the latest committed revision, which is published before the write that logged it returns.
    pub(crate) fn committed(&self) -> watch::Receiver<CommittedRevision> {
        self.handle.committed.clone()
    }

    /// Returns the number of waiting writes.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.handle.queue.len()
    }

    /// Finishes the writes under way, refuses waiting ones, and closes the connection.
    pub(crate) async fn close(&self) {
        self.handle.closing.cancel();
        self.ended().await;
    }

    /// Waits for the task to end. Before [`close`](Self::close), only a panic ends it.
    pub(crate) async fn ended(&self) {
        self.handle.task.wait().await;
    }
}

impl<C: Connection> Clone for Writer<C> {
    fn clone(&self) -> Self {
        Self { handle: Arc::clone(&self.handle) }
    }
}

impl<C: Connection> Drop for Handle<C> {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl<C: Connection> Task<C> {
    async fn run(mut self, closing: CancellationToken) {
        while closing.run_until_cancelled(self.queue.arrival()).await.is_some() {
            match closing.run_until_cancelled(self.begin()).await {
                Some(Ok(connection)) => self.serve(connection).await,
                Some(Err(error)) => self.refuse(error),
                None => break,
            }
        }
        self.queue.close();
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
    }

    /// Begins a transaction, on a new connection if the former one has broken.
    async fn begin(&mut self) -> Result<Arc<C>, C::Error> {
        if let Some(connection) = self.connection.take() {
            let begun = self.begin_on(&connection).await;
            // The connection remains usable after a lock timeout.
            if begun.is_ok() || connection.execute(Step::Rollback).await.is_ok() {
                self.connection = Some(Arc::clone(&connection));
            }
            match begun {
                Err(error) if C::is_lost(&error) => {}
                begun => return begun.map(|()| connection),
            }
        }
        let connection = Arc::new(C::open(&self.url).await?);
        self.begin_on(&connection).await?;
        self.connection = Some(Arc::clone(&connection));
        Ok(connection)
    }

    async fn begin_on(&self, connection: &C) -> Result<(), C::Error> {
        connection.execute(Step::Begin).await?;
        if *self.committed.borrow() == CommittedRevision::Unknown {
            // With the lock held, the rows show whether the former transaction was committed.
            self.committed.send_replace(CommittedRevision::Known(connection.latest().await?));
        }
        Ok(())
    }

    /// Serves waiting writes in one transaction, for as long as the group has room.
    async fn serve(&mut self, connection: Arc<C>) {
        let mut group = Group::new(connection);
        while group.has_room()
            && let Some(ticket) = self.queue.pop()
        {
            if let Err(error) = group.lend(ticket).await {
                tracing::warn!(%error, "the connection broke: a group of writes was rolled back");
                self.connection = None;
                return group.fail(&error);
            }
        }
        if let Err(error) = group.end(&self.committed).await {
            tracing::warn!(%error, "cannot end a transaction; its outcome is unknown if it was to be committed");
            self.connection = None;
        }
    }

    /// Refuses the next waiting write, because no transaction can be begun now.
    fn refuse(&self, error: C::Error) {
        if let Some(ticket) = self.queue.pop() {
            // Its call may have been cancelled.
            let _ = ticket.send(Err(error));
        }
    }
}

impl<C: Connection> Drop for Task<C> {
    /// Refuses waiting writes in case the task has panicked.
    fn drop(&mut self) {
        self.queue.close();
        self.committed.send_replace(CommittedRevision::Unknown);
    }
}

#[cfg(test)]
mod tests;
