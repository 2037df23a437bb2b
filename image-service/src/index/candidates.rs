//! The slots that may hold images which a caller can see and which match a query.

use std::ops::ControlFlow;

use roaring::RoaringBitmap;

use super::{
    entry::Viewer,
    images::Images,
    signatures::{BLOCK, is_set},
    slot_set::SlotSet,
};
use crate::{access::GranteeDigest, image::Query};

/// A set of slots as of one moment. An image must be checked again when it is looked at.
#[derive(Debug)]
pub(super) struct Candidates {
    /// `None` for all slots.
    set: Option<RoaringBitmap>,
    /// Blocks that can contain the term; `None` if no block can be skipped.
    blocks: Option<Box<[u64]>>,
    slot_count: u32,
}

impl Candidates {
    pub(super) fn new(images: &Images, viewer: &Viewer, query: &Query) -> Self {
        let blocks = query.search.as_ref().and_then(|term| images.signatures.candidates(term.as_str()));
        Self { set: matching(images, viewer, query), blocks, slot_count: images.slot_count() }
    }

    /// Returns the maximum number of matching images; without a term, the exact number.
    pub(super) fn count(&self, images: &Images) -> u64 {
        let in_set = self.set.as_ref().map_or(images.len() as u64, RoaringBitmap::len);
        match self.blocks {
            Some(_) => in_set.min(self.block_count() * u64::from(BLOCK)),
            None => in_set,
        }
    }

    pub(super) fn contains(&self, slot: u32) -> bool {
        self.set.as_ref().is_none_or(|set| set.contains(slot)) && self.is_in_block(slot)
    }

    /// Calls `look` for each slot from `first` on, in order, until it breaks.
    ///
    /// Texts are prefetched if `searches` is set.
    pub(super) fn try_for_each<B>(
        &self,
        images: &Images,
        first: u32,
        searches: bool,
        mut look: impl FnMut(u32) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        match (&self.set, &self.blocks) {
            (None, None) => images.read_ahead(first..self.slot_count, |_| searches).try_for_each(look),
            (Some(set), None) => {
                let mut slots = set.iter();
                slots.advance_to(first);
                images.read_ahead(slots, |_| searches).try_for_each(look)
            }
            (None, Some(blocks)) => {
                let slots = of_blocks(blocks, first, self.slot_count);
                images.read_ahead(slots, |_| searches).try_for_each(look)
            }
            // Finding the slots of a block takes as long as skipping a few.
            (Some(set), Some(blocks)) if 16 * self.block_count() < set.len() => {
                let mut block = first / BLOCK;
                while let Some(next) = next_set(blocks, block) {
                    block = next + 1;
                    let slots = set.range(first.max(next * BLOCK)..block * BLOCK);
                    images.read_ahead(slots, |_| searches).try_for_each(&mut look)?;
                }
                ControlFlow::Continue(())
            }
            (Some(set), Some(_)) => {
                let mut slots = set.iter();
                slots.advance_to(first);
                let slots = slots.filter(|slot| self.is_in_block(*slot));
                images.read_ahead(slots, |_| searches).try_for_each(look)
            }
        }
    }

    /// Returns the number of blocks that can contain the term.
    fn block_count(&self) -> u64 {
        self.blocks.iter().flatten().map(|word| u64::from(word.count_ones())).sum()
    }

    fn is_in_block(&self, slot: u32) -> bool {
        self.blocks.as_ref().is_none_or(|blocks| is_set(blocks, slot / BLOCK))
    }
}

fn of_blocks(blocks: &[u64], first: u32, end: u32) -> impl Iterator<Item = u32> {
    let mut block = first / BLOCK;
    let of_block = std::iter::from_fn(move || {
        let next = next_set(blocks, block)?;
        block = next + 1;
        Some(next)
    });
    of_block.flat_map(move |block| first.max(block * BLOCK)..end.min((block + 1) * BLOCK))
}

/// Returns the first set bit at or after `at`.
fn next_set(bits: &[u64], at: u32) -> Option<u32> {
    let mut word = at as usize / 64;
    let mut left = bits.get(word)? & (u64::MAX << (at % 64));
    while left == 0 {
        word += 1;
        left = *bits.get(word)?;
    }
    Some(u32::try_from(word).ok()? * 64 + left.trailing_zeros())
}

/// Returns the slots of all visible images that the filters admit; `None` for all slots.
fn matching(images: &Images, viewer: &Viewer, query: &Query) -> Option<RoaringBitmap> {
    let sets = &images.sets;
    let mut found: Option<RoaringBitmap> = None;
    let none = RoaringBitmap::new();
    let mut intersect = |set: &RoaringBitmap| match &mut found {
        Some(found) => *found &= set,
        none => *none = Some(set.clone()),
    };
    // The sets that are usually smallest come first.
    if let Some(creator) = &query.creator {
        let of_creator = sets.creators.get(&GranteeDigest::from_subject(creator)).map(SlotSet::bitmap);
        intersect(of_creator.as_deref().unwrap_or(&none));
    }
    match viewer.grantees() {
        None => {}
        Some([grantee]) => {
            let visible = sets.visible.get(grantee).map(SlotSet::bitmap);
            intersect(visible.as_deref().unwrap_or(&none));
        }
        Some(grantees) => {
            let of_all = grantees.iter().filter_map(|grantee| sets.visible.get(grantee));
            intersect(&of_all.fold(RoaringBitmap::new(), |all, set| all | &*set.bitmap()));
        }
    }
    if !query.statuses.is_empty() {
        let of_status = |rank: i64| usize::try_from(rank).ok().and_then(|rank| sets.statuses.get(rank));
        let of_all = query.statuses.iter().filter_map(|status| of_status(status.rank()));
        intersect(&of_all.fold(RoaringBitmap::new(), |all, set| all | set));
    }
    let flags =
        [(query.template, &sets.templates), (query.enabled, &sets.enabled), (query.pulled, &sets.pulled)];
    for (_, set) in flags.iter().filter(|(wanted, _)| *wanted == Some(true)) {
        intersect(set);
    }
    for (_, set) in flags.iter().filter(|(wanted, _)| *wanted == Some(false)) {
        match &mut found {
            Some(found) => *found -= *set,
            none => *none = Some(&sets.all - *set),
        }
    }
    found
}
