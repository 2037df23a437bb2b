//! One page of a list, found in stretches: each does bounded work upon the images as they are then.
//!
//! Images are looked at in the order of the list. The default order is kept, and is walked while that finds enough; any other
//! order, and the default one where candidates are few or far between, is that of the best of one pass over the candidates. When
//! too few of these hold the term, the next pass selects as many as should, or searches all candidates if one call may.

use std::ops::ControlFlow;

use super::{
    candidates::Candidates,
    entry::VisibleImage,
    filter::{Budget, Filter},
    images::Images,
    selection::{Best, Selection},
    text::Text,
};
use crate::image::{ImageId, KeyValue, Order, Place};

/// The result of a [`PageScan`].
#[derive(Debug)]
pub(super) struct FoundPage {
    pub(super) images: Vec<VisibleImage>,
    /// After which place the next page begins; none on the last one.
    pub(super) next: Option<Place>,
    /// The text that was searched. Bytes.
    pub(super) searched: u64,
}

/// The search for one page.
#[derive(Debug)]
pub(super) struct PageScan {
    filter: Filter,
    order: Order,
    candidates: Candidates,
    limit: usize,
    /// The place up to which images were looked at.
    place: Option<Place>,
    found: Vec<VisibleImage>,
    source: Source,
    end: Option<End>,
}

/// The source of the next images.
#[derive(Debug)]
enum Source {
    /// The order itself, of which so many steps were made.
    Walk { steps: u64 },
    /// A pass that is under way.
    Pass(Pass),
    /// The selection of a pass, and the text of all candidates in bytes.
    Selected { selection: Selection, text: u64 },
}

/// A pass over the candidates.
#[derive(Debug)]
struct Pass {
    /// Set when what does not hold the term is none of the best.
    searches: bool,
    best: Best,
    /// The slot that it goes on with.
    next: u32,
    /// The text of the candidates that it has passed. Bytes.
    text: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum End {
    /// One more than the page has room for was found.
    Full,
    /// There is nothing more.
    Exhausted,
    /// As much was searched as one call may.
    Bounded,
}

impl PageScan {
    /// The most text that one call searches. Bytes.
    const MAX_SEARCHED: u64 = 64 * 1024 * 1024;
    /// Candidates that are so few are all selected by the first pass.
    const FEW: u64 = 1_000;
    /// The most that one pass selects: about as many as one call may search.
    const MANY: usize = 128 * 1024;
    /// After so many steps it is decided anew whether the order is walked.
    const MIN_WALK: u64 = 4_096;

    pub(super) fn new(images: &Images, filter: Filter, place: Option<Place>, limit: usize) -> Self {
        let candidates = filter.candidates(images);
        let count = candidates.count(images);
        let walks = filter.query.order.is_latest_first() && count > Self::FEW;
        let order = filter.query.order.clone();
        let selected =
            if count <= Self::FEW { Self::FEW as usize } else { Self::selected_first(&filter, limit) };
        let source = if walks { Source::Walk { steps: 0 } } else { Source::pass(&order, selected) };
        Self { filter, order, candidates, limit, place, found: Vec::new(), source, end: None }
    }

    /// Returns how many images the first pass selects.
    fn selected_first(filter: &Filter, limit: usize) -> usize {
        // With a term some of what is selected may not hold it.
        if filter.has_term() { 4 * (limit + 1) } else { limit + 1 }
    }

    /// Goes on for a stretch. Returns whether the page is done.
    pub(super) fn advance(&mut self, images: &Images, mut budget: Budget) -> bool {
        while self.end.is_none() && !budget.is_spent() {
            match &self.source {
                Source::Walk { .. } => self.walk(images, &mut budget),
                Source::Pass(_) => self.pass(images, &mut budget),
                Source::Selected { .. } => self.look_at_selected(&mut budget),
            }
        }
        self.end.is_some()
    }

    pub(super) fn finish(mut self) -> FoundPage {
        let is_full = self.found.len() > self.limit;
        self.found.truncate(self.limit);
        let last = self.found.last().map(|found| self.order.place_of(&found.entry.image));
        let next = match self.end {
            _ if is_full => last,
            Some(End::Full | End::Exhausted) | None => None,
            Some(End::Bounded) => self.place,
        };
        FoundPage { images: self.found, next, searched: self.filter.searched() }
    }

    fn walk(&mut self, images: &Images, budget: &mut Budget) {
        let Source::Walk { mut steps } = self.source else {
            return;
        };
        let before = self.place.as_ref().and_then(update_place);
        let Self { filter, candidates, found, .. } = self;
        let mut last = None;
        let mut is_over = true;
        let slots = images.latest_first(before).map(|(_, slot)| slot);
        let has_term = filter.has_term();
        for slot in images.read_ahead(slots, |slot| has_term && candidates.contains(slot)) {
            if self.end.is_some() || budget.is_spent() {
                is_over = false;
                break;
            }
            steps += 1;
            budget.spend(1);
            last = images.in_slot(slot).or(last);
            if candidates.contains(slot) {
                found.extend(filter.look_into(images, slot, budget));
                if found.len() > self.limit {
                    self.end = Some(End::Full);
                } else if filter.searched() >= Self::MAX_SEARCHED {
                    self.end = Some(End::Bounded);
                }
            }
        }
        if let Some(last) = last {
            self.place = Some(self.order.place_of(&last.image));
        }
        if self.end.is_some() {
            return;
        }
        if is_over {
            self.end = Some(End::Exhausted);
            return;
        }
        self.source = Source::Walk { steps };
        // As far as can be told by now it may be less work to go through the candidates.
        let missing = (self.limit + 1 - self.found.len()) as u64;
        let expected = (steps * missing).checked_div(self.found.len() as u64).unwrap_or(u64::MAX);
        let left = (images.len() as u64).saturating_sub(steps).min(expected);
        if steps >= Self::MIN_WALK && 2 * self.candidates.count(images) < left {
            let selected = Self::selected_first(&self.filter, self.limit);
            self.source = Source::pass(&self.order, selected);
        }
    }

    fn pass(&mut self, images: &Images, budget: &mut Budget) {
        let Source::Pass(Pass { searches, best, next, text }) = &mut self.source else {
            return;
        };
        let (order, filter) = (&self.order, &mut self.filter);
        let after = self.place.as_ref().map(|place| (place, images.columns.rank_of_place(order, place)));
        let is_behind = |slot, rank: u128| match after {
            Some((place, after)) if rank == after => {
                images.in_slot(slot).is_some_and(|entry| order.compare_to_place(&entry.image, place).is_gt())
            }
            Some((_, after)) => rank > after,
            None => true,
        };
        let stopped = self.candidates.try_for_each(images, *next, *searches, |slot| {
            if budget.is_spent() {
                return ControlFlow::Break(slot);
            }
            budget.spend(1);
            *text += images.text(slot).map_or(0, Text::len) as u64;
            let rank = images.columns.rank(order, slot);
            if best.admits(rank)
                && is_behind(slot, rank)
                && images.in_slot(slot).is_some()
                && (!*searches || filter.look_into(images, slot, budget).is_some())
            {
                best.offer(images, rank, slot);
            }
            ControlFlow::Continue(())
        });
        best.keep(images);
        match stopped {
            ControlFlow::Break(slot) => *next = slot,
            ControlFlow::Continue(()) => {
                let best = std::mem::replace(best, Best::new(order, 1));
                self.source = Source::Selected { selection: best.finish(Self::MAX_SEARCHED), text: *text };
            }
        }
    }

    fn look_at_selected(&mut self, budget: &mut Budget) {
        let Source::Selected { selection, text } = &mut self.source else {
            return;
        };
        let order = &self.order;
        while let Some(entry) = selection.entries.pop_front() {
            selection.found.extend(self.filter.look(&entry, budget));
            let is_enough = self.found.len() + selection.found.len() > self.limit;
            if selection.is_sorted && (is_enough || self.filter.searched() >= Self::MAX_SEARCHED) {
                self.found.append(&mut selection.found);
                self.place = Some(order.place_of(&entry.image));
                self.end = Some(if is_enough { End::Full } else { End::Bounded });
                return;
            }
            if budget.is_spent() {
                return;
            }
        }
        selection.found.sort_unstable_by(|a, b| order.compare(&a.entry.image, &b.entry.image));
        let (selected, held) = (selection.count, selection.found.len());
        self.found.append(&mut selection.found);
        self.place = selection.last.as_ref().map(|last| order.place_of(&last.image));
        if self.found.len() > self.limit {
            self.end = Some(End::Full);
        } else if selection.last.is_none() {
            self.end = Some(End::Exhausted);
        } else if self.filter.searched() >= Self::MAX_SEARCHED {
            self.end = Some(End::Bounded);
        } else {
            let missing = self.limit + 1 - self.found.len();
            // Twice as many as hold the term if it is as common among them.
            let expected = (2 * missing * selected).checked_div(held).unwrap_or(usize::MAX);
            let may_search_all = *text <= Self::MAX_SEARCHED - self.filter.searched();
            self.source = if expected > Best::SORTED && may_search_all {
                Source::Pass(Pass { searches: true, ..Pass::new(order, missing) })
            } else {
                Source::pass(order, expected.min(Self::MANY))
            };
        }
    }
}

impl Source {
    fn pass(order: &Order, selected: usize) -> Self {
        Self::Pass(Pass::new(order, selected))
    }
}

impl Pass {
    fn new(order: &Order, selected: usize) -> Self {
        Self { searches: false, best: Best::new(order, selected), next: 0, text: 0 }
    }
}

/// Returns a place of the default order as that of updates has it.
fn update_place(place: &Place) -> Option<(i64, ImageId)> {
    match place.keys.as_slice() {
        [KeyValue::Number(time)] => Some((*time, place.id)),
        _ => None,
    }
}

/// The search for how many images match.
#[derive(Debug)]
pub(super) struct CountScan {
    filter: Filter,
    candidates: Candidates,
    next: u32,
    count: u64,
    is_done: bool,
}

impl CountScan {
    pub(super) fn new(images: &Images, filter: Filter) -> Self {
        let candidates = filter.candidates(images);
        // Without a term each of them matches.
        let is_done = !filter.has_term();
        let count = if is_done { candidates.count(images) } else { 0 };
        Self { filter, candidates, next: 0, count, is_done }
    }

    /// Goes on for a stretch. Returns whether all were counted.
    pub(super) fn advance(&mut self, images: &Images, mut budget: Budget) -> bool {
        if self.is_done {
            return true;
        }
        let has_term = self.filter.has_term();
        let stopped = self.candidates.try_for_each(images, self.next, has_term, |slot| {
            if budget.is_spent() {
                return ControlFlow::Break(slot);
            }
            budget.spend(1);
            let found = self.filter.look_into(images, slot, &mut budget);
            self.count += u64::from(found.is_some());
            ControlFlow::Continue(())
        });
        match stopped {
            ControlFlow::Break(slot) => self.next = slot,
            ControlFlow::Continue(()) => self.is_done = true,
        }
        self.is_done
    }

    /// Returns how many match, and how much text was searched, in bytes.
    pub(super) fn finish(self) -> (u64, u64) {
        (self.count, self.filter.searched())
    }
}

/// The search for the next images in the order of their slots, which nothing changes while they exist.
#[derive(Debug)]
pub(super) struct SlotScan {
    filter: Filter,
    candidates: Candidates,
    next: u32,
    most: usize,
    found: Vec<(u32, VisibleImage)>,
}

impl SlotScan {
    pub(super) fn new(images: &Images, filter: Filter, first: u32, most: usize) -> Self {
        let candidates = filter.candidates(images);
        Self { filter, candidates, next: first, most, found: Vec::new() }
    }

    /// Goes on for a stretch. Returns whether enough were found, or there are no more.
    pub(super) fn advance(&mut self, images: &Images, mut budget: Budget) -> bool {
        let (filter, found, most) = (&mut self.filter, &mut self.found, self.most);
        let has_term = filter.has_term();
        let stopped = self.candidates.try_for_each(images, self.next, has_term, |slot| {
            if budget.is_spent() || found.len() >= most {
                return ControlFlow::Break(slot);
            }
            budget.spend(1);
            let looked = filter.look_into(images, slot, &mut budget);
            found.extend(looked.map(|image| (slot, image)));
            ControlFlow::Continue(())
        });
        match stopped {
            ControlFlow::Break(slot) => {
                self.next = slot;
                self.found.len() >= self.most
            }
            ControlFlow::Continue(()) => true,
        }
    }

    /// Returns the images with their slots.
    pub(super) fn finish(self) -> Vec<(u32, VisibleImage)> {
        self.found
    }
}
