//! The workers that are connected to this process, and their connections.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::dispatch::{Connected, ToWorker};

/// The registry of the workers that are connected to this process.
#[derive(Debug, Default)]
pub(crate) struct Workers(Mutex<BTreeMap<String, Connection>>);

/// The connection of one worker.
#[derive(Debug)]
struct Connection {
    session: Uuid,
    /// Bounded queue of messages. A worker that reads so slowly that the queue fills up loses its connection,
    /// and learns on the next one what it has missed.
    outbox: mpsc::Sender<ToWorker>,
    hang_up: CancellationToken,
    last_seen: Instant,
    /// False while the worker drains, and from a build handed back until the next heartbeat.
    takes_builds: bool,
}

impl Workers {
    const OUTBOX: usize = 256;

    /// Registers the connection of a worker, and hangs up an earlier one. It takes builds from
    /// [`Self::mark_seen`] on.
    pub(crate) fn connect(&self, name: &str, session: Uuid) -> (mpsc::Receiver<ToWorker>, CancellationToken) {
        let (outbox, inbox) = mpsc::channel(Self::OUTBOX);
        let hang_up = CancellationToken::new();
        let connection = Connection {
            session,
            outbox,
            hang_up: hang_up.clone(),
            last_seen: Instant::now(),
            takes_builds: false,
        };
        if let Some(earlier) = self.connections().insert(name.to_owned(), connection) {
            earlier.hang_up.cancel();
        }
        (inbox, hang_up)
    }

    /// Removes the connection, unless another has replaced it.
    pub(crate) fn disconnect(&self, name: &str, session: Uuid) {
        let mut connections = self.connections();
        if connections.get(name).is_some_and(|connection| connection.session == session) {
            connections.remove(name);
        }
    }

    /// Sends a message to a worker if it is connected here. Any other worker learns of it when it connects.
    pub(crate) fn send(&self, name: &str, message: ToWorker) {
        let _ = self.send_if(name, message, |_| true);
    }

    /// Assigns a build to a worker over this connection only. Returns false if it is gone or takes no more
    /// builds.
    #[must_use]
    pub(crate) fn assign(&self, connected: &Connected, message: ToWorker) -> bool {
        self.send_if(&connected.name, message, |connection| {
            connection.session == connected.session && connection.takes_builds
        })
    }

    fn send_if(&self, name: &str, message: ToWorker, condition: impl Fn(&Connection) -> bool) -> bool {
        let mut connections = self.connections();
        let Some(connection) = connections.get_mut(name).filter(|connection| condition(connection)) else {
            return false;
        };
        let is_sent = connection.outbox.try_send(message).is_ok();
        if !is_sent {
            tracing::warn!(worker = name, "the worker reads too slowly; closing the connection");
            connection.takes_builds = false;
            connection.hang_up.cancel();
        }
        is_sent
    }

    /// Records that a worker is alive and, if the worker said so, whether it takes builds.
    pub(crate) fn mark_seen(&self, name: &str, session: Uuid, takes_builds: Option<bool>) {
        if let Some(connection) =
            self.connections().get_mut(name).filter(|connection| connection.session == session)
        {
            connection.last_seen = Instant::now();
            connection.takes_builds = takes_builds.unwrap_or(connection.takes_builds);
        }
    }

    /// Assigns no more builds to a worker until its next heartbeat.
    pub(crate) fn pause(&self, name: &str) {
        if let Some(connection) = self.connections().get_mut(name) {
            connection.takes_builds = false;
        }
    }

    /// Returns the workers that take builds and have been heard from within `silence`.
    pub(crate) fn ready(&self, silence: Duration) -> Vec<Connected> {
        self.connections()
            .iter()
            .filter(|(_, connection)| connection.takes_builds && connection.last_seen.elapsed() < silence)
            .map(|(name, connection)| Connected { name: name.clone(), session: connection.session })
            .collect()
    }

    /// Reports whether a worker is connected here and has been heard from within `silence`.
    pub(crate) fn is_online(&self, name: &str, silence: Duration) -> bool {
        self.connections().get(name).is_some_and(|connection| connection.last_seen.elapsed() < silence)
    }

    fn connections(&self) -> MutexGuard<'_, BTreeMap<String, Connection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
