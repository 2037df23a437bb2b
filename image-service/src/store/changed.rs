//! What the feed tells: changes, and the images that they are of.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use sea_orm::{ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect};
use uuid::Uuid;

use super::{
    Change, Revision, Store,
    changes::{self, Revisions},
    entity::{change, image},
    grants, rows, texts,
};
use crate::{
    access::{Permissions, Sight, SubjectDigest},
    error::Error,
    image::{Image, ImageId},
    timestamp::Timestamp,
};

/// Who was granted what of an image.
type Grants = Arc<HashMap<SubjectDigest, Permissions>>;

/// The next changes, and the images that they are of, as of one moment.
#[derive(Debug)]
pub(crate) struct Changes {
    /// In the order of their commits.
    pub(crate) changes: Vec<Change>,
    /// Those that exist, whoever may see them; none where none were wanted.
    pub(crate) images: HashMap<ImageId, SharedImage>,
}

/// What is wanted of the images that have changed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum With {
    Images,
    /// What they can be found by, too.
    Texts,
}

/// An image, and to whom it was granted.
#[derive(Clone, Debug)]
pub(crate) struct SharedImage {
    pub(crate) image: Image,
    pub(crate) grants: Grants,
    /// What it can be found by, if that was asked for.
    pub(crate) text: Option<String>,
}

/// The grants of images that have changed, for one who reads every change in turn: they are read again only when a change has
/// been one of them.
#[derive(Debug, Default)]
pub(crate) struct KnownGrants {
    by_image: HashMap<ImageId, Grants>,
    /// Of the images and their grants together.
    count: usize,
}

impl KnownGrants {
    /// How many images and grants are known at most, in some 8 MB: when there would be more, some are forgotten.
    const MOST: usize = 200_000;

    fn learn(&mut self, image: ImageId, grants: Grants) {
        self.forget(image);
        self.count += 1 + grants.len();
        // Whichever comes first: changes that go round more images than are known must still find most of them.
        while self.count > Self::MOST
            && let Some(some) = self.by_image.keys().next().copied()
        {
            self.forget(some);
        }
        self.by_image.insert(image, grants);
    }

    fn forget(&mut self, image: ImageId) {
        self.count -= self.by_image.remove(&image).map_or(0, |grants| 1 + grants.len());
    }
}

impl Store {
    /// The next changes after a revision, and with them the images, if they are wanted when the changes have been read. `known`
    /// are the grants as of that revision. `begins` is called right before the moment that all is read as of.
    pub(crate) async fn changes_after(
        &self,
        revision: i64,
        limit: u64,
        known: &mut KnownGrants,
        begins: impl FnOnce(),
        wanted: impl FnOnce() -> Option<With>,
    ) -> Result<Changes, Error> {
        let txn = self.read().await?;
        begins();
        let changes = next(&txn, revision, limit, known).await?;
        for change in &changes {
            if !change.viewers.is_empty() {
                known.forget(change.image);
            }
        }
        let wanted = wanted();
        // When there may be more changes, the images as they are have them already, and so have the grants.
        let is_all = wanted.is_some() && (changes.len() as u64) < limit;
        let mut of_now = KnownGrants::default();
        let known = if is_all {
            known
        } else {
            *known = KnownGrants::default();
            &mut of_now
        };
        let mut images = HashMap::new();
        if let Some(with) = wanted {
            let ids = changes.iter().map(|change| change.image.0).collect();
            images = read(&txn, &ids, with, known).await?;
        }
        txn.commit().await?;
        Ok(Changes { changes, images })
    }
}

async fn next(
    txn: &DatabaseTransaction,
    revision: i64,
    limit: u64,
    known: &mut KnownGrants,
) -> Result<Vec<Change>, Error> {
    let Revisions { oldest: Revision { number: oldest, .. }, latest } = changes::revisions(txn).await?;
    if latest.number < revision {
        // A database that has lost its last changes goes on with others.
        *known = KnownGrants::default();
    }
    if revision < oldest {
        // What was forgotten meanwhile cannot be told any more.
        return Err(Error::RevisionUnavailable { oldest });
    }
    let found = change::Entity::find()
        .filter(change::Column::Revision.gt(revision))
        .order_by_asc(change::Column::Revision)
        .limit(limit)
        .all(txn)
        .await?;
    let mut changes = Vec::with_capacity(found.len());
    for row in found {
        changes.push(Change {
            revision: Revision { number: row.revision, nonce: row.nonce },
            image: ImageId(row.image),
            creator: row.creator,
            viewers: rows::from_json(&row.viewers_json)?,
            at: Timestamp::from_micros(row.changed_at),
        });
    }
    Ok(changes)
}

async fn read(
    txn: &DatabaseTransaction,
    changed: &BTreeSet<Uuid>,
    with: With,
    known: &mut KnownGrants,
) -> Result<HashMap<ImageId, SharedImage>, DbErr> {
    let found = image::Entity::find()
        .filter(grants::in_sight(&Sight::Everything))
        .filter(image::Column::Id.is_in(changed.iter().copied()))
        .all(txn)
        .await?;
    let ids: Vec<ImageId> = found.iter().map(|row| ImageId(row.id)).collect();
    let mut grants: HashMap<ImageId, Grants> =
        ids.iter().filter_map(|id| Some((*id, Arc::clone(known.by_image.get(id)?)))).collect();
    let unknown: Vec<ImageId> = ids.iter().copied().filter(|id| !grants.contains_key(id)).collect();
    if !unknown.is_empty() {
        let mut read = grants::all(txn, &unknown).await?;
        for id in unknown {
            let of_image = Arc::new(read.remove(&id).unwrap_or_default());
            known.learn(id, Arc::clone(&of_image));
            grants.insert(id, of_image);
        }
    }
    for gone in changed.iter().copied().map(ImageId).filter(|id| !grants.contains_key(id)) {
        known.forget(gone);
    }
    let mut texts = if with == With::Texts { texts::all(txn, &ids).await? } else { HashMap::new() };
    let mut images = HashMap::with_capacity(found.len());
    for row in found {
        let image = rows::image_from_row(row)?;
        let grants = grants.remove(&image.id).unwrap_or_default();
        let text = texts.remove(&image.id);
        images.insert(image.id, SharedImage { image, grants, text });
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_round_a_few_more_grants_than_are_known_finds_most_of_them() {
        let subjects = (0..999).map(|subject| SubjectDigest::of(&subject.to_string()));
        let grants: HashMap<_, _> = subjects.map(|subject| (subject, Permissions::default())).collect();
        let grants: Grants = Arc::new(grants);
        let images: Vec<ImageId> =
            std::iter::repeat_with(ImageId::new).take(KnownGrants::MOST / 1_000 + 5).collect();
        let mut known = KnownGrants::default();
        let mut found = 0;
        for image in images.iter().cycle().take(images.len() * 10) {
            if known.by_image.contains_key(image) {
                found += 1;
            } else {
                known.learn(*image, Arc::clone(&grants));
            }
            assert!(known.count <= KnownGrants::MOST);
            assert_eq!(known.count, known.by_image.len() * 1_000);
        }
        assert!(found > images.len() * 5, "{found} of {}", images.len() * 10);
    }
}
