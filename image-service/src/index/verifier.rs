//! A slow, continuous comparison of the index with the database. Differences are logged, counted and
//! repaired.
//!
//! There are none unless a row was changed without an entry in the change log, or the index has a bug.

use std::{error::Error as _, sync::Arc, time::Duration};

use opentelemetry::metrics::Counter;
use tokio::{sync::mpsc, time::sleep};
use uuid::Uuid;

use super::{
    Index,
    batch::{IndexEvent, Repair},
    entry::Entry,
};
use crate::{
    change::Revision,
    error::Error,
    image::{CatalogueEntry, ImageId},
};

/// Number of images compared at once.
const AT_ONCE: u64 = 50;
/// Interval between comparisons.
const EVERY: Duration = Duration::from_secs(1);

/// Images that may differ from the database, to be checked by the follower.
pub(super) type Suspects = Vec<ImageId>;

/// The progress of the comparison: by id in the database, and by slot in the index.
#[derive(Debug)]
struct Cursor {
    after: ImageId,
    slot: u32,
}

impl Index {
    /// Compares the index with the database forever, and reports differences to the follower.
    pub(super) async fn verify(&self, suspects: mpsc::Sender<Suspects>) {
        let mut cursor = Cursor { after: ImageId(Uuid::nil()), slot: 0 };
        loop {
            sleep(EVERY).await;
            match self.find_suspects(&mut cursor).await {
                Ok(found) if found.is_empty() => {}
                // The channel is full while the follower checks other suspects; these are found again.
                Ok(found) => drop(suspects.try_send(found)),
                Err(error) => {
                    tracing::warn!(%error, source = ?error.source(), "cannot compare the index with the database");
                }
            }
        }
    }

    async fn find_suspects(&self, cursor: &mut Cursor) -> Result<Suspects, Error> {
        let store = &self.0.store;
        let (read, last) = store.records(cursor.after, ImageId(Uuid::max()), AT_ONCE).await?;
        cursor.after = last.unwrap_or(ImageId(Uuid::nil()));
        let mut suspects: Suspects = read.into_iter().filter_map(|read| self.differs(read)).collect();
        let held = self.images().ids_from(cursor.slot, AT_ONCE);
        cursor.slot = held.last().map_or(0, |(slot, _)| slot + 1);
        let held: Vec<ImageId> = held.into_iter().map(|(_, id)| id).collect();
        let (_, exist) = store.records_of(&held).await?;
        suspects.extend(held.iter().filter(|id| !exist.iter().any(|read| read.image.id == **id)));
        Ok(suspects)
    }

    /// Returns the id of an image if the index holds it differently from `read`.
    fn differs(&self, read: CatalogueEntry) -> Option<ImageId> {
        let id = read.image.id;
        let entry = Entry::new(read, None);
        let is_same = self.entry(id).is_some_and(|known| known.is_same(&entry));
        (!is_same).then_some(id)
    }

    /// Checks suspects again as of the index's own revision, and repairs those that differ.
    ///
    /// Only the follower may call this.
    pub(super) async fn repair(
        &self,
        suspects: &[ImageId],
        at: Revision,
        differences: &Counter<u64>,
    ) -> Result<(), Error> {
        let (read_at, read) = self.0.store.records_of(suspects).await?;
        if read_at != at {
            // The database has changed meanwhile; the images are compared again in the next round.
            return Ok(());
        }
        let mut differing = Vec::new();
        for id in suspects {
            let read = read.iter().find(|read| read.image.id == *id);
            let differs = match read {
                Some(read) => self.differs(read.clone()).is_some(),
                None => self.entry(*id).is_some(),
            };
            if differs {
                tracing::error!(image = %id, revision = at.number, "repaired a difference between the index and the database");
                differing.push((*id, read.cloned()));
            }
        }
        differences.add(differing.len() as u64, &[]);
        let ids: Vec<ImageId> = differing.iter().map(|(id, _)| *id).collect();
        let before: Vec<_> = ids.iter().map(|id| self.entry(*id)).collect();
        self.put(differing);
        let repairs = ids.into_iter().zip(before);
        let repairs: Arc<[Repair]> =
            repairs.map(|(id, before)| Repair { id, before, entry: self.entry(id) }).collect();
        if !repairs.is_empty() {
            // There may be no subscribers.
            let _ = self.0.events.send(IndexEvent::Repaired(repairs));
        }
        Ok(())
    }
}
