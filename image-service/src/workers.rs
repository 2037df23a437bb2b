//! The workers that are connected to this process, and the way to each.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::dispatch::{Connected, ToWorker};

/// The one owner of who is connected.
#[derive(Debug, Default)]
pub(crate) struct Workers(Mutex<BTreeMap<String, Line>>);

/// The connection of one worker.
#[derive(Debug)]
struct Line {
    session: Uuid,
    /// Bounded: a worker that reads too slowly to keep it from filling loses its connection, and learns on the next one
    /// what it has missed.
    outbox: mpsc::Sender<ToWorker>,
    hang_up: CancellationToken,
    heard: Instant,
    /// Not while it drains, nor from a build handed back until the next heartbeat.
    takes_builds: bool,
}

impl Workers {
    const OUTBOX: usize = 256;

    /// Makes this the worker's connection; an earlier one is hung up. It takes builds from [`Self::heard`] on.
    pub(crate) fn connect(&self, name: &str, session: Uuid) -> (mpsc::Receiver<ToWorker>, CancellationToken) {
        let (outbox, inbox) = mpsc::channel(Self::OUTBOX);
        let hang_up = CancellationToken::new();
        let line =
            Line { session, outbox, hang_up: hang_up.clone(), heard: Instant::now(), takes_builds: false };
        if let Some(earlier) = self.lines().insert(name.to_owned(), line) {
            earlier.hang_up.cancel();
        }
        (inbox, hang_up)
    }

    /// Forgets the connection, unless another has taken its place.
    pub(crate) fn disconnect(&self, name: &str, session: Uuid) {
        let mut lines = self.lines();
        if lines.get(name).is_some_and(|line| line.session == session) {
            lines.remove(name);
        }
    }

    /// Sends to a worker, if it is connected here: whoever is not learns of it when it connects.
    pub(crate) fn send(&self, name: &str, message: ToWorker) {
        let _ = self.send_if(name, message, |_| true);
    }

    /// Gives a build to a worker over one connection, and over no other; false when that is gone or takes none any more.
    #[must_use]
    pub(crate) fn assign(&self, connected: &Connected, message: ToWorker) -> bool {
        self.send_if(&connected.name, message, |line| line.session == connected.session && line.takes_builds)
    }

    fn send_if(&self, name: &str, message: ToWorker, condition: impl Fn(&Line) -> bool) -> bool {
        let mut lines = self.lines();
        let Some(line) = lines.get_mut(name).filter(|line| condition(line)) else {
            return false;
        };
        let is_sent = line.outbox.try_send(message).is_ok();
        if !is_sent {
            tracing::warn!(worker = name, "the worker reads too slowly; hanging up");
            line.takes_builds = false;
            line.hang_up.cancel();
        }
        is_sent
    }

    /// Notes that a worker lives, and, when it said so, whether it takes builds.
    pub(crate) fn heard(&self, name: &str, session: Uuid, takes_builds: Option<bool>) {
        if let Some(line) = self.lines().get_mut(name).filter(|line| line.session == session) {
            line.heard = Instant::now();
            line.takes_builds = takes_builds.unwrap_or(line.takes_builds);
        }
    }

    /// Gives a worker nothing more until its next heartbeat.
    pub(crate) fn pause(&self, name: &str) {
        if let Some(line) = self.lines().get_mut(name) {
            line.takes_builds = false;
        }
    }

    /// Those who take builds and have been heard of within `silence`.
    pub(crate) fn ready(&self, silence: Duration) -> Vec<Connected> {
        self.lines()
            .iter()
            .filter(|(_, line)| line.takes_builds && line.heard.elapsed() < silence)
            .map(|(name, line)| Connected { name: name.clone(), session: line.session })
            .collect()
    }

    /// Whether a worker is connected here and has been heard of within `silence`.
    pub(crate) fn is_heard(&self, name: &str, silence: Duration) -> bool {
        self.lines().get(name).is_some_and(|line| line.heard.elapsed() < silence)
    }

    fn lines(&self) -> MutexGuard<'_, BTreeMap<String, Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
