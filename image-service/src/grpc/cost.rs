//! The cost of a call, in units of `--max-call-rate`: a plain call costs one.
//!
//! The first unit is charged at authentication, before the message is read. The cost beyond it is known from
//! the message, and [`Callers::admit_cost`](super::caller_limits::Callers::admit_cost) charges it before the
//! handler does any work. Searched text is charged afterwards.

use crate::image::View;

/// Cost of a watch with a term, which is searched for in every image that changes.
const SEARCHING_WATCH: u32 = 10;
const BYTES_A_UNIT: usize = 16 * 1024;
const TARGETS_A_UNIT: usize = 10;
const SCANNED_BYTES_A_UNIT: u64 = 1024 * 1024;

/// Returns the cost of a call that stores or renders the content of its message.
pub(super) fn of_message(bytes: usize) -> u32 {
    plain_and(bytes / BYTES_A_UNIT)
}

/// Returns the cost of a batch, which is the same with `validate_only`.
pub(super) fn of_batch(targets: usize) -> u32 {
    plain_and(targets / TARGETS_A_UNIT)
}

/// Returns the cost of a page of at most `size` images.
pub(super) fn of_page(size: u64, view: View) -> u32 {
    let images_a_unit = match view {
        View::Basic => 100,
        View::Full => 10,
    };
    plain_and(usize::try_from(size / images_a_unit).unwrap_or(usize::MAX))
}

/// Returns the cost of opening a watch, with or without a search term.
pub(super) fn of_watch(searches: bool) -> u32 {
    if searches { SEARCHING_WATCH } else { 1 }
}

/// Returns the charge for searched text, in addition to the cost of the call.
pub(super) fn of_scan(bytes: u64) -> u32 {
    u32::try_from(bytes / SCANNED_BYTES_A_UNIT).unwrap_or(u32::MAX)
}

fn plain_and(units: usize) -> u32 {
    u32::try_from(units).unwrap_or(u32::MAX).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_costs_what_it_asks_for() {
        for (bytes, cost) in
            [(0, 1), (16 * 1024 - 1, 1), (16 * 1024, 2), (256 * 1024, 17), (usize::MAX, u32::MAX)]
        {
            assert_eq!(of_message(bytes), cost, "{bytes} bytes");
        }
        for (targets, cost) in [(0, 1), (1, 1), (10, 2), (1_000, 101)] {
            assert_eq!(of_batch(targets), cost, "{targets} targets");
        }
        for (size, basic, full) in [(1, 1, 1), (50, 1, 6), (100, 2, 11), (1_000, 11, 101)] {
            assert_eq!(
                (of_page(size, View::Basic), of_page(size, View::Full)),
                (basic, full),
                "{size} images"
            );
        }
        assert_eq!((of_watch(false), of_watch(true)), (1, 10));
        assert_eq!((of_scan(1 << 19), of_scan(64 << 20), of_scan(u64::MAX)), (0, 64, u32::MAX));
    }
}
