//! A set of slots that is compact when small, because there may be a million sets of one slot.

use std::borrow::Cow;

use roaring::RoaringBitmap;

/// A set of slots.
#[derive(Debug)]
pub(super) enum SlotSet {
    /// Sorted list of at most [`MOST`](Self::MOST) slots.
    Small(Vec<u32>),
    Many(Box<RoaringBitmap>),
}

impl SlotSet {
    /// Maximum length of the list. A bitmap takes about 250 bytes from the first slot on.
    const MOST: usize = 16;

    /// Creates a set of one slot.
    pub(super) fn of_one(slot: u32) -> Self {
        Self::Small(vec![slot])
    }

    pub(super) fn insert(&mut self, slot: u32) {
        match self {
            Self::Small(slots) => {
                let Err(at) = slots.binary_search(&slot) else {
                    return;
                };
                if slots.len() < Self::MOST {
                    slots.insert(at, slot);
                } else {
                    let mut many: RoaringBitmap = slots.iter().copied().collect();
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
            Self::Small(slots) => {
                if let Ok(at) = slots.binary_search(&slot) {
                    slots.remove(at);
                }
            }
            Self::Many(many) => {
                many.remove(slot);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Small(slots) => slots.is_empty(),
            Self::Many(many) => many.is_empty(),
        }
    }

    /// Returns the set as a bitmap.
    pub(super) fn bitmap(&self) -> Cow<'_, RoaringBitmap> {
        match self {
            Self::Small(slots) => Cow::Owned(slots.iter().copied().collect()),
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
