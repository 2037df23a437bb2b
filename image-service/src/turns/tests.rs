use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, VecDeque},
    rc::Rc,
};

use fastrand::Rng;

use super::{Full, Turn, Turns};
use crate::{access::Principal, timestamp::Timestamp};

/// A ticket with the name of its holder, its number among the holder's tickets, and whether its call was
/// cancelled.
#[derive(Debug)]
struct Ticket {
    owner: String,
    number: usize,
    is_gone: Rc<Cell<bool>>,
}

/// Turns with named holders: `D` for dispatch, `B` for background work, and anything else for the caller of
/// that name.
struct Hall {
    turns: Turns<Ticket>,
    numbers: HashMap<String, usize>,
}

impl Hall {
    fn new() -> Self {
        Self { turns: Turns::new(|ticket: &Ticket| ticket.is_gone.get(), 100), numbers: HashMap::new() }
    }

    /// Adds a ticket, and returns the cell that cancels it.
    fn push(&mut self, owner: &str) -> Result<Rc<Cell<bool>>, Full> {
        let caller = Principal::new(owner.to_owned(), Vec::new(), Timestamp::from_micros(0));
        let turn = match owner {
            "D" => Turn::Dispatch,
            "B" => Turn::Background,
            _ => Turn::Caller(&caller),
        };
        let number = self.numbers.entry(owner.to_owned()).or_default();
        let is_gone = Rc::new(Cell::new(false));
        let ticket = Ticket { owner: owner.to_owned(), number: *number, is_gone: Rc::clone(&is_gone) };
        self.turns.push(turn, ticket)?;
        *number += 1;
        Ok(is_gone)
    }

    /// Takes the next turns, and returns their holders as one word.
    fn take(&mut self, count: usize) -> String {
        (0..count).map_while(|_| self.turns.pop()).map(|ticket| ticket.owner).collect()
    }
}

#[test]
fn turns_go_by_class_and_round_the_callers() {
    let cases = [
        ("", ""),
        ("aaabbc", "abcaba"),
        ("baab", "baba"),
        ("BaD", "DaB"),
        ("BBaaDD", "DDaaBB"),
        // Dispatch has eight turns in a row while others wait.
        ("DDDDDDDDDDDDDDDDDDab", "DDDDDDDDaDDDDDDDDbDD"),
        ("DDDDDDDDDDB", "DDDDDDDDBDD"),
        // Callers have 32 turns in a row while background work waits.
        ("BBaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaBaaaaaaB"),
        ("bBaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "baaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaBaaaa"),
    ];
    for (waiting, expected) in cases {
        let mut hall = Hall::new();
        for owner in waiting.chars() {
            hall.push(&owner.to_string()).expect("room");
        }
        assert_eq!(hall.take(100), expected, "{waiting}");
        assert!(hall.turns.is_empty(), "{waiting}");
    }
}

#[test]
fn runs_begin_when_another_begins_to_wait() {
    let mut hall = Hall::new();
    for _ in 0..100 {
        hall.push("D").expect("room");
        assert_eq!(hall.take(1), "D");
    }
    for owner in "DDDDDDDDDDa".chars() {
        hall.push(&owner.to_string()).expect("room");
    }
    assert_eq!(hall.take(11), "DDDDDDDDaDD");
}

#[test]
fn a_caller_has_a_hundred_tickets_and_those_that_are_gone_do_not_count() {
    let mut hall = Hall::new();
    let tickets: Vec<_> = (0..100).map(|_| hall.push("a").expect("room")).collect();
    assert_eq!(hall.push("a").map(drop), Err(Full { limit: 100 }));
    hall.push("b").expect("another's room");
    tickets[50].set(true);
    hall.push("a").expect("room again");
    assert_eq!(hall.push("a").map(drop), Err(Full { limit: 100 }));
    assert_eq!(hall.take(200).len(), 101);
}

#[test]
fn a_refused_caller_without_other_writes_keeps_no_place_in_the_round() {
    let mut hall = Hall::new();
    for ticket in (0..100).map(|_| hall.push("a").expect("room")).collect::<Vec<_>>() {
        ticket.set(true);
    }
    assert!(hall.turns.is_empty());
    assert!(hall.turns.callers.is_empty() && hall.turns.round.is_empty());
    hall.push("b").expect("room");
    assert_eq!(hall.take(2), "b");
}

/// A model of the waiting tickets that are not gone, by holder, and of the turns in a row.
#[derive(Debug, Default)]
struct Model {
    waiting: BTreeMap<&'static str, VecDeque<usize>>,
    dispatch_run: usize,
    caller_run: usize,
    /// Number of turns of the second holder since the first, who waits, last had a turn or began to wait.
    overtaken: HashMap<(&'static str, &'static str), usize>,
}

impl Model {
    fn is_waiting(&self, owner: &str) -> bool {
        self.waiting.get(owner).is_some_and(|waiting| !waiting.is_empty())
    }

    fn callers(&self) -> impl Iterator<Item = &'static str> {
        let is_caller = |owner: &&'static str| !["D", "B"].contains(owner) && self.is_waiting(owner);
        self.waiting.keys().copied().filter(is_caller)
    }

    /// Checks that a ticket is the next one, and removes it.
    fn take(&mut self, ticket: &Ticket) {
        let owner = *self.waiting.keys().find(|owner| **owner == ticket.owner).expect("it came");
        let first = self.waiting.get_mut(owner).and_then(VecDeque::pop_front);
        assert_eq!(first, Some(ticket.number), "first come, first served");
        let others_wait = self.is_waiting("B") || self.callers().next().is_some();
        match owner {
            "D" => self.dispatch_run = if others_wait { self.dispatch_run + 1 } else { 0 },
            "B" => {
                assert!(
                    self.callers().next().is_none() || self.caller_run == 32,
                    "it has gone before callers"
                );
                (self.dispatch_run, self.caller_run) = (0, 0);
            }
            caller => {
                assert!(!self.is_waiting("D") || self.dispatch_run == 8, "it has gone before dispatch");
                self.dispatch_run = 0;
                self.caller_run = if self.is_waiting("B") { self.caller_run + 1 } else { 0 };
                for other in self.callers().filter(|other| *other != caller).collect::<Vec<_>>() {
                    let turns = self.overtaken.entry((other, caller)).or_default();
                    *turns += 1;
                    assert_eq!(*turns, 1, "{caller} had two turns while {other} waited");
                }
                self.overtaken.retain(|(other, _), _| *other != caller);
            }
        }
        assert!(self.dispatch_run <= 8 && self.caller_run <= 32, "{self:?}");
    }
}

#[test]
fn turns_are_fair_whoever_comes_and_goes() {
    for seed in 0..50 {
        let mut random = Rng::with_seed(seed);
        let (mut hall, mut model) = (Hall::new(), Model::default());
        for step in 0..3_000 {
            if step < 2_000 && random.u8(0..100) < 60 {
                let owner = random.choice(["D", "D", "D", "a", "a", "a", "b", "c", "B"]).expect("one");
                let number = hall.numbers.get(owner).copied().unwrap_or(0);
                if let Ok(is_gone) = hall.push(owner) {
                    is_gone.set(random.u8(0..10) == 0);
                    if !is_gone.get() {
                        model.waiting.entry(owner).or_default().push_back(number);
                    }
                }
                continue;
            }
            match hall.turns.pop() {
                Some(ticket) => model.take(&ticket),
                None => assert!(model.waiting.values().all(VecDeque::is_empty), "seed {seed}: {model:?}"),
            }
        }
        assert!(hall.turns.is_empty() && hall.turns.callers.is_empty() && hall.turns.round.is_empty());
    }
}
