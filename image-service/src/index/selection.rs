//! The first of the candidates by any order, found in one pass over them.

use std::{collections::VecDeque, sync::Arc};

use super::entry::{Entry, VisibleImage};
use crate::image::Order;

/// The first of the images that were offered, by an order.
#[derive(Debug)]
pub(super) struct Best {
    order: Order,
    most: usize,
    /// Up to twice as many as are wanted.
    entries: Vec<Arc<Entry>>,
    /// The last of as many as are wanted: what comes behind it is none of them.
    worst: Option<Arc<Entry>>,
}

impl Best {
    /// So many are sorted before they are searched, so that the search ends when enough were found.
    const SORTED: usize = 8 * 1024;

    pub(super) fn new(order: &Order, most: usize) -> Self {
        Self { order: order.clone(), most, entries: Vec::new(), worst: None }
    }

    pub(super) fn worst(&self) -> Option<&Entry> {
        self.worst.as_deref()
    }

    pub(super) fn offer(&mut self, entry: &Arc<Entry>) {
        if self.worst().is_some_and(|worst| self.order.compare(&worst.image, &entry.image).is_lt()) {
            return;
        }
        self.entries.push(Arc::clone(entry));
        if self.entries.len() >= 2 * self.most {
            self.drop_others();
        }
    }

    fn drop_others(&mut self) {
        let Self { order, most, entries, worst } = self;
        if entries.len() > *most {
            let (_, last, _) =
                entries.select_nth_unstable_by(*most - 1, |a, b| order.compare(&a.image, &b.image));
            *worst = Some(Arc::clone(last));
            entries.truncate(*most);
        }
    }

    /// Returns them, in their order if they are not too many, or their texts have more bytes than one call may search.
    pub(super) fn finish(mut self, most_text: u64) -> Selection {
        // With as many as were wanted there may be more.
        let is_all = self.worst.is_none() && self.entries.len() < self.most;
        self.drop_others();
        let order = self.order;
        let last = self.entries.iter().max_by(|a, b| order.compare(&a.image, &b.image)).cloned();
        let text: u64 = self.entries.iter().map(|entry| entry.text_len() as u64).sum();
        let is_sorted = self.entries.len() <= Self::SORTED || text > most_text;
        if is_sorted {
            self.entries.sort_unstable_by(|a, b| order.compare(&a.image, &b.image));
        }
        let last = last.filter(|_| !is_all);
        Selection { entries: self.entries.into(), is_sorted, last, found: Vec::new() }
    }
}

/// The first candidates by an order, and those of them that are on the list.
#[derive(Debug)]
pub(super) struct Selection {
    /// Those that were not looked at yet.
    pub(super) entries: VecDeque<Arc<Entry>>,
    /// Set when these are in the order.
    pub(super) is_sorted: bool,
    /// The last of all that were selected; none when there are no others behind it.
    pub(super) last: Option<Arc<Entry>>,
    pub(super) found: Vec<VisibleImage>,
}
