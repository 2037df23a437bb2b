//! A set of slots that is compact when small, because there may be a million sets of one slot.

use std::borrow::Cow;

use roaring::RoaringBitmap;

/// A set of slots, in 16 bytes while it has at most one.
#[derive(Debug)]
pub(super) enum SlotSet {
    Empty,
    One(u32),
    List(Box<SlotList>),
    Many(Box<RoaringBitmap>),
}

/// A sorted list of at most [`SlotSet::MOST`] slots.
#[derive(Debug)]
pub(super) struct SlotList(Vec<u32>);

impl SlotSet {
    /// Maximum length of a list. A bitmap takes about 250 bytes from the first slot on.
    const MOST: usize = 16;

    /// Creates a set of one slot.
    pub(super) fn of_one(slot: u32) -> Self {
        Self::One(slot)
    }

    pub(super) fn insert(&mut self, slot: u32) {
        match self {
            Self::Empty => *self = Self::One(slot),
            Self::One(only) if *only == slot => {}
            Self::One(only) => {
                let only = *only;
                *self = Self::List(Box::new(SlotList(vec![only.min(slot), only.max(slot)])));
            }
            Self::List(list) => {
                let Err(at) = list.0.binary_search(&slot) else {
                    return;
                };
                if list.0.len() < Self::MOST {
                    list.0.insert(at, slot);
                } else {
                    let mut many: RoaringBitmap = list.0.iter().copied().collect();
                    many.insert(slot);
                    *self = Self::Many(Box::new(many));
                }
            }
            Self::Many(many) => {
                many.insert(slot);
            }
        }
    }

    pub(super) fn remove(&mut self, slot: u32) {
        match self {
            Self::One(only) if *only == slot => *self = Self::Empty,
            Self::Empty | Self::One(_) => {}
            Self::List(list) => {
                if let Ok(at) = list.0.binary_search(&slot) {
                    list.0.remove(at);
                }
            }
            Self::Many(many) => {
                many.remove(slot);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::One(_) => false,
            Self::List(list) => list.0.is_empty(),
            Self::Many(many) => many.is_empty(),
        }
    }

    /// Returns the set as a bitmap.
    pub(super) fn bitmap(&self) -> Cow<'_, RoaringBitmap> {
        match self {
            Self::Empty => Cow::Owned(RoaringBitmap::new()),
            Self::One(only) => Cow::Owned(RoaringBitmap::from_iter([*only])),
            Self::List(list) => Cow::Owned(list.0.iter().copied().collect()),
            Self::Many(many) => Cow::Borrowed(many),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_set_has_what_was_inserted_and_not_removed() {
        let mut random = fastrand::Rng::with_seed(9);
        assert_eq!(size_of::<SlotSet>(), 16, "a million of them are in memory");
        let mut set = SlotSet::of_one(7);
        let mut model = BTreeSet::from([7]);
        for _ in 0..5_000 {
            let slot = random.u32(0..40);
            // The set grows beyond the maximum of a list, and shrinks again.
            if random.u8(0..10) < if model.len() < 20 { 6 } else { 4 } {
                set.insert(slot);
                model.insert(slot);
            } else {
                set.remove(slot);
                model.remove(&slot);
            }
            assert_eq!(set.is_empty(), model.is_empty());
            assert!(set.bitmap().iter().eq(model.iter().copied()));
        }
    }
}
