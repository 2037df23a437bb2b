//! The scan for one page of a list, in chunks of bounded work on the images as they are at the time.
//!
//! Images are looked at in list order. The index maintains the default order, which is walked as long as that
//! finds enough images. For any other order, and for the default one if candidates are few or far between, a
//! pass over the candidates selects the first of them. If too few of these contain the term, the next pass
//! selects as many as should be needed, or searches all candidates if one call may.

use std::ops::ControlFlow;

use super::{
    candidates::Candidates,
    entry::VisibleImage,
    filter::{Budget, Filter},
    images::Images,
    selection::{Best, Selection},
    text::Text,
};
use crate::image::{ImageId, KeyValue, Order, Position};

/// The result of a [`PageScan`].
#[derive(Debug)]
pub(super) struct FoundPage {
    pub(super) images: Vec<VisibleImage>,
    /// Position after which the next page begins; `None` on the last page.
    pub(super) next: Option<Position>,
    /// Amount of text searched, in bytes.
    pub(super) searched: u64,
}

/// The scan for one page.
#[derive(Debug)]
pub(super) struct PageScan {
    filter: Filter,
    order: Order,
    candidates: Candidates,
    limit: usize,
    /// Position up to which images were looked at.
    position: Option<Position>,
    found: Vec<VisibleImage>,
    source: Source,
    end: Option<End>,
}

/// The source of the next images.
#[derive(Debug)]
enum Source {
    /// The maintained order, with the number of steps walked.
    Walk { steps: u64 },
    /// A pass in progress.
    Pass(Pass),
    /// The selection of a completed pass, and the text of all candidates in bytes.
    Selected { selection: Selection, text: u64 },
}

/// A pass over the candidates.
#[derive(Debug)]
struct Pass {
    /// Set when the pass searches the texts, and selects only images that contain the term.
    searches: bool,
    best: Best,
    /// Slot to continue with.
    next: u32,
    /// Text of the candidates visited so far, in bytes.
    text: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum End {
    /// One more image than the page has room for.
    Full,
    /// No further images.
    Exhausted,
    /// The limit of the text that one call may search.
    Bounded,
}

impl PageScan {
    /// Maximum amount of text that one call searches, in bytes.
    const MAX_SEARCHED: u64 = 64 * 1024 * 1024;
    /// Number of candidates up to which the first pass selects them all.
    const FEW: u64 = 1_000;
    /// Maximum number of images that one pass selects: about as many as one call may search.
    const MANY: usize = 128 * 1024;
    /// Number of steps after which the walk is reconsidered.
    const MIN_WALK: u64 = 4_096;

    pub(super) fn new(images: &Images, filter: Filter, position: Option<Position>, limit: usize) -> Self {
        let candidates = filter.candidates(images);
        let count = candidates.count(images);
        let walks = filter.query.order.is_latest_first() && count > Self::FEW;
        let order = filter.query.order.clone();
        let selected =
            if count <= Self::FEW { Self::FEW as usize } else { Self::selected_first(&filter, limit) };
        let source = if walks { Source::Walk { steps: 0 } } else { Source::pass(&order, selected) };
        Self { filter, order, candidates, limit, position, found: Vec::new(), source, end: None }
    }

    /// Returns the number of images that the first pass selects.
    fn selected_first(filter: &Filter, limit: usize) -> usize {
        // With a term, some of the selected images may not match.
        if filter.has_term() { 4 * (limit + 1) } else { limit + 1 }
    }

    /// Runs the scan for one chunk. Returns whether the page is complete.
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
        let last = self.found.last().map(|found| self.order.position_of(&found.entry.image));
        let next = match self.end {
            _ if is_full => last,
            Some(End::Full | End::Exhausted) | None => None,
            Some(End::Bounded) => self.position,
        };
        FoundPage { images: self.found, next, searched: self.filter.searched() }
    }

    fn walk(&mut self, images: &Images, budget: &mut Budget) {
        let Source::Walk { mut steps } = self.source else {
            return;
        };
        let before = self.position.as_ref().and_then(update_position);
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
            self.position = Some(self.order.position_of(&last.image));
        }
        if self.end.is_some() {
            return;
        }
        if is_over {
            self.end = Some(End::Exhausted);
            return;
        }
        self.source = Source::Walk { steps };
        // By the estimate so far, a pass over the candidates may be less work.
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
        let after = self
            .position
            .as_ref()
            .map(|position| (position, images.columns.rank_of_position(order, position)));
        let is_behind = |slot, rank: u128| match after {
            Some((position, after)) if rank == after => images
                .in_slot(slot)
                .is_some_and(|entry| order.compare_to_position(&entry.image, position).is_gt()),
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
                self.position = Some(order.position_of(&entry.image));
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
        self.position = selection.last.as_ref().map(|last| order.position_of(&last.image));
        if self.found.len() > self.limit {
            self.end = Some(End::Full);
        } else if selection.last.is_none() {
            self.end = Some(End::Exhausted);
        } else if self.filter.searched() >= Self::MAX_SEARCHED {
            self.end = Some(End::Bounded);
        } else {
            let missing = self.limit + 1 - self.found.len();
            // Twice as many as needed if the term is as common among the images that follow.
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

/// Converts a position of the default order to a position in the order of updates.
fn update_position(position: &Position) -> Option<(i64, ImageId)> {
    match position.keys.as_slice() {
        [KeyValue::Number(time)] => Some((*time, position.id)),
        _ => None,
    }
}

/// The scan that counts the matching images.
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
        // Without a term every candidate matches.
        let is_done = !filter.has_term();
        let count = if is_done { candidates.count(images) } else { 0 };
        Self { filter, candidates, next: 0, count, is_done }
    }

    /// Runs the count for one chunk. Returns whether it is complete.
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

    /// Returns the number of matching images, and the amount of text searched in bytes.
    pub(super) fn finish(self) -> (u64, u64) {
        (self.count, self.filter.searched())
    }
}

/// The scan for the next images in slot order, which never changes while the images exist.
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

    /// Runs the scan for one chunk. Returns whether enough images were found or none are left.
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

    /// Returns the images that were found, with their slots, and the amount of text searched in bytes.
    pub(super) fn finish(self) -> (Vec<(u32, VisibleImage)>, u64) {
        (self.found, self.filter.searched())
    }
}
