//! All images as of one revision, each in a slot, and the sets of slots that lists filter by.

use std::{collections::HashMap, sync::Arc};

use roaring::RoaringBitmap;

use super::{
    columns::Columns,
    entry::Entry,
    order::UpdateOrder,
    signatures::{BLOCK, Signatures, Trigrams},
    slot_set::SlotSet,
    text::Text,
};
use crate::{
    access::GranteeDigest,
    image::{ImageId, Status},
};

/// The images and their lookup structures. Pure data, to which changes are applied in revision order.
#[derive(Debug, Default)]
pub(super) struct Images {
    /// Number of the load that the images come from. Slots are comparable only within one load.
    pub(super) load: u64,
    entries: Vec<Option<Arc<Entry>>>,
    pub(super) columns: Columns,
    /// The text of the image in each slot.
    texts: Vec<Option<Text>>,
    slots: HashMap<ImageId, u32>,
    free: Vec<u32>,
    pub(super) sets: Sets,
    pub(super) by_update: UpdateOrder,
    pub(super) signatures: Signatures,
    bytes: usize,
}

/// Sets of slots, by property of their images.
#[derive(Debug, Default)]
pub(super) struct Sets {
    pub(super) all: RoaringBitmap,
    /// Images that each grantee can see: those that it created, and those that it was granted.
    pub(super) visible: HashMap<GranteeDigest, SlotSet>,
    pub(super) creators: HashMap<GranteeDigest, SlotSet>,
    /// By [rank](Status::rank) of the status; templates, which have no status, are at index 0.
    pub(super) statuses: [RoaringBitmap; Status::ALL.len() + 1],
    pub(super) templates: RoaringBitmap,
    pub(super) enabled: RoaringBitmap,
    pub(super) pulled: RoaringBitmap,
}

impl Images {
    /// Places images, sorted by ascending update time, in the slots of their indices.
    pub(super) fn new(entries: &[Arc<Entry>], signatures: Signatures) -> Self {
        // A sample of about a thousand is enough to find the common prefixes.
        let columns =
            Columns::for_images(entries.iter().step_by(entries.len() / 1_000 + 1).map(|entry| &**entry));
        let mut images = Self { columns, signatures, ..Self::default() };
        // Exact, because a vector that grows over-allocates by another third.
        images.entries.reserve_exact(entries.len());
        images.texts.reserve_exact(entries.len());
        images.columns.reserve_exact(entries.len());
        images.slots.reserve(entries.len());
        let with_times = entries.iter().zip(0_u32..);
        images.by_update =
            UpdateOrder::sorted(with_times.map(|(entry, slot)| (entry.image.updated_at.micros(), slot)));
        for entry in entries {
            let slot = images.take_slot(entry.image.id);
            images.enter(slot, entry, None);
            images.entries[slot as usize] = Some(Arc::clone(entry));
        }
        images
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Returns one more than the highest slot ever used.
    pub(super) fn slot_count(&self) -> u32 {
        u32::try_from(self.entries.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn get(&self, id: ImageId) -> Option<&Arc<Entry>> {
        self.in_slot(*self.slots.get(&id)?)
    }

    pub(super) fn in_slot(&self, slot: u32) -> Option<&Arc<Entry>> {
        self.entries.get(slot as usize)?.as_ref()
    }

    /// Returns the next images from a slot on, with their slots.
    pub(super) fn ids_from(&self, first: u32, most: u64) -> Vec<(u32, ImageId)> {
        let some = (first..self.slot_count()).filter_map(|slot| Some((slot, self.in_slot(slot)?.image.id)));
        some.take(usize::try_from(most).unwrap_or(usize::MAX)).collect()
    }

    /// Yields slots in small groups, and prefetches the texts of those that will be searched.
    ///
    /// The wait for memory is then paid once per group instead of once per text.
    pub(super) fn read_ahead(
        &self,
        mut slots: impl Iterator<Item = u32>,
        is_searched: impl Fn(u32) -> bool,
    ) -> impl Iterator<Item = u32> {
        const GROUP: usize = 16;
        let mut group = [0; GROUP];
        let (mut next, mut end) = (0, 0);
        std::iter::from_fn(move || {
            if next == end {
                (next, end) = (0, 0);
                for slot in slots.by_ref().take(GROUP) {
                    group[end] = slot;
                    end += 1;
                }
                let searched = group[..end].iter().filter(|slot| is_searched(**slot));
                let first_bytes = searched.filter_map(|slot| Some(self.text(*slot)?.touch()));
                std::hint::black_box(first_bytes.fold(0, |all, byte| all ^ byte));
            }
            let slot = *group[..end].get(next)?;
            next += 1;
            Some(slot)
        })
    }

    /// Returns the text of the image in a slot.
    pub(super) fn text(&self, slot: u32) -> Option<&Text> {
        self.texts.get(slot as usize)?.as_ref()
    }

    /// Iterates over the slots before a position, latest update first; over all slots without one.
    pub(super) fn latest_first(&self, before: Option<(i64, ImageId)>) -> impl Iterator<Item = (i64, u32)> {
        self.by_update.latest_first(before, id_in(&self.entries))
    }

    /// Inserts an image, replacing the one with the same id.
    ///
    /// `trigrams` are those of the new text; `None` if the text is unchanged. Returns a block whose signature
    /// is due to be rebuilt.
    pub(super) fn put(&mut self, entry: Arc<Entry>, trigrams: Option<&Trigrams>) -> Option<u32> {
        let id = entry.image.id;
        let slot = match self.slots.get(&id) {
            Some(slot) => *slot,
            None => self.take_slot(id),
        };
        let before = self.entries[slot as usize].take();
        let mut due = None;
        if let Some(before) = &before {
            self.leave(slot, before);
            if trigrams.is_some() {
                due = self.signatures.remove(slot);
            }
        }
        if let Some(trigrams) = trigrams {
            self.signatures.add(slot, trigrams);
        }
        self.enter(slot, &entry, before.as_deref());
        let position = (entry.image.updated_at.micros(), id);
        self.entries[slot as usize] = Some(entry);
        self.by_update.insert(position, slot, id_in(&self.entries));
        due
    }

    /// Removes an image. Returns a block whose signature is due to be rebuilt.
    pub(super) fn remove(&mut self, id: ImageId) -> Option<u32> {
        let slot = self.slots.remove(&id)?;
        let entry = self.entries[slot as usize].take()?;
        self.leave(slot, &entry);
        self.texts[slot as usize] = None;
        for grantee in grantees(&entry) {
            remove_from(&mut self.sets.visible, grantee, slot);
        }
        remove_from(&mut self.sets.creators, entry.creator, slot);
        self.sets.all.remove(slot);
        self.free.push(slot);
        self.signatures.remove(slot)
    }

    /// Rebuilds the signature of a block.
    pub(super) fn replace_signature(&mut self, block: u32, trigrams: &Trigrams) {
        self.signatures.replace(block, trigrams);
    }

    /// Returns the images in the slots of a block.
    pub(super) fn in_block(&self, block: u32) -> Vec<Arc<Entry>> {
        (block * BLOCK..(block + 1) * BLOCK).filter_map(|slot| self.in_slot(slot).cloned()).collect()
    }

    /// Returns the approximate memory of all images, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes + self.signatures.bytes()
    }

    fn take_slot(&mut self, id: ImageId) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.columns.push();
            self.texts.push(None);
            self.slot_count() - 1
        });
        self.slots.insert(id, slot);
        self.sets.all.insert(slot);
        slot
    }

    /// Removes a slot from the structures that any change may affect, while its entry is taken out.
    fn leave(&mut self, slot: u32, entry: &Arc<Entry>) {
        let position = (entry.image.updated_at.micros(), entry.image.id);
        let entries = &self.entries;
        self.by_update.remove(
            position,
            |other| {
                if other == slot { entry.image.id } else { id_in(entries)(other) }
            },
        );
        self.sets.statuses[rank(entry)].remove(slot);
        self.sets.templates.remove(slot);
        self.sets.enabled.remove(slot);
        self.sets.pulled.remove(slot);
        self.bytes -= entry.size();
    }

    fn enter(&mut self, slot: u32, entry: &Entry, before: Option<&Entry>) {
        self.columns.put(slot, &entry.image);
        self.texts[slot as usize] = Some(entry.text.clone());
        self.sets.statuses[rank(entry)].insert(slot);
        for (set, is_in) in [
            (&mut self.sets.templates, entry.image.template),
            (&mut self.sets.enabled, entry.image.enabled),
            (&mut self.sets.pulled, entry.image.pulled),
        ] {
            if is_in {
                set.insert(slot);
            }
        }
        // Most changes leave the grants, of which there may be a thousand, as they are.
        let is_shared_as_before = before.is_some_and(|before| {
            Arc::ptr_eq(&before.grants, &entry.grants) && before.creator == entry.creator
        });
        if !is_shared_as_before {
            for grantee in before.into_iter().flat_map(grantees) {
                remove_from(&mut self.sets.visible, grantee, slot);
            }
            if let Some(before) = before {
                remove_from(&mut self.sets.creators, before.creator, slot);
            }
            for grantee in grantees(entry) {
                insert_into(&mut self.sets.visible, grantee, slot);
            }
            insert_into(&mut self.sets.creators, entry.creator, slot);
        }
        self.bytes += entry.size();
    }
}

/// Returns a function that maps an occupied slot to the id of its image.
fn id_in(entries: &[Option<Arc<Entry>>]) -> impl Fn(u32) -> ImageId {
    |slot| {
        let entry = entries.get(slot as usize).and_then(Option::as_ref);
        entry.map_or(ImageId(uuid::Uuid::nil()), |entry| entry.image.id)
    }
}

/// Iterates over the grantees that can see an image, except those that can see everything.
fn grantees(entry: &Entry) -> impl Iterator<Item = GranteeDigest> {
    let viewers = entry.grants.iter().filter(|(_, granted)| granted.can_view());
    viewers.map(|(grantee, _)| *grantee).chain([entry.creator])
}

fn rank(entry: &Entry) -> usize {
    entry.image.status.map_or(0, |status| usize::try_from(status.rank()).unwrap_or(0))
}

fn insert_into(sets: &mut HashMap<GranteeDigest, SlotSet>, key: GranteeDigest, slot: u32) {
    sets.entry(key).and_modify(|set| set.insert(slot)).or_insert_with(|| SlotSet::of_one(slot));
}

/// Removes a slot from a set, and removes the set once it is empty.
///
/// Empty sets must not accumulate, because callers choose the names behind the keys.
fn remove_from(sets: &mut HashMap<GranteeDigest, SlotSet>, key: GranteeDigest, slot: u32) {
    if let Some(set) = sets.get_mut(&key) {
        set.remove(slot);
        if set.is_empty() {
            sets.remove(&key);
        }
    }
}
