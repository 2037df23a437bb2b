//! The sort keys of images, in columns by slot. A pass over many images reads these instead of the images.
//!
//! The rank of an image is the first 128 bits of its keys in an order, concatenated. The images themselves
//! are compared only if their ranks are equal.

use std::collections::BTreeMap;

use super::entry::Entry;
use crate::{
    image::{Direction, Image, ImageId, Key, KeyValue, Order, Position, Status},
    search::fold,
    timestamp::Timestamp,
};

/// The sort keys of the image in each slot, or of its last image if the slot is free.
#[derive(Debug, Default)]
pub(super) struct Columns {
    updated_at: Vec<Timestamp>,
    created_at: Vec<Timestamp>,
    flags: Vec<Flags>,
    /// The first halves of the ids.
    ids: Vec<u64>,
    names: TextColumn,
    creators: TextColumn,
    references: TextColumn,
}

#[derive(Copy, Clone, Debug, Default)]
struct Flags {
    status: u8,
    enabled: bool,
    pulled: bool,
}

/// The first bytes of texts after a prefix that most of them share. Texts contain no NUL.
#[derive(Debug, Default)]
struct TextColumn {
    common: String,
    bytes: Vec<u128>,
}

/// A key as left-aligned bits that sort like the key.
#[derive(Copy, Clone, Debug)]
struct Bits {
    bits: u128,
    width: u32,
}

impl Columns {
    /// Creates columns without slots, tuned to a sample of the images.
    pub(super) fn for_images<'a>(sample: impl Iterator<Item = &'a Entry>) -> Self {
        let sample: Vec<&Image> = sample.map(|entry| &entry.image).collect();
        let column =
            |text: fn(&Image) -> String| TextColumn::for_texts(sample.iter().map(|image| text(image)));
        Self {
            names: column(|image| fold(&image.name)),
            creators: column(|image| image.creator.clone()),
            references: column(|image| image.current_reference().to_string()),
            ..Self::default()
        }
    }

    /// Reserves room for exactly `slots` more slots.
    pub(super) fn reserve_exact(&mut self, slots: usize) {
        self.updated_at.reserve_exact(slots);
        self.created_at.reserve_exact(slots);
        self.flags.reserve_exact(slots);
        self.ids.reserve_exact(slots);
        for column in [&mut self.names, &mut self.creators, &mut self.references] {
            column.bytes.reserve_exact(slots);
        }
    }

    /// Appends a slot.
    pub(super) fn push(&mut self) {
        self.updated_at.push(Timestamp::from_micros(0));
        self.created_at.push(Timestamp::from_micros(0));
        self.flags.push(Flags::default());
        self.ids.push(0);
        for column in [&mut self.names, &mut self.creators, &mut self.references] {
            column.bytes.push(0);
        }
    }

    /// Stores the sort keys of an image in its slot.
    pub(super) fn put(&mut self, slot: u32, image: &Image) {
        let at = slot as usize;
        self.updated_at[at] = image.updated_at;
        self.created_at[at] = image.created_at;
        self.flags[at] = Flags { status: rank(image.status), enabled: image.enabled, pulled: image.pulled };
        self.ids[at] = first_half(image.id);
        self.names.bytes[at] = self.names.rank(&fold(&image.name));
        self.creators.bytes[at] = self.creators.rank(&image.creator);
        self.references.bytes[at] = self.references.rank(&image.current_reference().to_string());
    }

    /// Returns the rank of the image in a slot; different ranks sort like their images.
    pub(super) fn rank(&self, order: &Order, slot: u32) -> u128 {
        let at = slot as usize;
        let keys = order.keys().iter().map(|(key, direction)| {
            let bits = match key {
                Key::Name => Bits::of_text(self.names.bytes[at]),
                Key::Creator => Bits::of_text(self.creators.bytes[at]),
                Key::ImageName => Bits::of_text(self.references.bytes[at]),
                Key::Status => Bits::of_status(self.flags[at].status),
                Key::Enabled => Bits::of_flag(self.flags[at].enabled),
                Key::Pulled => Bits::of_flag(self.flags[at].pulled),
                Key::CreateTime => Bits::of_time(self.created_at[at].micros()),
                Key::UpdateTime => Bits::of_time(self.updated_at[at].micros()),
            };
            (bits, *direction)
        });
        joined(keys, self.ids[at])
    }

    /// Returns the rank of a position that [fits](Order::fits) the order.
    pub(super) fn rank_of_position(&self, order: &Order, position: &Position) -> u128 {
        let keys = order.keys().iter().zip(&position.keys).map(|((key, direction), value)| {
            let bits = match (key, value) {
                (Key::Name, KeyValue::Text(text)) => Bits::of_text(self.names.rank(text)),
                (Key::Creator, KeyValue::Text(text)) => Bits::of_text(self.creators.rank(text)),
                (Key::ImageName, KeyValue::Text(text)) => Bits::of_text(self.references.rank(text)),
                (Key::Status, KeyValue::Number(rank)) => {
                    Bits::of_status(u8::try_from(*rank).unwrap_or(u8::MAX))
                }
                (Key::Enabled | Key::Pulled, KeyValue::Number(flag)) => Bits::of_flag(*flag != 0),
                (Key::CreateTime | Key::UpdateTime, KeyValue::Number(time)) => Bits::of_time(*time),
                // The position does not fit the order.
                (_, KeyValue::Text(_) | KeyValue::Number(_)) => Bits { bits: 0, width: u128::BITS },
            };
            (bits, *direction)
        });
        joined(keys, first_half(position.id))
    }
}

impl TextColumn {
    const FIRST: u128 = 1 << (u128::BITS - 1);

    /// Creates an empty column for texts like the sample.
    ///
    /// The prefix shared by half of the texts is stripped, because it says little about their order.
    fn for_texts(sample: impl Iterator<Item = String>) -> Self {
        let mut like: Vec<String> = sample.collect();
        let half = like.len().div_ceil(2);
        let mut common = String::new();
        while !like.is_empty() {
            let mut counts = BTreeMap::<char, usize>::new();
            for next in like.iter().filter_map(|text| text[common.len()..].chars().next()) {
                *counts.entry(next).or_default() += 1;
            }
            match counts.into_iter().max_by_key(|(_, count)| *count) {
                Some((next, count)) if count >= half => common.push(next),
                Some(_) | None => break,
            }
            like.retain(|text| text.starts_with(&common));
        }
        Self { common, bytes: Vec::new() }
    }

    /// Returns the first bytes of a text after the common prefix, below a bit that is set.
    ///
    /// A text without the prefix ranks before or after all texts with it.
    fn rank(&self, text: &str) -> u128 {
        match text.strip_prefix(&*self.common) {
            Some(rest) => {
                let mut bytes = [0; size_of::<u128>()];
                let length = rest.len().min(bytes.len());
                bytes[..length].copy_from_slice(&rest.as_bytes()[..length]);
                u128::from_be_bytes(bytes) >> 1 | Self::FIRST
            }
            None if *text < *self.common => 0,
            None => u128::MAX,
        }
    }
}

impl Bits {
    /// Creates the bits of the [rank](TextColumn::rank) of a text.
    ///
    /// A text that fits as a whole ends with a zero, which is less than any continuation. After a text that
    /// does not fit, no further key counts, because the rest of the text takes precedence.
    fn of_text(rank: u128) -> Self {
        let width = match rank.checked_ilog2() {
            Some(127) => {
                let used = u128::BITS - 1 - rank.trailing_zeros();
                (1 + used.next_multiple_of(u8::BITS) + u8::BITS).min(u128::BITS)
            }
            Some(_) | None => u128::BITS,
        };
        Self { bits: rank, width }
    }

    fn of_status(rank: u8) -> Self {
        Self { bits: u128::from(rank) << (u128::BITS - u8::BITS), width: u8::BITS }
    }

    fn of_flag(flag: bool) -> Self {
        Self { bits: u128::from(flag) << (u128::BITS - 1), width: 1 }
    }

    fn of_time(micros: i64) -> Self {
        // With the sign bit flipped, the bits sort like the numbers.
        let sorted = micros.cast_unsigned() ^ 1 << (i64::BITS - 1);
        Self { bits: u128::from(sorted) << (u128::BITS - i64::BITS), width: i64::BITS }
    }
}

/// Concatenates the bits of keys, followed by those of the id, as far as there is room.
fn joined(keys: impl Iterator<Item = (Bits, Direction)>, id: u64) -> u128 {
    let (mut joined, mut used) = (0, 0);
    for (Bits { bits, width }, direction) in keys {
        let bits = match direction {
            Direction::Ascending => bits,
            Direction::Descending => !bits & u128::MAX << (u128::BITS - width),
        };
        joined |= bits >> used;
        used += width;
        if used >= u128::BITS {
            return joined;
        }
    }
    joined | (u128::from(id) << (u128::BITS - u64::BITS)) >> used
}

fn rank(status: Option<Status>) -> u8 {
    u8::try_from(status.map_or(0, Status::rank)).unwrap_or(u8::MAX)
}

fn first_half(id: ImageId) -> u64 {
    id.0.as_u64_pair().0
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;
    use crate::{image::Reference, index::tests::some_entry};

    #[test]
    fn ranks_are_in_the_order_of_the_images() {
        let mut random = fastrand::Rng::with_seed(3);
        let names =
            ["", "a", "team workspace", "team workspace 1", "team workspace 11", "team workspace 12", "z"];
        let entries: Vec<Entry> = (0..300)
            .map(|number| {
                let (mut read, _) = some_entry(&mut random, number);
                read.image.name = names[random.usize(0..names.len())].to_owned();
                let repository =
                    ["trailer/team/long-name", "trailer/team/long-names", "other/x"][random.usize(0..3)];
                let tag = ["latest", "", "v1"][random.usize(0..3)];
                read.image.reference = Reference::from_stored(repository.to_owned(), tag.to_owned());
                Entry::new(read, None)
            })
            .collect();
        let mut columns = Columns::for_images(entries.iter());
        for (entry, slot) in entries.iter().zip(0..) {
            columns.push();
            columns.put(slot, &entry.image);
        }
        for order in [
            "",
            "name",
            "name desc, update_time",
            "creator, image_name",
            "status desc, name",
            "image_name desc, creator",
            "enabled, pulled desc, create_time",
            "create_time desc",
            "update_time",
        ] {
            let order = Order::parse(order).expect("it is an order");
            let mut distinguished = 0;
            for (a, a_slot) in entries.iter().zip(0..) {
                let rank = columns.rank(&order, a_slot);
                assert_eq!(columns.rank_of_position(&order, &order.position_of(&a.image)), rank, "{order:?}");
                for (b, b_slot) in entries.iter().zip(0..) {
                    let by_rank = rank.cmp(&columns.rank(&order, b_slot));
                    assert!(by_rank.is_eq() || by_rank == order.compare(&a.image, &b.image), "{order:?}");
                    distinguished += usize::from(by_rank != Ordering::Equal);
                }
            }
            assert!(distinguished > 60_000, "{order:?}: only {distinguished} of 90,000");
        }
    }
}
