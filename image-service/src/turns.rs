//! Fair turns at a resource that only one ticket can have at a time, such as the transaction that writes.
//!
//! Dispatch goes before callers, and callers go before background work, each for a limited number of turns in
//! a row while others wait. Callers take turns round robin, one ticket each, so that a caller with a thousand
//! tickets delays another caller by one.

use std::collections::{HashMap, VecDeque};

use crate::access::Principal;

/// The kind of work that a ticket is for.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Turn<'a> {
    /// Heartbeats, reports, claims and sessions, which running builds depend on.
    Dispatch,
    /// A call of a caller.
    Caller(&'a Principal),
    /// Upkeep, which no caller waits for.
    Background,
}

/// The waiting tickets, in the order of their turns.
#[derive(Debug)]
pub(crate) struct Turns<T> {
    dispatch: VecDeque<T>,
    /// Tickets of callers by subject; no entry is empty.
    callers: HashMap<String, VecDeque<T>>,
    /// Subjects that have tickets, beginning with the one whose turn is next.
    round: VecDeque<String>,
    background: VecDeque<T>,
    /// Number of turns in a row that dispatch has had while others waited.
    dispatch_run: u32,
    /// Number of turns in a row that callers have had while background work waited.
    caller_run: u32,
    is_gone: fn(&T) -> bool,
    /// Maximum number of waiting tickets of each caller, and of background work.
    most: usize,
}

/// The rejection of a ticket because the maximum number of tickets is waiting.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    pub(crate) limit: usize,
}

impl<T> Turns<T> {
    /// Maximum number of turns in a row for dispatch while others wait.
    const DISPATCH_RUN: u32 = 8;
    /// Maximum number of turns in a row for callers while background work waits.
    const CALLER_RUN: u32 = 32;

    /// Maximum number of waiting tickets of dispatch.
    ///
    /// Each session and each report in progress has one; that is far less than this in a service of this
    /// size.
    const MOST_OF_DISPATCH: usize = 10_000;

    /// Creates turns that skip the tickets for which `is_gone` returns true. At most `most` tickets of each
    /// caller wait.
    pub(crate) fn new(is_gone: fn(&T) -> bool, most: usize) -> Self {
        Self {
            dispatch: VecDeque::new(),
            callers: HashMap::new(),
            round: VecDeque::new(),
            background: VecDeque::new(),
            dispatch_run: 0,
            caller_run: 0,
            is_gone,
            most,
        }
    }

    /// Adds a ticket behind those of the same kind of work.
    ///
    /// # Errors
    ///
    /// Returns [`Full`] if the maximum number of tickets is waiting, not counting those that are gone.
    pub(crate) fn push(&mut self, turn: Turn<'_>, ticket: T) -> Result<(), Full> {
        let limit = match turn {
            Turn::Dispatch => Self::MOST_OF_DISPATCH,
            Turn::Caller(_) | Turn::Background => self.most,
        };
        let waiting = match turn {
            Turn::Dispatch => &mut self.dispatch,
            Turn::Background => &mut self.background,
            Turn::Caller(caller) => {
                let subject = caller.subject();
                if !self.callers.contains_key(subject) {
                    self.round.push_back(subject.to_owned());
                }
                self.callers.entry(subject.to_owned()).or_default()
            }
        };
        if waiting.len() >= limit {
            waiting.retain(|ticket| !(self.is_gone)(ticket));
        }
        if waiting.len() >= limit {
            return Err(Full { limit });
        }
        waiting.push_back(ticket);
        Ok(())
    }

    /// Reports whether no ticket waits.
    pub(crate) fn is_empty(&mut self) -> bool {
        self.drop_gone();
        self.dispatch.is_empty() && self.round.is_empty() && self.background.is_empty()
    }

    /// Returns the number of tickets, including those that are gone.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let of_callers: usize = self.callers.values().map(VecDeque::len).sum();
        self.dispatch.len() + self.background.len() + of_callers
    }

    /// Removes and returns the next ticket.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.drop_gone();
        let (callers, background) = (!self.round.is_empty(), !self.background.is_empty());
        if !callers && !background {
            self.dispatch_run = 0;
        }
        if !self.dispatch.is_empty() && self.dispatch_run < Self::DISPATCH_RUN {
            self.dispatch_run += u32::from(callers || background);
            return self.dispatch.pop_front();
        }
        self.dispatch_run = 0;
        if !background {
            self.caller_run = 0;
        }
        if callers && self.caller_run < Self::CALLER_RUN {
            self.caller_run += u32::from(background);
            return self.pop_caller();
        }
        self.caller_run = 0;
        self.background.pop_front()
    }

    /// Removes and returns the first ticket of the next caller, who moves to the end of the round.
    fn pop_caller(&mut self) -> Option<T> {
        let subject = self.round.pop_front()?;
        let waiting = self.callers.get_mut(&subject)?;
        let ticket = waiting.pop_front();
        if waiting.is_empty() {
            self.callers.remove(&subject);
        } else {
            self.round.push_back(subject);
        }
        ticket
    }

    /// Drops tickets that are gone and would be next.
    fn drop_gone(&mut self) {
        let drop_first = |waiting: &mut VecDeque<T>| {
            while waiting.front().is_some_and(self.is_gone) {
                waiting.pop_front();
            }
        };
        drop_first(&mut self.dispatch);
        drop_first(&mut self.background);
        while let Some(subject) = self.round.front()
            && let Some(waiting) = self.callers.get_mut(subject)
        {
            drop_first(waiting);
            if !waiting.is_empty() {
                return;
            }
            self.callers.remove(subject);
            self.round.pop_front();
        }
    }
}

#[cfg(test)]
mod tests;
