//! Slots ordered by the last updates of their images.

use std::cmp::{Ordering, Reverse};

use crate::image::ImageId;

/// A position in the order: an update time, and the id of an image.
///
/// Among equal times the higher id comes first, so that the reversed order is latest update first, then
/// ascending id.
pub(super) type UpdatePosition = (i64, ImageId);

/// A sorted list of slots, split into runs so that a change moves few of them.
#[derive(Debug, Default)]
pub(super) struct UpdateOrder {
    /// Non-empty runs that together form one sorted list.
    runs: Vec<Vec<(i64, u32)>>,
}

impl UpdateOrder {
    const MAX_RUN: usize = 512;

    /// Builds the order from sorted slots and their times.
    pub(super) fn sorted(slots: impl IntoIterator<Item = (i64, u32)>) -> Self {
        let mut runs: Vec<Vec<(i64, u32)>> = Vec::new();
        for slot in slots {
            match runs.last_mut() {
                Some(last) if last.len() < Self::MAX_RUN / 2 => last.push(slot),
                _ => runs.push(vec![slot]),
            }
        }
        Self { runs }
    }

    /// Inserts a slot; `id_of` returns the id of the image in a slot.
    pub(super) fn insert(&mut self, position: UpdatePosition, slot: u32, id_of: impl Fn(u32) -> ImageId) {
        let (run, at) = self.find(position, &id_of);
        match self.runs.get_mut(run) {
            None => match self.runs.last_mut() {
                Some(last) if last.len() < Self::MAX_RUN => last.push((position.0, slot)),
                _ => self.runs.push(vec![(position.0, slot)]),
            },
            Some(found) => {
                found.insert(at, (position.0, slot));
                if found.len() > Self::MAX_RUN {
                    let upper = found.split_off(Self::MAX_RUN / 2);
                    self.runs.insert(run + 1, upper);
                }
            }
        }
    }

    /// Removes the slot at a position.
    pub(super) fn remove(&mut self, position: UpdatePosition, id_of: impl Fn(u32) -> ImageId) {
        let (run, at) = self.find(position, &id_of);
        let Some(found) = self.runs.get_mut(run) else {
            return;
        };
        found.remove(at);
        let left = found.len();
        if left == 0 {
            self.runs.remove(run);
        } else if left < Self::MAX_RUN / 4
            && self.runs.get(run + 1).is_some_and(|next| left + next.len() <= Self::MAX_RUN / 2)
        {
            let next = self.runs.remove(run + 1);
            self.runs[run].extend(next);
        }
    }

    /// Iterates over the slots before a position, latest update first; over all slots without one.
    pub(super) fn latest_first(
        &self,
        before: Option<UpdatePosition>,
        id_of: impl Fn(u32) -> ImageId,
    ) -> impl Iterator<Item = (i64, u32)> {
        let (run, at) = before.map_or((self.runs.len(), 0), |position| self.find(position, &id_of));
        let part = self.runs.get(run).map_or(&[][..], |found| &found[..at]);
        part.iter().rev().chain(self.runs[..run].iter().rev().flat_map(|run| run.iter().rev())).copied()
    }

    /// Finds the first slot that is not before a position, as a run and an index into it.
    fn find(&self, position: UpdatePosition, id_of: &impl Fn(u32) -> ImageId) -> (usize, usize) {
        let is_before = |(time, slot): &(i64, u32)| {
            time.cmp(&position.0).then_with(|| Reverse(id_of(*slot)).cmp(&Reverse(position.1)))
                == Ordering::Less
        };
        let run = self.runs.partition_point(|run| run.last().is_some_and(is_before));
        (run, self.runs.get(run).map_or(0, |found| found.partition_point(is_before)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use uuid::Uuid;

    use super::*;

    #[test]
    fn slots_are_in_the_order_of_updates_whatever_was_inserted_and_removed() {
        let mut random = fastrand::Rng::with_seed(3);
        let ids: Vec<ImageId> = (0..3_000).map(|_| ImageId(Uuid::from_u128(random.u128(..)))).collect();
        let id_of = |slot: u32| ids[slot as usize];
        let mut order = UpdateOrder::default();
        let mut model: BTreeMap<(i64, Reverse<ImageId>), u32> = BTreeMap::new();
        let mut times: Vec<Option<i64>> = vec![None; ids.len()];
        for round in 0..20_000_i64 {
            let slot = random.u32(0..3_000);
            let id = id_of(slot);
            if let Some(time) = times[slot as usize].take() {
                order.remove((time, id), id_of);
                model.remove(&(time, Reverse(id)));
            }
            if random.u8(0..5) > 0 {
                // Mostly ascending, and often equal.
                let time = if random.bool() { round / 10 } else { random.i64(0..2_000) };
                order.insert((time, id), slot, id_of);
                model.insert((time, Reverse(id)), slot);
                times[slot as usize] = Some(time);
            }
            if round % 997 == 0 {
                let position = (random.i64(0..2_000), id_of(random.u32(0..3_000)));
                let before: Vec<u32> =
                    order.latest_first(Some(position), id_of).map(|(_, slot)| slot).collect();
                let expected: Vec<u32> =
                    model.range(..(position.0, Reverse(position.1))).rev().map(|(_, slot)| *slot).collect();
                assert_eq!(before, expected);
            }
        }
        let all: Vec<u32> = order.latest_first(None, id_of).map(|(_, slot)| slot).collect();
        assert_eq!(all, model.into_values().rev().collect::<Vec<_>>());
    }
}
