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
    /// Maximum size of the archives per uploader, in bytes; `None` for no limit.
    pub(crate) context_bytes: Option<u64>,
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
    /// Size of the archives that the creator has uploaded, in bytes.
    pub(crate) context_bytes: i64,
}

/// The usage that a write adds; negative if it releases some.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UsageChange {
    pub(crate) images: i64,
    pub(crate) bytes: i64,
    pub(crate) context_bytes: i64,
    /// Size of remembered answers, which have no quota: the oldest ones are forgotten instead.
    pub(crate) answer_bytes: i64,
}

impl UsageChange {
    /// Reports whether something is added that a caller keeps.
    pub(crate) fn adds(self) -> bool {
        self.images > 0 || self.bytes > 0 || self.context_bytes > 0
    }

    /// Returns the usage of a new image that takes this memory in the index.
    pub(crate) fn of_image(bytes: i64) -> Self {
        Self { images: 1, bytes, ..Self::default() }
    }

    /// Returns the usage that the deletion of an image releases.
    pub(crate) fn of_deleted_image(bytes: i64) -> Self {
        Self { images: -1, bytes: -bytes, ..Self::default() }
    }

    /// Returns the usage of an image that takes so much more memory in the index.
    pub(crate) fn of_bytes(bytes: i64) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// Returns the usage of an archive's next bytes.
    pub(crate) fn of_context(context_bytes: i64) -> Self {
        Self { context_bytes, ..Self::default() }
    }

    /// Returns the usage of remembered answers of this size.
    pub(crate) fn of_answers(answer_bytes: i64) -> Self {
        Self { answer_bytes, ..Self::default() }
    }
}

impl Quotas {
    /// No limits, for tests.
    pub(crate) const UNLIMITED: Self =
        Self { index_memory: u64::MAX, images: None, bytes: None, context_bytes: None };

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
            (CreatorQuota::ContextBytes, used.context_bytes, added.context_bytes, self.context_bytes),
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

    const QUOTAS: Quotas =
        Quotas { index_memory: 1_000, images: Some(3), bytes: Some(400), context_bytes: Some(50) };

    /// Returns the outcome of adding to the usage, both in the order of the fields.
    fn outcome(quotas: Quotas, used: (i64, i64, i64), added: (i64, i64)) -> &'static str {
        let after = Usage {
            catalogue_bytes: used.0.saturating_add(added.1),
            creator_images: used.1.saturating_add(added.0),
            creator_bytes: used.2.saturating_add(added.1),
            context_bytes: 0,
        };
        match quotas.admit(after, UsageChange { images: added.0, bytes: added.1, ..UsageChange::default() }) {
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
    fn archives_have_a_quota_of_their_own() {
        let admits = |context_bytes, added| {
            let used =
                Usage { catalogue_bytes: 5_000, creator_images: 9, creator_bytes: 5_000, context_bytes };
            QUOTAS.admit(used, UsageChange { context_bytes: added, ..UsageChange::default() })
        };
        assert!(admits(50, 50).is_ok() && admits(60, -1).is_ok());
        let refused = admits(51, 1).expect_err("one byte too many");
        let quota = CreatorQuota::ContextBytes;
        assert!(
            matches!(refused, Error::CreatorQuotaExceeded { quota: refused, limit: 50 } if refused == quota)
        );
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
