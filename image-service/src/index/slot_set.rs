//! A set of slots that is small when it has few: there may be a million sets of one.

use std::borrow::Cow;

use roaring::RoaringBitmap;

/// A set of slots.
#[derive(Debug)]
pub(super) enum SlotSet {
    /// Sorted, at most [`MOST`](Self::MOST).
    Few(Vec<u32>),
    Many(Box<RoaringBitmap>),
}

impl SlotSet {
    /// A bitmap takes some 250 bytes from the first slot on.
    const MOST: usize = 16;

    /// Makes a set of one slot.
    pub(super) fn of_one(slot: u32) -> Self {
        Self::Few(vec![slot])
    }

    pub(super) fn insert(&mut self, slot: u32) {
        match self {
            Self::Few(few) => {
                let Err(at) = few.binary_search(&slot) else {
                    return;
                };
                if few.len() < Self::MOST {
                    few.insert(at, slot);
                } else {
                    let mut many: RoaringBitmap = few.iter().copied().collect();
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
            Self::Few(few) => {
                if let Ok(at) = few.binary_search(&slot) {
                    few.remove(at);
                }
            }
            Self::Many(many) => {
                many.remove(slot);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Few(few) => few.is_empty(),
            Self::Many(many) => many.is_empty(),
        }
    }

    /// Returns the set as a bitmap.
    pub(super) fn bitmap(&self) -> Cow<'_, RoaringBitmap> {
        match self {
            Self::Few(few) => Cow::Owned(few.iter().copied().collect()),
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
            // It grows beyond what few are, and shrinks again.
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
