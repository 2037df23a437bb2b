//! Fair turns at something that only one can have at a time, such as the transaction that writes.
//!
//! Dispatch goes before callers, and callers go before background work, each only for so many turns in a row while the others
//! wait. Among callers the turn goes round, one ticket each, so that a caller with a thousand tickets delays another by one.

use std::collections::{HashMap, VecDeque};

use crate::access::Principal;

/// The work that a ticket is for.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Turn<'a> {
    /// Heartbeats, reports, claims and sessions: running builds depend on them.
    Dispatch,
    /// A call of a caller.
    Caller(&'a Principal),
    /// Upkeep, for which nobody waits.
    Background,
}

/// The tickets that wait, in the order of their turns.
#[derive(Debug)]
pub(crate) struct Turns<T> {
    dispatch: VecDeque<T>,
    /// By subject; none is empty.
    callers: HashMap<String, VecDeque<T>>,
    /// The subjects that have tickets, the one whose turn is next first.
    round: VecDeque<String>,
    background: VecDeque<T>,
    /// The turns in a row that dispatch has had while others waited.
    dispatch_run: u32,
    /// The turns in a row that callers have had while background work waited.
    caller_run: u32,
    is_gone: fn(&T) -> bool,
    /// The most tickets of one caller that wait, and of background work.
    most: usize,
}

/// As many tickets wait as may.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    pub(crate) limit: usize,
}

impl<T> Turns<T> {
    /// The turns that dispatch takes in a row while others wait.
    const DISPATCH_RUN: u32 = 8;
    /// The turns that callers take in a row while background work waits.
    const CALLER_RUN: u32 = 32;

    /// The most tickets of dispatch that wait: one for each session and report under way, far more than a service of this size
    /// sees.
    const MOST_OF_DISPATCH: usize = 10_000;

    /// Creates turns whose tickets are passed over once `is_gone` says that nobody waits for them. Of each caller `most` wait.
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

    /// Adds a ticket behind those of the same work.
    ///
    /// # Errors
    ///
    /// [`Full`] when as many wait as may; those that are gone do not count.
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

    /// Returns whether nobody waits.
    pub(crate) fn is_empty(&mut self) -> bool {
        self.drop_gone();
        self.dispatch.is_empty() && self.round.is_empty() && self.background.is_empty()
    }

    /// Returns how many tickets wait, with those that are gone.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let of_callers: usize = self.callers.values().map(VecDeque::len).sum();
        self.dispatch.len() + self.background.len() + of_callers
    }

    /// Removes the ticket whose turn it is.
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

    /// Removes the first ticket of the caller whose turn it is, who goes to the end of the round.
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

    /// Drops the tickets that are gone and would be next.
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
