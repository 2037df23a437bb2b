//! The limits of one caller: units of calls a second, calls under way, and open streams.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Instant,
};

use opentelemetry::metrics::UpDownCounter;
use tonic::Request;

use self::rate::{Debt, Rate};
use crate::{access::Principal, error::Error};

mod rate;

/// The limits of each caller; `None` and 0 stand for any number.
#[derive(Copy, Clone, Debug)]
pub(crate) struct CallerLimits {
    /// Units a second, of which those of one second may be used at once.
    pub(crate) call_rate: u32,
    /// Unary calls under way at a time.
    pub(crate) calls: u32,
    /// Watches and uploads at a time.
    pub(crate) streams: u32,
}

/// The accounts of the callers.
#[derive(Debug)]
pub(crate) struct Callers {
    rate: Option<Rate>,
    calls: Option<u32>,
    streams: Option<u32>,
    accounts: Arc<Mutex<Accounts>>,
    open_streams: UpDownCounter<i64>,
}

/// A call of a caller that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct UnaryCall {
    accounts: Arc<Mutex<Accounts>>,
    caller: String,
}

/// A stream of a caller that is open until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    accounts: Arc<Mutex<Accounts>>,
    caller: String,
    open_streams: UpDownCounter<i64>,
}

/// The slot in which authentication leaves a call for the transport, which drops it when the call has ended.
///
/// A request carries one if its method is unary.
#[derive(Clone, Debug, Default)]
pub(super) struct CallSlot(Arc<OnceLock<UnaryCall>>);

#[derive(Debug, Default)]
struct Accounts {
    by_caller: HashMap<String, Account>,
    /// Calls since idle accounts were last removed.
    begun: usize,
}

#[derive(Debug)]
struct Account {
    debt: Debt,
    calls: u32,
    streams: u32,
}

impl Callers {
    /// The calls after which accounts are removed that are as good as new.
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

    /// Begins a call at the cost of a plain one, and fills its slot.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyCalls`] when the caller has used its units, and [`Error::TooManyConcurrentCalls`] when as many of
    /// its calls are under way as it may have.
    pub(super) fn begin_call(&self, caller: &Principal, slot: Option<&CallSlot>) -> Result<(), Error> {
        if self.rate.is_none() && self.calls.is_none() {
            return Ok(());
        }
        let now = Instant::now();
        let mut accounts = lock(&self.accounts);
        accounts.begun += 1;
        if accounts.begun >= Self::SWEEP {
            accounts.begun = 0;
            accounts.by_caller.retain(|_, account| !account.is_idle(now));
        }
        let account = accounts.of(caller.subject(), now);
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
        let call = UnaryCall { accounts: Arc::clone(&self.accounts), caller: caller.subject().to_owned() };
        // A slot that has a call already drops this one, which is not counted then.
        drop(slot.0.set(call));
        Ok(())
    }

    /// Takes what a call costs beyond the unit that it began with, before its handler does any work.
    ///
    /// A cost above the burst counts as the burst, so that every call is possible for an idle caller.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyCalls`] when the caller has not so many units left; the time to wait is for the whole cost.
    pub(super) fn admit_cost(&self, caller: &Principal, cost: u32) -> Result<(), Error> {
        let Some(rate) = self.rate.filter(|_| cost > 1) else {
            return Ok(());
        };
        let cost = rate.cap(cost);
        let now = Instant::now();
        let mut accounts = lock(&self.accounts);
        let debt = &mut accounts.of(caller.subject(), now).debt;
        rate.take(debt, cost - 1, now).map_err(|_| {
            // What is refused costs nothing: or two calls that each need all the units would keep each other from them.
            rate.refund(debt, 1);
            Error::TooManyCalls { retry_after: rate.wait(*debt, cost, now) }
        })
    }

    /// Charges a caller for work that was done for it, such as the text that a search has looked through.
    ///
    /// This never fails: units that the caller has not got are made up for before its next call. One charge counts as the
    /// burst at most.
    pub(super) fn charge(&self, caller: &Principal, units: u32) {
        let Some(rate) = self.rate.filter(|_| units > 0) else {
            return;
        };
        let now = Instant::now();
        rate.charge(&mut lock(&self.accounts).of(caller.subject(), now).debt, units, now);
    }

    /// Counts a stream until its place is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyStreams`] when the caller has as many open as it may have.
    pub(super) fn open_stream(&self, caller: &Principal) -> Result<Place, Error> {
        {
            let mut accounts = lock(&self.accounts);
            let account = accounts.of(caller.subject(), Instant::now());
            if let Some(limit) = self.streams.filter(|&limit| account.streams >= limit) {
                return Err(Error::TooManyStreams { limit });
            }
            account.streams += 1;
        }
        self.open_streams.add(1, &[]);
        Ok(Place {
            accounts: Arc::clone(&self.accounts),
            caller: caller.subject().to_owned(),
            open_streams: self.open_streams.clone(),
        })
    }
}

/// Takes what an authenticated call costs, see [`Callers::admit_cost`].
///
/// # Errors
///
/// [`Error::TooManyCalls`] when the caller has not so many units left.
pub(super) fn admit_cost<T>(request: &Request<T>, cost: u32) -> Result<(), Error> {
    let extensions = request.extensions();
    match (extensions.get::<Arc<Callers>>(), extensions.get::<Principal>()) {
        (Some(callers), Some(caller)) => callers.admit_cost(caller, cost),
        // Not of the public API, whose calls alone are counted.
        _ => Ok(()),
    }
}

fn lock(accounts: &Mutex<Accounts>) -> MutexGuard<'_, Accounts> {
    accounts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Accounts {
    /// Returns the account of a caller, which is opened if it has none.
    fn of(&mut self, caller: &str, now: Instant) -> &mut Account {
        self.by_caller.entry(caller.to_owned()).or_insert(Account {
            debt: Debt { settled_at: now },
            calls: 0,
            streams: 0,
        })
    }

    /// Changes an account, and removes it if it is as good as new.
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
        self.calls == 0 && self.streams == 0 && self.debt.settled_at <= now
    }
}

impl Drop for UnaryCall {
    fn drop(&mut self) {
        lock(&self.accounts).release(&self.caller, |account| account.calls -= 1);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.accounts).release(&self.caller, |account| account.streams -= 1);
        self.open_streams.add(-1, &[]);
    }
}

#[cfg(test)]
mod tests;
