//! Reads for the index: all images at the start, and those that have changed later.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
};

use sea_orm::{
    ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, FromQueryResult, QueryResult, Statement, Value,
};

use super::{Store, begin_to_read, change_log, entity::image, values::from_json};
use crate::{
    access::{GranteeDigest, Permissions},
    change::{Change, ChangeKind, Revision, Revisions},
    error::Error,
    image::{CatalogueEntry, Configuration, Image, ImageId, search_text},
};

/// The next changes and the images that they are of, from one snapshot.
#[derive(Debug)]
pub(crate) struct ChangedRecords {
    /// Changes in commit order.
    pub(crate) changes: Vec<Change>,
    /// Changed images that still exist.
    pub(crate) images: HashMap<ImageId, CatalogueEntry>,
}

/// The optional parts of an image to read.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Parts {
    grants: bool,
    text: bool,
}

impl Store {
    /// Returns the next images after an id, up to and including `until`, in the order of their ids, and the
    /// last of these ids.
    ///
    /// An image that cannot be read is left out, but counts for the limit and for the last id.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn records(
        &self,
        after: ImageId,
        until: ImageId,
        limit: u64,
    ) -> Result<(Vec<CatalogueEntry>, Option<ImageId>), Error> {
        let all = Parts { grants: true, text: true };
        let sql = select(self.backend(), all)
            + " WHERE i.id > $1 AND i.id <= $2 AND NOT i.deleted ORDER BY i.id LIMIT $3";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let values = [Value::from(after), until.into(), limit.into()];
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        let rows = self.index_reader.query_all_raw(statement).await?;
        let last = rows.last().map(|row| row.try_get("", "id")).transpose()?;
        Ok((readable(&rows, all), last))
    }

    /// Returns those of the images that exist, and the revision of the snapshot that they are from.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn records_of(&self, ids: &[ImageId]) -> Result<(Revision, Vec<CatalogueEntry>), Error> {
        let txn = begin_to_read(&self.index_reader).await?;
        let at = change_log::revisions(&txn).await?.latest;
        let records = with_ids(&txn, Parts { grants: true, text: true }, ids).await?;
        txn.commit().await?;
        Ok((at, records))
    }

    /// Returns ids, in order, that divide all images into `parts` ranges of about equal size.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn divide_records(&self, parts: u64) -> Result<Vec<ImageId>, Error> {
        let number = |sql: String| async move {
            self.index_reader.query_one_raw(Statement::from_string(self.backend(), sql)).await
        };
        let row = number("SELECT COUNT(*) FROM images".to_owned()).await?;
        let count: i64 = row.map_or(Ok(0), |row| row.try_get_by_index(0))?;
        let part = u64::try_from(count).unwrap_or(0) / parts;
        let mut divisions = Vec::new();
        for place in (1..parts).map(|number| number * part).filter(|place| *place > 0) {
            let sql = format!("SELECT id FROM images ORDER BY id LIMIT 1 OFFSET {place}");
            if let Some(row) = number(sql).await? {
                divisions.push(row.try_get_by_index(0)?);
            }
        }
        Ok(divisions)
    }

    /// Returns the next changes and their images. Of an image that `is_known`, only the changed parts are
    /// read.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RevisionUnavailable`] if this database never assigned `after`, or changes since then
    /// were compacted.
    pub(crate) async fn changed_records(
        &self,
        after: Revision,
        limit: u64,
        is_known: impl Fn(ImageId) -> bool + Send,
    ) -> Result<ChangedRecords, Error> {
        let txn = begin_to_read(&self.index_reader).await?;
        let (changes, Revisions { latest, oldest }) = change_log::changes_after(&txn, after, limit).await?;
        let reached = changes.last().map_or(after, |last| last.revision);
        if (changes.len() as u64) < limit && reached != latest {
            // The log lacks what would lead there.
            return Err(Error::RevisionUnavailable { oldest: oldest.number });
        }
        let mut parts: BTreeMap<ImageId, Parts> = BTreeMap::new();
        for change in &changes {
            let is_new = !parts.contains_key(&change.image) && !is_known(change.image);
            let of_image = parts.entry(change.image).or_default();
            of_image.grants |= is_new || change.kind == ChangeKind::Grants;
            of_image.text |= is_new || change.kind == ChangeKind::Content;
        }
        let mut images = HashMap::with_capacity(parts.len());
        for kind in parts.values().copied().collect::<BTreeSet<_>>() {
            let ids = parts.iter().filter(|(_, parts)| **parts == kind).map(|(id, _)| *id);
            for entry in with_ids(&txn, kind, &ids.collect::<Vec<_>>()).await? {
                images.insert(entry.image.id, entry);
            }
        }
        txn.commit().await?;
        Ok(ChangedRecords { changes, images })
    }
}

async fn with_ids(
    txn: &DatabaseTransaction,
    parts: Parts,
    ids: &[ImageId],
) -> Result<Vec<CatalogueEntry>, DbErr> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut sql = select(txn.get_database_backend(), parts);
    sql.push_str(" WHERE NOT i.deleted AND i.id IN (");
    for number in 1..=ids.len() {
        let _ = write!(sql, "{}${number}", if number == 1 { "" } else { ", " });
    }
    sql.push(')');
    let values = ids.iter().copied().map(Value::from);
    let statement = Statement::from_sql_and_values(txn.get_database_backend(), sql, values);
    Ok(readable(&txn.query_all_raw(statement).await?, parts))
}

/// Selects images with these parts. Grants are one JSON column, because reading a row takes longer than
/// finding it.
fn select(backend: DbBackend, parts: Parts) -> String {
    let (array, all) = if backend == DbBackend::Postgres {
        ("json_build_array", "json_agg")
    } else {
        ("json_array", "json_group_array")
    };
    let grants = if parts.grants {
        format!(
            ", CAST((SELECT {all}({array}(g.grantee, CAST(g.view AS integer), CAST(g.modify AS integer), \
             CAST(g.\"delete\" AS integer))) FROM grants g WHERE g.image = i.id) AS text) AS grants_json"
        )
    } else {
        String::new()
    };
    // A join would read the configurations from the first one on for every page, by a merge with the images.
    let text = if parts.text {
        ", (SELECT c.json FROM configurations c WHERE c.image = i.id AND c.revision = i.configuration_revision) \
         AS configuration_json"
    } else {
        ""
    };
    format!("SELECT i.*{text}{grants} FROM images i")
}

/// Returns the images that can be read. One that was damaged by something else must not take the others
/// along.
fn readable(rows: &[QueryResult], parts: Parts) -> Vec<CatalogueEntry> {
    let read = rows.iter().map(|row| {
        entry(row, parts).inspect_err(|error| {
            let image: Option<ImageId> = row.try_get("", "id").ok();
            tracing::error!(?image, %error, "an image cannot be read from the database, and is left out");
        })
    });
    read.flatten().collect()
}

fn entry(row: &QueryResult, parts: Parts) -> Result<CatalogueEntry, DbErr> {
    let image = Image::from(image::Model::from_query_result(row, "")?);
    let mut text = None;
    if parts.text {
        let configuration: Configuration = from_json(&row.try_get::<String>("", "configuration_json")?)?;
        text = Some(search_text(&image.name, &image.description, &configuration));
    }
    let mut granted = None;
    if parts.grants {
        let json: Option<String> = row.try_get("", "grants_json")?;
        granted = Some(json.as_deref().map_or(Ok(Vec::new()), grants)?);
    }
    Ok(CatalogueEntry { image, grants: granted, text })
}

/// Parses `[[grantee, view, modify, delete], ...]`.
fn grants(json: &str) -> Result<Vec<(GranteeDigest, Permissions)>, DbErr> {
    let read: Vec<(String, u8, u8, u8)> = from_json(json)?;
    let mut grants: Vec<_> = read
        .into_iter()
        .map(|(grantee, view, modify, delete)| {
            (GranteeDigest::of_stored(&grantee), Permissions::new(view > 0, modify > 0, delete > 0))
        })
        .collect();
    grants.sort_unstable_by_key(|(grantee, _)| *grantee);
    Ok(grants)
}
