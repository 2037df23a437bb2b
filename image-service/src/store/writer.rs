//! The writer: a task that owns the connection that writes, and lends its transaction to one write at a time.
//!
//! Writes that wait together share a transaction and its COMMIT; [`Group`] keeps them apart. The order in which they are served is
//! that of [`Turns`](crate::turns::Turns). The task alone begins and ends transactions, so a call that is cancelled neither leaves
//! one open nor interrupts a COMMIT and what follows it.

use std::sync::Arc;

use sea_orm::{DatabaseConnection, DbErr};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(super) use self::group::{Lent, Outcome};
use self::{connection::Connection, group::Group, queue::Queue};
use super::{Revision, changes, connecting::TURN_TIMEOUT, is_disconnected, writing::Writing};
use crate::{error::Error, turns::Turn};

mod connection;
mod group;
mod queue;

/// The latest revision of the change log, as far as this process has committed it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum CommittedRevision {
    /// This process has committed no later one. On Postgres, other replicas may have.
    Known(Revision),
    /// The outcome of a COMMIT is unknown, so only the database can tell. The next transaction finds it out.
    Unknown,
}

/// A handle to the writer's task, which ends when it is closed or the last handle is dropped.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    queue: Arc<Queue>,
    committed: watch::Receiver<CommittedRevision>,
    closing: CancellationToken,
    task: TaskTracker,
    #[cfg(test)]
    commits: Arc<std::sync::atomic::AtomicU64>,
}

/// The task, which owns the connection.
#[derive(Debug)]
struct Task {
    url: String,
    /// None after it has broken.
    connection: Option<Arc<Connection>>,
    queue: Arc<Queue>,
    committed: watch::Sender<CommittedRevision>,
    #[cfg(test)]
    commits: Arc<std::sync::atomic::AtomicU64>,
}

impl Writer {
    /// Starts the task on the connection of a pool of one, in a database whose latest revision is `latest`.
    ///
    /// A connection that breaks is replaced by another one to `url`.
    pub(super) async fn start(url: &str, pool: DatabaseConnection, latest: Revision) -> Result<Self, DbErr> {
        let queue = Arc::new(Queue::default());
        let (sender, committed) = watch::channel(CommittedRevision::Known(latest));
        let task = Task {
            url: url.to_owned(),
            connection: Some(Arc::new(Connection::of(pool).await?)),
            queue: Arc::clone(&queue),
            committed: sender,
            #[cfg(test)]
            commits: Arc::default(),
        };
        let handle = Handle {
            queue,
            committed,
            closing: CancellationToken::new(),
            task: TaskTracker::new(),
            #[cfg(test)]
            commits: Arc::clone(&task.commits),
        };
        handle.task.spawn(task.run(handle.closing.clone()));
        handle.task.close();
        Ok(Self { handle: Arc::new(handle) })
    }

    /// Waits for a turn, and begins a write that no other writes beside.
    ///
    /// # Errors
    ///
    /// - [`Error::TooManyWrites`] at once, when as many of the same caller wait as may.
    /// - [`Error::Busy`] when the turn does not come within a minute, or no more; or the database cannot be written to now.
    pub(super) async fn begin(&self, turn: Turn<'_>) -> Result<Writing, Error> {
        let (ticket, turn_comes) = oneshot::channel();
        self.handle.queue.push(turn, ticket)?;
        match timeout(TURN_TIMEOUT, turn_comes).await {
            Ok(Ok(lent)) => Ok(Writing::new(lent?)),
            Ok(Err(_)) | Err(_) => Err(Error::Busy),
        }
    }

    /// Follows the latest committed revision, which is published before the write that has logged it is answered.
    pub(super) fn committed(&self) -> watch::Receiver<CommittedRevision> {
        self.handle.committed.clone()
    }

    /// Finishes the writes under way, refuses those that wait, and closes the connection.
    pub(super) async fn close(&self) {
        self.handle.closing.cancel();
        self.ended().await;
    }

    /// Waits for the end of the task. Before [`close`](Self::close), only a panic ends it.
    pub(super) async fn ended(&self) {
        self.handle.task.wait().await;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl Task {
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

    /// Begins a transaction, on a fresh connection if the former one has broken.
    async fn begin(&mut self) -> Result<Arc<Connection>, DbErr> {
        if let Some(connection) = self.connection.take() {
            let begun = self.begin_on(&connection).await;
            // After a lock that could not be had, the connection is as good as before.
            if begun.is_ok() || connection.rollback().await.is_ok() {
                self.connection = Some(Arc::clone(&connection));
            }
            match begun {
                Err(error) if is_disconnected(&error) => {}
                begun => return begun.map(|()| connection),
            }
        }
        let connection = Arc::new(Connection::open(&self.url).await?);
        self.begin_on(&connection).await?;
        self.connection = Some(Arc::clone(&connection));
        Ok(connection)
    }

    async fn begin_on(&self, connection: &Connection) -> Result<(), DbErr> {
        connection.begin().await?;
        if *self.committed.borrow() == CommittedRevision::Unknown {
            // Whoever held the lock before has committed or not: now the rows tell.
            let latest = changes::revisions(connection.statements()).await?.latest;
            self.committed.send_replace(CommittedRevision::Known(latest));
        }
        Ok(())
    }

    /// Serves whoever waits within one transaction, as long as the group has room.
    async fn serve(&mut self, connection: Arc<Connection>) {
        let mut group = Group::new(connection);
        while group.has_room()
            && let Some(ticket) = self.queue.pop()
        {
            if let Err(error) = group.lend(ticket).await {
                tracing::warn!(%error, "the connection broke: a group of writes is undone");
                self.connection = None;
                return group.fail(error);
            }
        }
        #[cfg(test)]
        self.commits.fetch_add(u64::from(group.has_writes()), std::sync::atomic::Ordering::Relaxed);
        if let Err(error) = group.end(&self.committed).await {
            tracing::warn!(%error, "cannot end a transaction; its outcome is unknown if it was to be committed");
            self.connection = None;
        }
    }

    /// Tells the next that no transaction can be begun now.
    fn refuse(&self, error: DbErr) {
        if let Some(ticket) = self.queue.pop() {
            // Its call may be cancelled meanwhile.
            let _ = ticket.send(Err(error));
        }
    }
}

impl Drop for Task {
    /// Keeps nobody waiting for a task that has panicked.
    fn drop(&mut self) {
        self.queue.close();
        self.committed.send_replace(CommittedRevision::Unknown);
    }
}

#[cfg(test)]
mod tests;
