//! One page of a list, found in stretches: each does bounded work upon the images as they are then.
//!
//! Images are looked at in the order of the list. The default order is kept, and is walked while that finds enough; any other
//! order, and the default one where candidates are few or far between, is that of the best of one pass over the candidates. When
//! too few of these hold the term, another pass selects more, up to as many as one call may search.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    candidates::Candidates,
    entry::{Entry, VisibleImage},
    filter::{Budget, Filter},
    images::Images,
    selection::{Best, Selection},
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
    /// The number of images that the next pass selects.
    selects: usize,
    end: Option<End>,
}

/// The source of the next images.
#[derive(Debug)]
enum Source {
    /// The order itself, of which so many steps were made.
    Walk { steps: u64 },
    /// A pass that is under way, and the slot that it goes on with.
    Pass { best: Best, next: u32 },
    /// The selection of a pass.
    Selected(Selection),
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
    /// The factor by which a pass selects more than the one before, and the most that one selects: about as many as one call may
    /// search.
    const GROWTH: usize = 16;
    const MANY: usize = 128 * 1024;
    /// After so many steps it is decided anew whether the order is walked.
    const MIN_WALK: u64 = 4_096;

    pub(super) fn new(images: &Images, filter: Filter, place: Option<Place>, limit: usize) -> Self {
        let candidates = filter.candidates(images);
        let count = candidates.count(images);
        let walks = filter.query.order.is_latest_first() && count > Self::FEW;
        // With a term some of what is selected may not hold it.
        let selects = if filter.has_term() { 4 * (limit + 1) } else { limit + 1 };
        let selects = if count <= Self::FEW { Self::FEW as usize } else { selects };
        let source =
            if walks { Source::Walk { steps: 0 } } else { Source::pass(&filter.query.order, selects) };
        let order = filter.query.order.clone();
        Self { filter, order, candidates, limit, place, found: Vec::new(), source, selects, end: None }
    }

    /// Goes on for a stretch. Returns whether the page is done.
    pub(super) fn advance(&mut self, images: &Images, mut budget: Budget) -> bool {
        while self.end.is_none() && !budget.is_spent() {
            match &self.source {
                Source::Walk { .. } => self.walk(images, &mut budget),
                Source::Pass { .. } => self.pass(images, &mut budget),
                Source::Selected(_) => self.look_at_selected(&mut budget),
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
        let mut last = None;
        let mut is_over = true;
        for (_, slot) in images.latest_first(before) {
            if self.end.is_some() || budget.is_spent() {
                is_over = false;
                break;
            }
            steps += 1;
            budget.spend(1);
            let entry = images.in_slot(slot);
            last = entry.or(last);
            if let Some(entry) = entry.filter(|_| self.candidates.contains(slot)) {
                self.look(entry, budget);
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
            self.source = Source::pass(&self.order, self.selects);
        }
    }

    fn pass(&mut self, images: &Images, budget: &mut Budget) {
        let Source::Pass { best, next } = &mut self.source else {
            return;
        };
        let order = &self.order;
        let is_latest_first = order.is_latest_first();
        let oldest = self.place.as_ref().filter(|_| is_latest_first).and_then(update_place);
        let stopped = self.candidates.try_for_each(*next, |slot| {
            if budget.is_spent() {
                return ControlFlow::Break(slot);
            }
            budget.spend(1);
            if is_latest_first {
                // Most can be told by their times.
                let time = images.updated_at(slot);
                let is_beyond = oldest.is_none_or(|(oldest, _)| time <= oldest);
                if !is_beyond || best.worst().is_some_and(|worst| time < worst.image.updated_at.micros()) {
                    return ControlFlow::Continue(());
                }
            } else {
                budget.spend(Budget::IMAGE);
            }
            if let Some(entry) = images.in_slot(slot)
                && self.place.as_ref().is_none_or(|place| order.compare_to_place(&entry.image, place).is_gt())
            {
                best.offer(entry);
            }
            ControlFlow::Continue(())
        });
        match stopped {
            ControlFlow::Break(slot) => *next = slot,
            ControlFlow::Continue(()) => {
                let best = std::mem::replace(best, Best::new(order, 1));
                self.source = Source::Selected(best.finish(Self::MAX_SEARCHED));
                self.selects = self.selects.saturating_mul(Self::GROWTH).min(Self::MANY);
            }
        }
    }

    fn look_at_selected(&mut self, budget: &mut Budget) {
        let Source::Selected(selection) = &mut self.source else {
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
        self.found.append(&mut selection.found);
        self.place = selection.last.as_ref().map(|last| order.place_of(&last.image));
        if self.found.len() > self.limit {
            self.end = Some(End::Full);
        } else if selection.last.is_none() {
            self.end = Some(End::Exhausted);
        } else if self.filter.searched() >= Self::MAX_SEARCHED {
            self.end = Some(End::Bounded);
        } else {
            self.source = Source::pass(order, self.selects);
        }
    }

    fn look(&mut self, entry: &Arc<Entry>, budget: &mut Budget) {
        self.found.extend(self.filter.look(entry, budget));
        if self.found.len() > self.limit {
            self.end = Some(End::Full);
        } else if self.filter.searched() >= Self::MAX_SEARCHED {
            self.end = Some(End::Bounded);
        }
    }
}

impl Source {
    fn pass(order: &Order, most: usize) -> Self {
        Self::Pass { best: Best::new(order, most), next: 0 }
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
        let stopped = self.candidates.try_for_each(self.next, |slot| {
            if budget.is_spent() {
                return ControlFlow::Break(slot);
            }
            budget.spend(1);
            let found = images.in_slot(slot).and_then(|entry| self.filter.look(entry, &mut budget));
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
        let stopped = self.candidates.try_for_each(self.next, |slot| {
            if budget.is_spent() || found.len() >= most {
                return ControlFlow::Break(slot);
            }
            budget.spend(1);
            let looked = images.in_slot(slot).and_then(|entry| filter.look(entry, &mut budget));
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
