//! SQLite's index of the images: for everything that a list can ask for, the images that have it, the last updated first.
//!
//! One FTS5 table holds for each image, as words, every one, two and three characters that follow one another in its text, its
//! status and flags, its creator, and all who can see it. Its rows are in the order of updates: the last update has the
//! highest `place`. So any combination of a term, filters and a caller is one intersection of sorted lists, which gives the next images
//! at once, however rare or old they are. What the index gives are candidates: whoever reads them checks every condition on the
//! rows themselves, so that the index decides how fast something is found, never whether somebody may see it.
//!
//! The index follows the change log within the transaction of the change. It holds nothing that the tables do not: when
//! [`VERSION`] is another than that of the database, it is made anew at the start.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    fmt::{self, Write as _},
};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, DbErr, FromQueryResult, Statement, Value,
    sea_query::{Condition, Expr, ExprTrait, JoinType, Order, Query, SelectStatement},
};
use uuid::Uuid;

use super::{begin_immediate, entity::image, rows, writing::Writing};
use crate::{
    access::Sight,
    image::{self as noun, ImageId},
    search::{self, Term},
};

/// Of what the words of an image are.
const VERSION: i64 = 1;
/// An image whose text has more different characters in a row has all of them, as far as the index knows: to write so many
/// would take longer than to read the text.
const MOST_GRAMS: usize = 16_384;
/// How many words of a term are looked up: each is a list to be read, and few images have these and not the term.
const MOST_LOOKED_UP: usize = 6;
/// What an image of too many words has instead.
const EVERYTHING: &str = "everything";

/// What images have to have, as the index is asked for it; nothing when all do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted(Vec<String>);

impl Wanted {
    /// What every image has that is in sight and matches.
    pub(super) fn of(sight: &Sight, query: &noun::Query) -> Self {
        let mut wanted = Self::without_term(sight, query);
        if let Some(term) = &query.search {
            let grams: Vec<String> =
                grams_of(term).map(|gram| Word('g', gram_hash(gram)).to_string()).collect();
            wanted.0.push(format!("(({}) OR {EVERYTHING})", grams.join(" AND ")));
        }
        wanted
    }

    /// What every image has that is in sight and that the filters let through, whatever it is searched for.
    pub(super) fn without_term(sight: &Sight, query: &noun::Query) -> Self {
        let mut all = Vec::new();
        all.extend(sight.subject().map(|subject| word('v', subject)));
        all.extend(query.creator.as_deref().map(|creator| word('c', creator)));
        if !query.statuses.is_empty() {
            let any: Vec<String> =
                query.statuses.iter().map(|status| status_word(rows::status_to_code(*status))).collect();
            all.push(format!("({})", any.join(" OR ")));
        }
        all.extend(query.template.map(|template| flag('t', template)));
        all.extend(query.enabled.map(|enabled| flag('e', enabled)));
        all.extend(query.pulled.map(|pulled| flag('p', pulled)));
        Self(all)
    }

    /// As FTS5 takes it; none when everything is wanted.
    fn expression(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.0.join(" AND "))
    }

    /// The `image`, the `place` and the time of the last update of the candidates below a place, the highest first.
    pub(super) fn candidates(&self, before: i64, limit: u64) -> SelectStatement {
        let mut candidates = self.images();
        candidates
            .columns([("p", "place"), ("p", "updated_at")])
            .and_where(Expr::col(self.place()).lt(before))
            .order_by(self.place(), Order::Desc)
            .limit(limit);
        candidates
    }

    /// The `image` of each candidate.
    pub(super) fn images(&self) -> SelectStatement {
        let mut images = Query::select();
        images.column(("p", "image"));
        if let Some(expression) = self.expression() {
            images
                .from_as("image_index", "f")
                // The order in which SQLite is to join them; a condition in ON would be left out.
                .join_as(JoinType::CrossJoin, "image_places", "p", Condition::all())
                .and_where(Expr::col(("p", "place")).equals(("f", "rowid")))
                .and_where(Expr::cust_with_values("f.image_index MATCH ?", [expression]));
        } else {
            images.from_as("image_places", "p");
        }
        images
    }

    fn place(&self) -> (&'static str, &'static str) {
        if self.0.is_empty() { ("p", "place") } else { ("f", "rowid") }
    }

    /// How many candidates there are, counted to `limit`.
    pub(super) async fn count(&self, db: &impl ConnectionTrait, limit: u64) -> Result<u64, DbErr> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let (found, values) = match self.expression() {
            Some(expression) => (
                "SELECT 1 FROM image_index WHERE image_index MATCH ? LIMIT ?",
                vec![expression.into(), limit.into()],
            ),
            None => ("SELECT 1 FROM image_places LIMIT ?", vec![limit.into()]),
        };
        let count: i64 = number(db, &format!("SELECT COUNT(*) FROM ({found})"), values).await?.unwrap_or(0);
        Ok(u64::try_from(count).unwrap_or(0))
    }
}

/// Above all places.
pub(super) const TOP: i64 = i64::MAX;

/// Right above the places of all images that follow one with this time of its last update and this id.
pub(super) async fn above_the_next(
    db: &impl ConnectionTrait,
    updated_at: i64,
    id: Uuid,
) -> Result<i64, DbErr> {
    let sql = "SELECT p.place FROM images i CROSS JOIN image_places p ON p.image = i.id \
               WHERE i.updated_at <= ? AND (i.updated_at < ? OR i.id > ?) ORDER BY i.updated_at DESC, i.id LIMIT 1";
    let next = number(db, sql, vec![updated_at.into(), updated_at.into(), id.into()]).await?;
    Ok(next.map_or(i64::MIN, |next| next + 1))
}

/// Brings the index to where these images are, before the transaction that has changed them commits.
pub(super) async fn follow(txn: &Writing, changed: &BTreeSet<ImageId>) -> Result<(), DbErr> {
    let Known { mut images, mut highest } = known(txn, changed).await?;
    // Those that were updated later are above, and of those that were updated at once the one with the lesser id.
    images.sort_by_key(|image| image.row.as_ref().map(|row| (row.updated_at, Reverse(row.id))));
    let (mut left, mut gone, mut placed, mut words) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Indexed { id, place, row, text, viewers } in images {
        left.extend(place.map(|(place, _)| [place.into()]));
        let Some(row) = row else {
            gone.push([id.into()]);
            continue;
        };
        let place = match place {
            Some((place, updated_at)) if updated_at == row.updated_at => place,
            _ => {
                highest += 1;
                placed.push([highest.into(), id.into(), row.updated_at.into()]);
                highest
            }
        };
        words.push([place.into(), words_of(&row, &text, viewers.iter()).into()]);
    }
    write(txn, "DELETE FROM image_index WHERE rowid IN (VALUES", left, ")");
    write(txn, "DELETE FROM image_places WHERE image IN (VALUES", gone, ")");
    write(
        txn,
        "INSERT INTO image_places (place, image, updated_at) VALUES",
        placed,
        "ON CONFLICT (image) DO UPDATE SET place = excluded.place, updated_at = excluded.updated_at",
    );
    write(txn, "INSERT INTO image_index (rowid, words) VALUES", words, "");
    Ok(())
}

/// Writes rows, some with each statement.
fn write<const N: usize>(txn: &Writing, before: &str, mut rows: Vec<[Value; N]>, after: &str) {
    const AT_ONCE: usize = 50;
    let row = format!("({})", ["?"; N].join(", "));
    while !rows.is_empty() {
        let some = rows.len().min(AT_ONCE);
        let marks = vec![row.as_str(); some].join(", ");
        let sql = format!("{before} {marks} {after}");
        txn.later_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, rows.drain(..some).flatten()));
    }
}

/// What the index is to have of an image.
struct Indexed {
    id: Uuid,
    /// Where the index has it, and the time of the update that it has.
    place: Option<(i64, i64)>,
    /// None when it is gone.
    row: Option<image::Model>,
    text: String,
    viewers: Vec<String>,
}

struct Known {
    images: Vec<Indexed>,
    /// The highest place of all.
    highest: i64,
}

/// Reads all that the index is to have of these images.
async fn known(txn: &Writing, images: &BTreeSet<ImageId>) -> Result<Known, DbErr> {
    let marks = vec!["(?)"; images.len()].join(", ");
    let sql = format!(
        "WITH asked (asked) AS (VALUES {marks}) \
         SELECT asked, place, p.updated_at AS placed_at, i.*, text, \
         (SELECT json_group_array(subject) FROM grants g WHERE g.image = asked) AS viewers, \
         (SELECT MAX(place) FROM image_places) AS highest \
         FROM asked LEFT JOIN image_places p ON p.image = asked \
         LEFT JOIN images i ON i.id = asked AND NOT i.deleted LEFT JOIN image_texts t ON t.image = i.id"
    );
    let ids: Vec<Value> = images.iter().map(|id| id.0.into()).collect();
    let rows = txn.query_all_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, ids)).await?;
    let mut known = Known { images: Vec::with_capacity(rows.len()), highest: 0 };
    for row in rows {
        known.highest = row.try_get::<Option<i64>>("", "highest")?.unwrap_or(0);
        let place: Option<i64> = row.try_get("", "place")?;
        known.images.push(Indexed {
            id: row.try_get("", "asked")?,
            place: place.map(|place| Ok::<_, DbErr>((place, row.try_get("", "placed_at")?))).transpose()?,
            row: row
                .try_get::<Option<Uuid>>("", "id")?
                .map(|_| image::Model::from_query_result(&row, ""))
                .transpose()?,
            text: row.try_get::<Option<String>>("", "text")?.unwrap_or_default(),
            viewers: rows::from_json(&row.try_get::<String>("", "viewers")?)?,
        });
    }
    Ok(known)
}

/// Makes the index anew when it is another version's, some thousand images a transaction: one that is interrupted is gone on
/// with.
pub(super) async fn renew(writer: &DatabaseConnection) -> Result<(), DbErr> {
    const READ_AT_ONCE: u64 = 500;
    /// How many images are committed at once, and how many bytes of theirs are sorted in memory before they are written: the
    /// more, the less has to be merged.
    const COMMITTED_AT_ONCE: u64 = 8_000;
    const SORTED_AT_ONCE: &str = "67108864";
    /// The same as long as the index only follows; FTS5's own.
    const USUALLY: &str = "1048576";
    let sort_at_once =
        |bytes: &str| format!("INSERT INTO image_index (image_index, rank) VALUES ('hashsize', {bytes})");
    let version: i64 =
        number(writer, "SELECT user_version FROM pragma_user_version()", vec![]).await?.unwrap_or(0);
    if version == VERSION {
        return Ok(());
    }
    // While it is made, the version is below zero.
    if version != -VERSION {
        let txn = begin_immediate(writer).await?;
        for statement in [
            "DELETE FROM image_places".to_owned(),
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
            let ids = next_unindexed(&txn, READ_AT_ONCE).await?;
            if ids.is_empty() {
                txn.execute_unprepared(&sort_at_once(USUALLY)).await?;
                txn.execute_unprepared(&format!("PRAGMA user_version = {VERSION}")).await?;
                return txn.commit().await;
            }
            follow(&txn, &ids.iter().copied().map(ImageId).collect()).await?;
            done += ids.len() as u64;
        }
        txn.commit().await?;
        tracing::info!(images = done, "making the index of the images");
    }
}

/// In the order of their updates.
async fn next_unindexed(txn: &Writing, limit: u64) -> Result<Vec<Uuid>, DbErr> {
    let last = number(txn, "SELECT updated_at FROM image_places ORDER BY place DESC LIMIT 1", vec![]).await?;
    let sql = "SELECT i.id FROM images i WHERE NOT i.deleted AND i.updated_at >= ? \
               AND NOT EXISTS (SELECT 1 FROM image_places p WHERE p.image = i.id) \
               ORDER BY i.updated_at, i.id DESC LIMIT ?";
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let values: [Value; 2] = [last.unwrap_or(i64::MIN).into(), limit.into()];
    let statement = Statement::from_sql_and_values(DbBackend::Sqlite, sql, values);
    let rows = txn.query_all_raw(statement).await?;
    rows.iter().map(|row| row.try_get_by_index(0)).collect()
}

/// Everything that an image can be found by.
fn words_of<'a>(row: &image::Model, text: &str, viewers: impl Iterator<Item = &'a String>) -> String {
    let mut words = vec![
        word('v', &row.creator),
        word('c', &row.creator),
        status_word(row.status),
        flag('t', row.template),
        flag('e', row.enabled),
        flag('p', row.pulled),
    ];
    words.extend(viewers.map(|subject| word('v', subject)));
    let mut grams: Vec<u64> = search::grams(text).map(gram_hash).collect();
    grams.sort_unstable();
    grams.dedup();
    let mut words = words.join(" ");
    if grams.len() > MOST_GRAMS {
        words.push(' ');
        words.push_str(EVERYTHING);
    } else {
        words.reserve(grams.len() * 11);
        for gram in grams {
            let _ = write!(words, " {}", Word('g', gram));
        }
    }
    words
}

/// What every text has that holds a term.
fn grams_of(term: &Term) -> impl Iterator<Item = &str> {
    let grams = search::grams_within(term);
    let step = grams.len().div_ceil(MOST_LOOKED_UP).max(1);
    grams.into_iter().step_by(step)
}

fn status_word(code: i32) -> String {
    format!("s{code}")
}

fn flag(which: char, is_set: bool) -> String {
    format!("{which}{}", u8::from(is_set))
}

/// A word that FTS5 takes as one, of a kind and a hash: two texts may have the same, which costs a look at the rows.
struct Word(char, u64);

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:x}", self.0, self.1)
    }
}

fn word(kind: char, text: &str) -> String {
    Word(kind, hash(text)).to_string()
}

/// Of grams there are few, and their words are most of the index.
fn gram_hash(gram: &str) -> u64 {
    let hash = hash(gram);
    (hash ^ (hash >> 32)) & 0x7_ffff_ffff
}

/// FNV-1a: the index is kept, so the words have to be the same in every build.
fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

async fn number(db: &impl ConnectionTrait, sql: &str, values: Vec<Value>) -> Result<Option<i64>, DbErr> {
    let row = db.query_one_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, values)).await?;
    row.map_or(Ok(None), |row| row.try_get_by_index(0))
}
