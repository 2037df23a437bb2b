//! The histories of builds, stored in chunks.

use futures_util::TryStreamExt as _;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect};

use super::{Store, builds, entity::build_record, values::from_json};
use crate::{
    build::{BuildId, Excerpt, Record},
    error::Error,
};

impl Store {
    /// Approximate size of one read of a history, in bytes. It returns at least one chunk.
    ///
    /// A watch whose client does not read holds as much.
    const EXCERPT_BYTES: usize = 128 * 1024;

    /// Returns the next records of a build after the one numbered `after`: only a part of a long history.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if there is no such build.
    pub(crate) async fn excerpt(&self, id: BuildId, after: i64) -> Result<Excerpt, Error> {
        let txn = self.read().await?;
        let build = builds::one(&txn, id).await?;
        let mut records: Vec<Record> = Vec::new();
        if after < build.last_sequence {
            // The chunk that holds the next record begins at or before it, so the primary key finds it.
            let first = build_record::Entity::find()
                .select_only()
                .column_as(build_record::Column::FirstSequence.max(), "first")
                .filter(build_record::Column::Build.eq(id))
                .filter(build_record::Column::FirstSequence.lte(after.saturating_add(1)))
                .into_tuple::<Option<i64>>()
                .one(&txn)
                .await?;
            let mut chunks = build_record::Entity::find()
                .filter(build_record::Column::Build.eq(id))
                .filter(build_record::Column::FirstSequence.gte(first.flatten().unwrap_or(after)))
                .order_by_asc(build_record::Column::FirstSequence)
                .stream(&txn)
                .await?;
            let mut bytes = 0;
            while bytes < Self::EXCERPT_BYTES
                && let Some(chunk) = chunks.try_next().await?
            {
                bytes += chunk.json.len();
                let chunk: Vec<Record> = from_json(&chunk.json)?;
                records.extend(chunk.into_iter().filter(|record| record.sequence > after));
            }
        }
        txn.commit().await?;
        Ok(Excerpt { build, records })
    }
}
