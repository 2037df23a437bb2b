//! The table of a listener's connections: how many there may be, and which of them are closed to make room.
//!
//! A connection is admitted once a caller has proved on it who it is. Those that are not yet have few places,
//! and the oldest of them goes first, so that a flood of them closes itself. Of the others, those without a
//! call in progress go first, the longest idle one before all.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio_util::sync::CancellationToken;

use super::flushes::Flushes;
use crate::tally::Tally;

/// The maximum numbers of connections.
#[derive(Copy, Clone, Debug)]
pub(super) struct Limits {
    /// All connections.
    pub(super) all: usize,
    /// Connections beyond that, for health checks and workers.
    pub(super) reserved: usize,
    /// Connections that are not admitted.
    pub(super) unadmitted: usize,
    /// Connections from one address.
    pub(super) of_address: usize,
}

/// The connections of a listener.
#[derive(Debug)]
pub(super) struct Connections {
    limits: Limits,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, Entry>,
    next_id: u64,
    /// Connections that are not admitted, the oldest first.
    unadmitted: BTreeSet<u64>,
    /// Admitted connections without a call in progress, by a number that grows: the longest idle one first.
    idle: BTreeMap<u64, u64>,
    by_address: HashMap<IpAddr, usize>,
    made_room: Tally,
    refused: Tally,
}

#[derive(Debug)]
struct Entry {
    address: IpAddr,
    is_admitted: bool,
    calls: u32,
    /// Set if it had a call since it was last looked at.
    has_called: bool,
    /// Position among the idle ones.
    idle_since: Option<u64>,
    close: CancellationToken,
}

/// A connection, open until dropped.
#[derive(Debug)]
pub struct OpenConnection {
    id: u64,
    peer: SocketAddr,
    is_reserved: bool,
    connections: Arc<Connections>,
    close: CancellationToken,
    flushes: Flushes,
}

/// A call in progress, until dropped.
#[derive(Debug)]
pub struct ConnectionCall(Arc<OpenConnection>);

impl Connections {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, table: Mutex::default() })
    }

    /// Opens a connection, for which others may be closed; returns `None` if there is no place for it.
    pub(super) fn open(self: &Arc<Self>, peer: SocketAddr) -> Option<OpenConnection> {
        let address = peer.ip();
        let mut table = self.table();
        let of_address = table.by_address.get(&address).copied().unwrap_or_default();
        let has_place =
            of_address < self.limits.of_address || table.close_one(|entry| entry.address == address);
        if !has_place {
            table.refuse("one address has all the connections that it may have");
            return None;
        }
        if table.unadmitted.len() >= self.limits.unadmitted {
            table.close_unadmitted();
        }
        let is_reserved = table.by_id.len() >= self.limits.all && !table.close_one(|_| true);
        if is_reserved && table.by_id.len() >= self.limits.all + self.limits.reserved {
            table.refuse("there are as many connections in use as there may be");
            return None;
        }
        let close = CancellationToken::new();
        let id = table.insert(address, close.clone());
        Some(OpenConnection {
            id,
            peer,
            is_reserved,
            connections: Arc::clone(self),
            close,
            flushes: Flushes::default(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, address: IpAddr, close: CancellationToken) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.unadmitted.insert(id);
        *self.by_address.entry(address).or_default() += 1;
        self.by_id.insert(
            id,
            Entry { address, is_admitted: false, calls: 0, has_called: false, idle_since: None, close },
        );
        id
    }

    /// Removes a connection; does nothing if it was closed to make room.
    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.by_id.remove(&id)?;
        self.unadmitted.remove(&id);
        if let Some(since) = entry.idle_since {
            self.idle.remove(&since);
        }
        if let Some(of_address) = self.by_address.get_mut(&entry.address) {
            *of_address -= 1;
            if *of_address == 0 {
                self.by_address.remove(&entry.address);
            }
        }
        Some(entry)
    }

    /// Closes the connection that is missed least, if one fits: the oldest that is not admitted and has no
    /// call, or else the longest idle one.
    fn close_one(&mut self, fits: impl Fn(&Entry) -> bool) -> bool {
        let by_id = &self.by_id;
        let found = self
            .unadmitted
            .iter()
            .chain(self.idle.values())
            .copied()
            .find(|id| by_id.get(id).is_some_and(|entry| entry.calls == 0 && fits(entry)));
        found.is_some_and(|id| self.close(id))
    }

    /// Closes the oldest connection that is not admitted; one without a call if there is any.
    fn close_unadmitted(&mut self) {
        let by_id = &self.by_id;
        let has_no_call = |id: &&u64| by_id.get(id).is_some_and(|entry| entry.calls == 0);
        let found =
            self.unadmitted.iter().find(has_no_call).or_else(|| self.unadmitted.iter().next()).copied();
        if let Some(id) = found {
            self.close(id);
        }
    }

    fn close(&mut self, id: u64) -> bool {
        let Some(entry) = self.remove(id) else { return false };
        entry.close.cancel();
        if let Some(count) = self.made_room.count(Instant::now()) {
            tracing::warn!(
                count,
                connections = self.by_id.len(),
                "closed idle connections to make room for others"
            );
        }
        true
    }

    fn refuse(&mut self, reason: &str) {
        if let Some(count) = self.refused.count(Instant::now()) {
            tracing::warn!(count, connections = self.by_id.len(), reason, "refused connections");
        }
    }
}

impl OpenConnection {
    /// Returns the flushes of the connection.
    pub fn flushes(&self) -> &Flushes {
        &self.flushes
    }

    /// Returns the address of the client.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Reports whether the connection has a place that is reserved for health checks and workers.
    pub fn is_reserved(&self) -> bool {
        self.is_reserved
    }

    /// Closes the connection soon.
    pub fn close(&self) {
        self.close.cancel();
    }

    /// Returns the token that is cancelled when the connection is to be closed.
    pub(super) fn closing(&self) -> &CancellationToken {
        &self.close
    }

    /// Records that a caller has proved on the connection who it is.
    pub fn admit(&self) {
        let mut table = self.connections.table();
        if let Some(entry) = table.by_id.get_mut(&self.id).filter(|entry| !entry.is_admitted) {
            entry.is_admitted = true;
            table.unadmitted.remove(&self.id);
        }
    }

    /// Reports whether the connection is not admitted and had no call since this was last asked.
    pub(super) fn is_unused(&self) -> bool {
        let mut table = self.connections.table();
        table.by_id.get_mut(&self.id).is_none_or(|entry| {
            let has_called = std::mem::take(&mut entry.has_called);
            !entry.is_admitted && entry.calls == 0 && !has_called
        })
    }

    /// Reports whether the connection is admitted.
    pub(super) fn is_admitted(&self) -> bool {
        self.connections.table().by_id.get(&self.id).is_some_and(|entry| entry.is_admitted)
    }

    /// Begins a call; returns `None` if the connection is not admitted and has `most` calls in progress.
    pub fn begin_call(self: &Arc<Self>, most: u32) -> Option<ConnectionCall> {
        let mut table = self.connections.table();
        if let Some(entry) = table.by_id.get_mut(&self.id) {
            if !entry.is_admitted && entry.calls >= most {
                return None;
            }
            entry.calls += 1;
            entry.has_called = true;
            if let Some(since) = entry.idle_since.take() {
                table.idle.remove(&since);
            }
        }
        drop(table);
        Some(ConnectionCall(Arc::clone(self)))
    }
}

impl Drop for ConnectionCall {
    fn drop(&mut self) {
        let id = self.0.id;
        let mut table = self.0.connections.table();
        let position = table.next_id;
        let Some(entry) = table.by_id.get_mut(&id) else { return };
        entry.calls -= 1;
        if entry.calls == 0 && entry.is_admitted {
            entry.idle_since = Some(position);
            table.next_id += 1;
            table.idle.insert(position, id);
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.connections.table().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { all: 4, reserved: 1, unadmitted: 2, of_address: 3 };

    fn peer(host: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, host], 1))
    }

    fn admitted(connections: &Arc<Connections>, host: u8) -> Arc<OpenConnection> {
        let connection = Arc::new(connections.open(peer(host)).expect("a place"));
        connection.admit();
        // It has had a call.
        drop(connection.begin_call(1));
        connection
    }

    fn closed(connections: &[&Arc<OpenConnection>]) -> Vec<bool> {
        connections.iter().map(|connection| connection.close.is_cancelled()).collect()
    }

    #[test]
    fn the_oldest_that_is_not_admitted_makes_room() {
        let connections = Connections::new(LIMITS);
        let [first, second] = [1, 2].map(|host| Arc::new(connections.open(peer(host)).expect("a place")));
        let call = first.begin_call(1);
        assert!(call.is_some() && first.begin_call(1).is_none());
        let third = Arc::new(connections.open(peer(3)).expect("a place"));
        assert_eq!(closed(&[&first, &second, &third]), [false, true, false], "the first one has a call");
        drop(call);
        let fourth = Arc::new(connections.open(peer(4)).expect("a place"));
        assert_eq!(closed(&[&first, &third, &fourth]), [true, false, false]);
        third.admit();
        drop((first, second));
        connections.open(peer(5)).expect("a place");
        assert_eq!(closed(&[&third, &fourth]), [false, false]);
    }

    #[test]
    fn the_longest_idle_one_makes_room() {
        let connections = Connections::new(LIMITS);
        let [a, b, c, d] = [1, 2, 3, 4].map(|host| admitted(&connections, host));
        let _busy = a.begin_call(1);
        drop(b.begin_call(1));
        let e = admitted(&connections, 5);
        assert_eq!(closed(&[&a, &b, &c, &d, &e]), [false, false, true, false, false]);
        let _calls = [&b, &d, &e].map(|connection| connection.begin_call(1));
        let reserved = connections.open(peer(6)).expect("a place");
        assert!(reserved.is_reserved() && !e.is_reserved());
        assert!(connections.open(peer(7)).is_none() || reserved.close.is_cancelled());
    }

    #[test]
    fn an_address_has_so_many() {
        let connections = Connections::new(LIMITS);
        let [a, b, c] = [1, 1, 1].map(|host| admitted(&connections, host));
        let calls = [&a, &b, &c].map(|connection| connection.begin_call(1));
        assert!(connections.open(peer(1)).is_none());
        assert!(connections.open(peer(2)).is_some());
        drop(calls);
        assert!(connections.open(peer(1)).is_some());
        assert_eq!(closed(&[&a, &b, &c]), [true, false, false]);
        drop((a, b, c));
        assert!(connections.table().by_address.is_empty() && connections.table().idle.is_empty());
    }
}
