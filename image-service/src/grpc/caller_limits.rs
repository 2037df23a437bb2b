//! Limits per caller: call units per second, concurrent calls, and open streams.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use opentelemetry::metrics::UpDownCounter;
use service_runtime::call_limits::ReceivedBytes;
use tonic::{Request, Status};

use self::rate::{Debt, Rate};
use crate::{access::Principal, error::Error};

mod rate;

/// The limits of each caller; 0 for no limit.
#[derive(Copy, Clone, Debug)]
pub(crate) struct CallerLimits {
    /// Units per second. The units of one second may be used at once.
    pub(crate) call_rate: u32,
    /// Maximum number of concurrent unary calls.
    pub(crate) calls: u32,
    /// Maximum number of concurrent watches and uploads.
    pub(crate) streams: u32,
}

/// The accounts of the callers, and the limits of each; `None` for no limit.
#[derive(Debug)]
pub(crate) struct Callers {
    rate: Option<Rate>,
    calls: Option<u32>,
    streams: Option<u32>,
    accounts: Arc<Mutex<Accounts>>,
    open_streams: UpDownCounter<i64>,
}

/// A caller's unary call, in progress until dropped.
#[derive(Debug)]
pub(super) struct UnaryCall {
    accounts: Arc<Mutex<Accounts>>,
    caller: String,
    /// Number of bytes of its response, if that is large.
    sending: AtomicU64,
}

/// The bytes of a caller's incomplete requests.
#[derive(Debug)]
pub(super) struct CallerBytes {
    accounts: Arc<Mutex<Accounts>>,
    caller: String,
}

/// A caller's stream, open until dropped.
#[derive(Debug)]
pub(super) struct StreamPermit {
    accounts: Arc<Mutex<Accounts>>,
    caller: String,
    open_streams: UpDownCounter<i64>,
}

/// The slot in which authentication leaves a call for the transport, which drops it at the end.
///
/// Only the requests of unary methods carry one.
#[derive(Clone, Debug, Default)]
pub(super) struct CallSlot(Arc<OnceLock<UnaryCall>>);

impl CallSlot {
    /// Counts the response of the call until the call is dropped, once all of it was sent.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyBytes`] if the caller does not read the responses that it has.
    pub(super) fn send(&self, bytes: u64) -> Result<(), Error> {
        let Some(call) = self.0.get() else { return Ok(()) };
        let mut accounts = lock(&call.accounts);
        let account = accounts.account(&call.caller, Instant::now());
        if account.sending > 0 && account.sending + bytes > Callers::MAX_SENDING {
            return Err(Error::TooManyBytes { limit: Callers::MAX_SENDING });
        }
        account.sending += bytes;
        call.sending.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Accounts {
    by_caller: HashMap<String, Account>,
    /// Number of calls since idle accounts were last removed.
    begun: usize,
}

#[derive(Debug)]
struct Account {
    debt: Debt,
    calls: u32,
    streams: u32,
    /// Number of bytes of incomplete requests.
    receiving: u64,
    /// Number of bytes of large responses of which not all was sent.
    sending: u64,
}

impl ReceivedBytes for CallerBytes {
    fn add(&self, bytes: u64) -> Result<(), Status> {
        let mut accounts = lock(&self.accounts);
        let account = accounts.account(&self.caller, Instant::now());
        account.receiving += bytes;
        if account.receiving > Callers::MAX_RECEIVING {
            return Err(Error::TooManyBytes { limit: Callers::MAX_RECEIVING }.into());
        }
        Ok(())
    }

    fn remove(&self, bytes: u64) {
        lock(&self.accounts).release(&self.caller, |account| account.receiving -= bytes);
    }
}

impl Callers {
    /// Maximum number of bytes of a caller's incomplete requests.
    const MAX_RECEIVING: u64 = 32 * 1024 * 1024;
    /// Maximum number of bytes of large responses that a caller has not read.
    const MAX_SENDING: u64 = 128 * 1024 * 1024;
    /// Number of calls after which idle accounts are removed.
    const SWEEP: usize = 4_096;

    pub(crate) fn new(limits: CallerLimits) -> Self {
        let open_streams = opentelemetry::global::meter(crate::PROGRAM)
            .i64_up_down_counter("trailer.watchers")
            .with_unit("{stream}")
            .with_description("Watches of images and builds, and uploads, that are open here")
            .build();
        let limit = |limit: u32| (limit > 0).then_some(limit);
        Self {
            rate: Rate::new(limits.call_rate),
            calls: limit(limits.calls),
            streams: limit(limits.streams),
            accounts: Arc::default(),
            open_streams,
        }
    }

    /// Begins a call, charges the unit of a plain one, and fills its slot.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyCalls`] if the caller has no units left, and [`Error::TooManyConcurrentCalls`]
    /// if as many of its calls are in progress as it may have.
    pub(super) fn begin_call(&self, caller: &Principal, slot: Option<&CallSlot>) -> Result<(), Error> {
        self.begin_call_at(caller, slot, Instant::now())
    }

    fn begin_call_at(&self, caller: &Principal, slot: Option<&CallSlot>, now: Instant) -> Result<(), Error> {
        if self.rate.is_none() && self.calls.is_none() {
            return Ok(());
        }
        let mut accounts = lock(&self.accounts);
        accounts.begun += 1;
        if accounts.begun >= Self::SWEEP {
            accounts.begun = 0;
            accounts.by_caller.retain(|_, account| !account.is_idle(now));
        }
        let account = accounts.account(caller.subject(), now);
        if let Some(rate) = self.rate {
            rate.take(&mut account.debt, 1, now)
                .map_err(|retry_after| Error::TooManyCalls { retry_after })?;
        }
        let (Some(limit), Some(slot)) = (self.calls, slot) else {
            return Ok(());
        };
        if account.calls >= limit {
            return Err(Error::TooManyConcurrentCalls { limit });
        }
        account.calls += 1;
        drop(accounts);
        let call = UnaryCall {
            accounts: Arc::clone(&self.accounts),
            caller: caller.subject().to_owned(),
            sending: AtomicU64::new(0),
        };
        // If the slot already has a call, this one is dropped and no longer counts.
        drop(slot.0.set(call));
        Ok(())
    }

    /// Charges what a call costs beyond its first unit, before its handler does any work.
    ///
    /// A cost above the burst counts as the burst, so that an idle caller can make any call.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyCalls`] if the caller has too few units left; the delay before a retry covers
    /// the whole cost.
    pub(super) fn admit_cost(&self, caller: &Principal, cost: u32) -> Result<(), Error> {
        self.admit_cost_at(caller, cost, Instant::now())
    }

    fn admit_cost_at(&self, caller: &Principal, cost: u32, now: Instant) -> Result<(), Error> {
        let Some(rate) = self.rate.filter(|_| cost > 1) else {
            return Ok(());
        };
        let cost = rate.cap(cost);
        let mut accounts = lock(&self.accounts);
        let debt = &mut accounts.account(caller.subject(), now).debt;
        rate.take(debt, cost - 1, now).map_err(|_| {
            // A refused call costs nothing. Otherwise two calls that each need all units would starve each
            // other.
            rate.refund(debt, 1);
            Error::TooManyCalls { retry_after: rate.wait(*debt, cost, now) }
        })
    }

    /// Charges a caller for work that was done, such as searching text.
    ///
    /// This never fails: missing units delay the caller's next call. One charge counts as the burst at most.
    pub(super) fn charge(&self, caller: &Principal, units: u32) {
        self.charge_at(caller, units, Instant::now());
    }

    fn charge_at(&self, caller: &Principal, units: u32, now: Instant) {
        let Some(rate) = self.rate.filter(|_| units > 0) else {
            return;
        };
        rate.charge(&mut lock(&self.accounts).account(caller.subject(), now).debt, units, now);
    }

    /// Returns the count of the bytes of a caller's incomplete requests.
    pub(super) fn received_bytes(&self, caller: &Principal) -> CallerBytes {
        CallerBytes { accounts: Arc::clone(&self.accounts), caller: caller.subject().to_owned() }
    }

    /// Counts a stream until the returned permit is dropped.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyStreams`] if the caller has as many streams open as it may have.
    pub(super) fn open_stream(&self, caller: &Principal) -> Result<StreamPermit, Error> {
        {
            let mut accounts = lock(&self.accounts);
            let account = accounts.account(caller.subject(), Instant::now());
            if let Some(limit) = self.streams.filter(|&limit| account.streams >= limit) {
                return Err(Error::TooManyStreams { limit });
            }
            account.streams += 1;
        }
        self.open_streams.add(1, &[]);
        Ok(StreamPermit {
            accounts: Arc::clone(&self.accounts),
            caller: caller.subject().to_owned(),
            open_streams: self.open_streams.clone(),
        })
    }
}

/// Charges what an authenticated call costs, see [`Callers::admit_cost`].
///
/// # Errors
///
/// Returns [`Error::TooManyCalls`] if the caller has too few units left.
pub(super) fn admit_cost<T>(request: &Request<T>, cost: u32) -> Result<(), Error> {
    let extensions = request.extensions();
    match (extensions.get::<Arc<Callers>>(), extensions.get::<Principal>()) {
        (Some(callers), Some(caller)) => callers.admit_cost(caller, cost),
        // Only calls of the public API are counted.
        _ => Ok(()),
    }
}

fn lock(accounts: &Mutex<Accounts>) -> MutexGuard<'_, Accounts> {
    accounts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Accounts {
    /// Returns the account of a caller, and opens one if necessary.
    fn account(&mut self, caller: &str, now: Instant) -> &mut Account {
        self.by_caller.entry(caller.to_owned()).or_insert(Account {
            debt: Debt { settled_at: now },
            calls: 0,
            streams: 0,
            receiving: 0,
            sending: 0,
        })
    }

    /// Changes an account, and removes it if it is idle.
    fn release(&mut self, caller: &str, change: impl FnOnce(&mut Account)) {
        if let Some(account) = self.by_caller.get_mut(caller) {
            change(account);
            if account.is_idle(Instant::now()) {
                self.by_caller.remove(caller);
            }
        }
    }
}

impl Account {
    fn is_idle(&self, now: Instant) -> bool {
        self.calls == 0
            && self.streams == 0
            && self.receiving == 0
            && self.sending == 0
            && self.debt.settled_at <= now
    }
}

impl Drop for UnaryCall {
    fn drop(&mut self) {
        let sending = self.sending.load(Ordering::Relaxed);
        lock(&self.accounts).release(&self.caller, |account| {
            account.calls -= 1;
            account.sending -= sending;
        });
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        lock(&self.accounts).release(&self.caller, |account| account.streams -= 1);
        self.open_streams.add(-1, &[]);
    }
}

#[cfg(test)]
mod tests;
