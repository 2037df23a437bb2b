//! How the index comes to where the tables are.
//!
//! The place of an image is that of its last update from the transaction on that has updated it. The words of an image are many, and
//! most changes leave them as they are, or are soon followed by others of the same image; so they are not written by whoever changes
//! it, who only notes that its place is unsettled. Upkeep settles places some at a time, when their images have been left alone for a
//! moment: it writes the words of the image that is there then, if one is. Whoever changes images while too many places are
//! unsettled settles some, too, so that they are few at all times.
//!
//! The index holds nothing that the tables do not: when [`VERSION`] is another than that of the database, it is made anew at the start.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, DbErr, FromQueryResult, QueryResult, Statement, Value,
};
use uuid::Uuid;

use super::{number, words::words_of};
use crate::{
    error::Error,
    image::ImageId,
    store::{Store, begin_immediate, entity::image, rows, writing::Writing},
    timestamp::Timestamp,
};

/// Of what the index has, and how it comes there.
const VERSION: i64 = 2;
/// It has the same, and no place is unsettled.
const NEVER_BEHIND: i64 = 1;

/// How many places are settled at a time: whoever writes meanwhile waits for that.
const SETTLED_AT_ONCE: u64 = 64;
/// How many unsettled places are too many: every list looks at those of their images that it could be asked for.
const TOO_MANY: u64 = 1_000;

/// Gives these images the places of their last updates, before the transaction that has changed them commits.
pub(in crate::store) async fn follow(txn: &Writing, changed: &BTreeSet<ImageId>) -> Result<(), DbErr> {
    place(txn, changed);
    let unsettled = number(txn, "SELECT COUNT(*) FROM unsettled_places", vec![]).await?;
    if unsettled.is_some_and(|unsettled| unsettled.unsigned_abs() > TOO_MANY) {
        // More than this adds: the place where an image was, and that where it is.
        settle(txn, SETTLED_AT_ONCE + 2 * changed.len() as u64, |_| true).await?;
    }
    Ok(())
}

fn place(txn: &Writing, changed: &BTreeSet<ImageId>) {
    const CHANGED: &str = "WITH changed (image) AS (SELECT unhex(value) FROM json_each(?))";
    const UNSETTLE: &str = "INSERT OR IGNORE INTO unsettled_places (place) \
        SELECT place FROM changed CROSS JOIN image_places USING (image)";
    const LEAVE: &str = "DELETE FROM image_places WHERE image IN (SELECT image FROM changed) AND NOT EXISTS \
        (SELECT 1 FROM images i WHERE i.id = image AND NOT i.deleted AND i.updated_at = image_places.updated_at)";
    // Those that were updated later are above, and of those that were updated at once the one with the lesser id.
    const ENTER: &str = "INSERT INTO image_places (place, image, updated_at) \
        SELECT (SELECT IFNULL(MAX(place), 0) FROM image_places) + ROW_NUMBER() OVER (ORDER BY updated_at, id DESC), \
        id, updated_at FROM changed CROSS JOIN images i ON i.id = image \
        WHERE NOT deleted AND NOT EXISTS (SELECT 1 FROM image_places p WHERE p.image = i.id)";
    let mut ids = String::with_capacity(35 * changed.len() + 2);
    for id in changed {
        let separator = if ids.is_empty() { '[' } else { ',' };
        let _ = write!(ids, "{separator}\"{}\"", id.0.simple());
    }
    ids.push(']');
    for statement in [UNSETTLE, LEAVE, ENTER, UNSETTLE] {
        let values: [Value; 1] = [ids.as_str().into()];
        let sql = format!("{CHANGED} {statement}");
        txn.later_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, values));
    }
}

impl Store {
    /// Settles some of the places that the index of SQLite is behind at, but for those of images that were updated within `moment`;
    /// whether there may be more.
    pub(crate) async fn settle_places(&self, moment: Duration) -> Result<bool, Error> {
        if self.backend() != DbBackend::Sqlite
            || number(&self.reader, "SELECT 1 FROM unsettled_places LIMIT 1", vec![]).await?.is_none()
        {
            return Ok(false);
        }
        let txn = self.write().await?;
        let now = self.now(&txn).await?;
        // A clock that was set back must not keep any waiting.
        let is_due = |updated_at| updated_at <= now.before(moment) || updated_at > now;
        let settled = settle(&txn, SETTLED_AT_ONCE, is_due).await?;
        txn.commit().await?;
        Ok(settled == SETTLED_AT_ONCE)
    }
}

/// Has the index have what is at the lowest of the unsettled places, up to the first image that is not due by its last update; at how
/// many.
async fn settle(txn: &Writing, limit: u64, is_due: impl Fn(Timestamp) -> bool) -> Result<u64, DbErr> {
    const UNSETTLED: &str = "SELECT u.place, i.*, text, \
        (SELECT json_group_array(subject) FROM grants g WHERE g.image = p.image) AS viewers \
        FROM (SELECT place FROM unsettled_places ORDER BY place LIMIT ?) u LEFT JOIN image_places p USING (place) \
        LEFT JOIN images i ON i.id = p.image LEFT JOIN image_texts t ON t.image = i.id ORDER BY u.place";
    const FORGET: &str =
        "DELETE FROM image_index WHERE rowid IN (SELECT place FROM unsettled_places WHERE place <= ?)";
    const SETTLED: &str = "DELETE FROM unsettled_places WHERE place <= ?";
    let sqlite =
        |sql: &str, values: Vec<Value>| Statement::from_sql_and_values(DbBackend::Sqlite, sql, values);
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut unsettled = txn.query_all_raw(sqlite(UNSETTLED, vec![limit.into()])).await?;
    let updates = unsettled.iter().map(|row| row.try_get("", "updated_at"));
    let updates: Vec<Option<i64>> = updates.collect::<Result<_, _>>()?;
    let is_left_alone = |updated_at: &Option<i64>| updated_at.map(Timestamp::from_micros).is_none_or(&is_due);
    unsettled.truncate(updates.iter().take_while(|updated_at| is_left_alone(updated_at)).count());
    let Some(last) = unsettled.last() else {
        return Ok(0);
    };
    let last: i64 = last.try_get("", "place")?;
    txn.later_raw(sqlite(FORGET, vec![last.into()]));
    for row in &unsettled {
        if let Some(words) = words(row)? {
            let place: i64 = row.try_get("", "place")?;
            let insert = "INSERT INTO image_index (rowid, words) VALUES (?, ?)";
            txn.later_raw(sqlite(insert, vec![place.into(), words.into()]));
        }
    }
    txn.later_raw(sqlite(SETTLED, vec![last.into()]));
    Ok(unsettled.len() as u64)
}

/// What the index is to have of the image at a place, if there is one.
fn words(row: &QueryResult) -> Result<Option<String>, DbErr> {
    if row.try_get::<Option<Uuid>>("", "id")?.is_none() {
        return Ok(None);
    }
    let image = image::Model::from_query_result(row, "")?;
    let text = row.try_get::<Option<String>>("", "text")?.unwrap_or_default();
    let viewers: Vec<String> = rows::from_json(&row.try_get::<String>("", "viewers")?)?;
    Ok(Some(words_of(&image, &text, viewers.iter())))
}

/// Makes the index anew when it is another version's, some thousand images a transaction: one that is interrupted is gone on
/// with.
pub(in crate::store) async fn renew(writer: &DatabaseConnection) -> Result<(), DbErr> {
    const READ_AT_ONCE: u64 = 500;
    /// How many images are committed at once, and how many bytes of theirs are sorted in memory before they are written: the
    /// more, the less has to be merged.
    const COMMITTED_AT_ONCE: u64 = 8_000;
    const SORTED_AT_ONCE: &str = "67108864";
    /// The same as long as the index only follows; FTS5's own.
    const USUALLY: &str = "1048576";
    let sort_at_once =
        |bytes: &str| format!("INSERT INTO image_index (image_index, rank) VALUES ('hashsize', {bytes})");
    let is_made = format!("PRAGMA user_version = {VERSION}");
    let version =
        number(writer, "SELECT user_version FROM pragma_user_version()", vec![]).await?.unwrap_or(0);
    match version {
        VERSION => return Ok(()),
        NEVER_BEHIND => return writer.execute_unprepared(&is_made).await.map(drop),
        _ => {}
    }
    // While it is made, the version is below zero.
    if version != -VERSION {
        let txn = begin_immediate(writer).await?;
        for statement in [
            "DELETE FROM image_places".to_owned(),
            "DELETE FROM unsettled_places".to_owned(),
            "INSERT INTO image_index (image_index) VALUES ('delete-all')".to_owned(),
            format!("PRAGMA user_version = {}", -VERSION),
        ] {
            txn.execute_unprepared(&statement).await?;
        }
        txn.commit().await?;
    }
    writer.execute_unprepared(&sort_at_once(SORTED_AT_ONCE)).await?;
    let mut done = 0_u64;
    loop {
        let txn = begin_immediate(writer).await?;
        for _ in 0..COMMITTED_AT_ONCE / READ_AT_ONCE {
            let ids = next_unplaced(&txn, READ_AT_ONCE).await?;
            if ids.is_empty() {
                txn.execute_unprepared(&sort_at_once(USUALLY)).await?;
                txn.execute_unprepared(&is_made).await?;
                return txn.commit().await;
            }
            place(&txn, &ids);
            done += settle(&txn, READ_AT_ONCE, |_| true).await?;
        }
        txn.commit().await?;
        tracing::info!(images = done, "making the index of the images");
    }
}

/// In the order of their updates.
async fn next_unplaced(txn: &Writing, limit: u64) -> Result<BTreeSet<ImageId>, DbErr> {
    let last = number(txn, "SELECT updated_at FROM image_places ORDER BY place DESC LIMIT 1", vec![]).await?;
    let sql = "SELECT i.id FROM images i WHERE NOT i.deleted AND i.updated_at >= ? \
               AND NOT EXISTS (SELECT 1 FROM image_places p WHERE p.image = i.id) \
               ORDER BY i.updated_at, i.id DESC LIMIT ?";
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let values: [Value; 2] = [last.unwrap_or(i64::MIN).into(), limit.into()];
    let statement = Statement::from_sql_and_values(DbBackend::Sqlite, sql, values);
    let rows = txn.query_all_raw(statement).await?;
    rows.iter().map(|row| row.try_get_by_index(0).map(ImageId)).collect()
}
