//! The selection of the first candidates in any order, in one pass over them.

use std::{cmp::Ordering, collections::VecDeque, sync::Arc};

use super::{
    entry::{Entry, VisibleImage},
    images::Images,
};
use crate::image::Order;

/// The first of the images that were offered, in an order.
#[derive(Debug)]
pub(super) struct Best {
    order: Order,
    most: usize,
    /// Up to twice as many images as wanted.
    ranked: Vec<Ranked>,
    /// Number of images at the start of `ranked` whose entries were kept in earlier chunks.
    kept: usize,
    /// Rank of the last wanted image so far; an image that ranks behind it is discarded.
    worst: Option<u128>,
}

/// An image with its [rank](super::columns::Columns::rank).
#[derive(Clone, Debug)]
struct Ranked {
    rank: u128,
    slot: u32,
    /// `None` until the end of the chunk that offered the image, because most are discarded by then.
    entry: Option<Arc<Entry>>,
}

impl Ranked {
    fn compare(&self, other: &Self, order: &Order, images: &Images) -> Ordering {
        self.rank.cmp(&other.rank).then_with(|| match (self.entry(images), other.entry(images)) {
            (Some(entry), Some(other)) => order.compare(&entry.image, &other.image),
            (entry, other) => entry.is_some().cmp(&other.is_some()),
        })
    }

    fn entry<'a>(&'a self, images: &'a Images) -> Option<&'a Arc<Entry>> {
        self.entry.as_ref().or_else(|| images.in_slot(self.slot))
    }
}

impl Best {
    /// Number of images up to which they are sorted before the search, so that it ends once enough match.
    pub(super) const SORTED: usize = 8 * 1024;

    pub(super) fn new(order: &Order, most: usize) -> Self {
        Self { order: order.clone(), most, ranked: Vec::new(), kept: 0, worst: None }
    }

    /// Reports whether an image of this rank may be among the first.
    pub(super) fn admits(&self, rank: u128) -> bool {
        self.worst.is_none_or(|worst| rank <= worst)
    }

    /// Offers the image in a slot.
    ///
    /// Before the images change, the remaining ones must be [kept](Self::keep).
    pub(super) fn offer(&mut self, images: &Images, rank: u128, slot: u32) {
        self.ranked.push(Ranked { rank, slot, entry: None });
        if self.ranked.len() >= 2 * self.most {
            self.drop_others(images);
        }
    }

    /// Keeps the entries of the remaining images as they are now.
    pub(super) fn keep(&mut self, images: &Images) {
        self.drop_others(images);
        for ranked in &mut self.ranked[self.kept..] {
            ranked.entry = ranked.entry(images).cloned();
        }
        self.kept = self.ranked.len();
    }

    fn drop_others(&mut self, images: &Images) {
        let Self { order, most, ranked, kept, worst } = self;
        if ranked.len() > *most {
            let (_, last, _) = ranked.select_nth_unstable_by(*most - 1, |a, b| a.compare(b, order, images));
            *worst = Some(last.rank);
            ranked.truncate(*most);
            *kept = 0;
        }
    }

    /// Returns the images that were kept, sorted if they are few or their texts are large.
    ///
    /// Texts are large if together they exceed `most_text`, the number of bytes that one call may search.
    pub(super) fn finish(self, most_text: u64) -> Selection {
        // A full selection may have left out others.
        let is_all = self.worst.is_none() && self.ranked.len() < self.most;
        let order = self.order;
        let by_order = |a: &Arc<Entry>, b: &Arc<Entry>| order.compare(&a.image, &b.image);
        let mut entries: Vec<_> = self.ranked.into_iter().filter_map(|ranked| ranked.entry).collect();
        let text: u64 = entries.iter().map(|entry| entry.text_len() as u64).sum();
        let is_sorted = entries.len() <= Self::SORTED || text > most_text;
        if is_sorted {
            entries.sort_unstable_by(by_order);
        }
        let last = match entries.last() {
            _ if is_all => None,
            last if is_sorted => last.cloned(),
            _ => entries.iter().max_by(|a, b| by_order(a, b)).cloned(),
        };
        Selection { count: entries.len(), entries: entries.into(), is_sorted, last, found: Vec::new() }
    }
}

/// The first candidates in an order, and those of them that are listed.
#[derive(Debug)]
pub(super) struct Selection {
    /// Number of images that were selected.
    pub(super) count: usize,
    /// Selected images that were not looked at yet.
    pub(super) entries: VecDeque<Arc<Entry>>,
    /// Set when `entries` is in order.
    pub(super) is_sorted: bool,
    /// Last of all selected images; `None` if no candidates follow it.
    pub(super) last: Option<Arc<Entry>>,
    pub(super) found: Vec<VisibleImage>,
}
