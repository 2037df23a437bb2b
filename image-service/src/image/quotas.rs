//! Limits on the size of the catalogue, so that the index of all images can always be loaded again.

use crate::error::{CreatorQuota, Error};

/// The limits of the catalogue, and those of each creator.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Quotas {
    /// Maximum size of the index, in bytes.
    pub(crate) index_memory: u64,
    /// Maximum number of images per creator; `None` for no limit.
    pub(crate) images: Option<u64>,
    /// Maximum size per creator in the index, in bytes; `None` for no limit.
    pub(crate) bytes: Option<u64>,
}

/// The usage of the catalogue after a write.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Usage {
    /// Size of all images in the index, in bytes.
    pub(crate) catalogue_bytes: i64,
    /// Number of images of the creator whose image is written.
    pub(crate) creator_images: i64,
    /// Size of these images in the index, in bytes.
    pub(crate) creator_bytes: i64,
}

/// The usage that a write adds; negative if it releases some.
#[derive(Copy, Clone, Debug)]
pub(crate) struct UsageChange {
    pub(crate) images: i64,
    pub(crate) bytes: i64,
}

impl Quotas {
    /// No limits, for tests.
    pub(crate) const UNLIMITED: Self = Self { index_memory: u64::MAX, images: None, bytes: None };

    /// Checks that there is room for a write. A write that adds nothing always has room, because a quota may
    /// have been lowered.
    ///
    /// # Errors
    ///
    /// Returns [`Error::CreatorQuotaExceeded`] if the creator would exceed a quota, and
    /// [`Error::CatalogueFull`] if the index would exceed its limit.
    pub(crate) fn admit(&self, used: Usage, added: UsageChange) -> Result<(), Error> {
        let exceeds = |used: i64, added: i64, limit: u64| {
            added > 0 && u64::try_from(used).is_ok_and(|used| used > limit)
        };
        let of_creator = [
            (CreatorQuota::Images, used.creator_images, added.images, self.images),
            (CreatorQuota::Bytes, used.creator_bytes, added.bytes, self.bytes),
        ];
        for (quota, used, added, limit) in of_creator {
            if let Some(limit) = limit.filter(|&limit| exceeds(used, added, limit)) {
                return Err(Error::CreatorQuotaExceeded { quota, limit });
            }
        }
        if exceeds(used.catalogue_bytes, added.bytes, self.index_memory) {
            return Err(Error::CatalogueFull);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTAS: Quotas = Quotas { index_memory: 1_000, images: Some(3), bytes: Some(400) };

    /// Returns the outcome of adding to the usage, both in the order of the fields.
    fn outcome(quotas: Quotas, used: (i64, i64, i64), added: (i64, i64)) -> &'static str {
        let after = Usage {
            catalogue_bytes: used.0.saturating_add(added.1),
            creator_images: used.1.saturating_add(added.0),
            creator_bytes: used.2.saturating_add(added.1),
        };
        match quotas.admit(after, UsageChange { images: added.0, bytes: added.1 }) {
            Ok(()) => "admitted",
            Err(Error::CreatorQuotaExceeded { quota: CreatorQuota::Images, limit: 3 }) => "images",
            Err(Error::CreatorQuotaExceeded { quota: CreatorQuota::Bytes, limit: 400 }) => "bytes",
            Err(Error::CatalogueFull) => "full",
            Err(error) => panic!("{error:?}"),
        }
    }

    #[test]
    fn a_write_within_every_quota_is_admitted() {
        for (used, added, expected) in [
            ((0, 0, 0), (1, 400), "admitted"),
            ((600, 2, 0), (1, 400), "admitted"),
            ((600, 3, 0), (1, 1), "images"),
            ((600, 2, 0), (1, 401), "bytes"),
            ((0, 0, 400), (0, 1), "bytes"),
            ((601, 2, 0), (1, 400), "full"),
            // The creator's quota is reported, because the creator can do something about that.
            ((1_000, 3, 400), (1, 1), "images"),
            ((i64::MAX, 0, 0), (1, i64::MAX), "bytes"),
        ] {
            assert_eq!(outcome(QUOTAS, used, added), expected, "{used:?} {added:?}");
        }
    }

    #[test]
    fn a_write_that_adds_nothing_is_admitted_beyond_the_quotas() {
        assert_eq!(outcome(QUOTAS, (5_000, 9, 5_000), (0, 0)), "admitted");
        assert_eq!(outcome(QUOTAS, (5_000, 9, 5_000), (-1, -400)), "admitted");
    }

    #[test]
    fn quotas_of_any_number_refuse_nothing() {
        assert_eq!(outcome(Quotas::UNLIMITED, (1 << 40, 1 << 40, 1 << 40), (1 << 40, 1 << 40)), "admitted");
    }
}
