//! Postgres' eras: where in the order of updates a term can be, when no image near has it.
//!
//! An era is some thousand images, one after the other in the order of updates, and the index of terms has of every text the era
//! that it was put into. So one look at the index tells of many eras whether any of their texts holds a term, and a walk in that order
//! passes over those of which none does. Eras only say what can be passed over; whatever is listed was walked.
//!
//! They follow the writing transactions, which know nothing of them. As the times of changes are in the order of commits, no image
//! comes into a stretch of time that is over: one that is updated leaves its era, and is put into a later one when it is no longer among
//! the latest, which are in none. Until then its text is found in an era that it is not in any more, and a walk goes there in vain.
//!
//! The index takes what is written into a list first, which all who look into it read, and which who makes it too long has to merge. It
//! is merged here, so that neither those who search nor those who write wait for it.

use std::time::Instant;

use sea_orm::{ConnectionTrait, DbBackend, DbErr, QueryResult, Statement, TransactionTrait, Value};

use super::{Store, is_locked, texts};
use crate::{error::Error, search::Term};

/// The lock of who puts images into eras.
const LOCK: i64 = 0x7472_6169_6c65_7203;

/// How large eras are, in images.
#[derive(Copy, Clone, Debug)]
pub(super) struct Sizes {
    /// An era has so many at most.
    pub(super) era: i64,
    /// So many of the latest are in none.
    pub(super) latest: i64,
    /// So many are put into one in a transaction: who writes one of their texts waits for its end.
    pub(super) at_once: i64,
    /// In eras with so many, texts that hold a term are looked for at once: each may.
    pub(super) looked_into: i64,
}

impl Sizes {
    pub(super) const DEFAULT: Self = Self { era: 4_096, latest: 500, at_once: 64, looked_into: 65_536 };
}

/// What was passed over in the order of updates, the latest first.
#[derive(Debug)]
pub(super) struct Passed {
    /// No image that was updated after this time, and before what was asked from, holds the term.
    pub(super) since: Option<i64>,
    /// Whether it was given up for want of time.
    pub(super) is_late: bool,
}

/// The images that were updated after `since`, up to where the next era begins.
#[derive(Debug)]
struct Era {
    era: i32,
    since: i64,
    images: i64,
}

impl Store {
    /// Puts the next images into an era, if there are enough that are not among the latest; whether there were.
    pub(crate) async fn advance_eras(&self) -> Result<bool, Error> {
        if self.backend() != DbBackend::Postgres {
            return Ok(false);
        }
        match self.put_into_era().await {
            Ok(None) => Ok(false),
            Ok(Some(is_new)) => {
                if is_new {
                    self.count_eras().await?;
                }
                Ok(true)
            }
            Err(error) if is_locked(&error) => {
                tracing::debug!(%error, "a text of the next era is being written");
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Merges into the index of terms what was written lately.
    pub(crate) async fn merge_terms(&self) -> Result<(), Error> {
        if self.backend() == DbBackend::Postgres {
            self.reader.execute_unprepared("SELECT gin_clean_pending_list('image_texts_terms')").await?;
        }
        Ok(())
    }

    /// Whether a new era has begun with the images that were put into one.
    async fn put_into_era(&self) -> Result<Option<bool>, DbErr> {
        const LATEST: &str = "SELECT era, until, \
            (SELECT COUNT(*) FROM images WHERE updated_at > since AND updated_at <= until AND NOT deleted) \
            FROM eras ORDER BY era DESC LIMIT 1";
        // The time of the last of the next images, if so many others follow.
        const NEXT: &str = "SELECT updated_at FROM images WHERE updated_at > $1 AND NOT deleted AND EXISTS \
            (SELECT 1 FROM images WHERE updated_at > $1 AND NOT deleted ORDER BY updated_at, id OFFSET $3 LIMIT 1) \
            ORDER BY updated_at, id OFFSET $2 LIMIT 1";
        // Nobody waits for who writes a text while others wait for what was written here.
        const PUT: &str = "WITH next AS \
            (SELECT t.image FROM images i JOIN image_texts t ON t.image = i.id \
            WHERE i.updated_at > $1 AND i.updated_at <= $2 AND NOT i.deleted \
            ORDER BY i.updated_at, i.id FOR NO KEY UPDATE OF t NOWAIT) \
            UPDATE image_texts SET era = $3 FROM next WHERE image_texts.image = next.image";
        let Sizes { era: most, latest, at_once, .. } = self.bounds.eras;
        let txn = self.reader.begin().await?;
        // Whoever writes one of the texts would wait for a process that stands still.
        txn.execute_unprepared("SET LOCAL idle_in_transaction_session_timeout = '1s'").await?;
        let lock = format!("SELECT pg_try_advisory_xact_lock({LOCK})");
        let locked = txn.query_one_raw(statement(&lock, [])).await?;
        if !locked.map_or(Ok(false), |row| row.try_get_by_index(0))? {
            return Ok(None);
        }
        let (era, after, images) = match txn.query_one_raw(statement(LATEST, [])).await? {
            Some(row) => (row.try_get_by_index(0)?, row.try_get_by_index(1)?, row.try_get_by_index(2)?),
            None => (0, i64::MIN, most),
        };
        let ends = [after.into(), (at_once - 1).into(), (at_once + latest - 1).into()];
        let Some(row) = txn.query_one_raw(statement(NEXT, ends)).await? else {
            return Ok(None);
        };
        let until: i64 = row.try_get_by_index(0)?;
        let is_new = images + at_once > most;
        let era: i32 = if is_new { era + 1 } else { era };
        let put = txn.execute_raw(statement(PUT, [after.into(), until.into(), era.into()])).await?;
        let put = i64::try_from(put.rows_affected()).unwrap_or(i64::MAX);
        let written = if is_new {
            let new = "INSERT INTO eras (era, since, until, images) VALUES ($1, $2, $3, $4)";
            statement(new, [era.into(), after.into(), until.into(), put.into()])
        } else {
            let longer = "UPDATE eras SET until = $2, images = $3 WHERE era = $1";
            statement(longer, [era.into(), until.into(), images.saturating_add(put).into()])
        };
        txn.execute_raw(written).await?;
        txn.commit().await?;
        Ok(Some(is_new))
    }

    /// Counts of some eras how many images have not left them, and forgets those that all have left.
    async fn count_eras(&self) -> Result<(), DbErr> {
        const COUNT: &str = "WITH chosen AS \
            (SELECT era, since, until FROM eras WHERE era < (SELECT MAX(era) FROM eras) ORDER BY random() LIMIT 16), \
            counted AS (SELECT era, (SELECT COUNT(*) FROM images \
            WHERE updated_at > since AND updated_at <= until AND NOT deleted) AS images FROM chosen), \
            gone AS (DELETE FROM eras USING counted WHERE eras.era = counted.era AND counted.images = 0) \
            UPDATE eras SET images = counted.images FROM counted \
            WHERE eras.era = counted.era AND counted.images > 0 AND counted.images <> eras.images";
        self.reader.execute_unprepared(COUNT).await?;
        Ok(())
    }
}

/// Passes over the images that were updated at a time or before and do not hold a term, as far as the eras tell in time; `None` when some
/// of them may be in no era. To be called in a transaction on Postgres.
pub(super) async fn pass_over(
    db: &impl ConnectionTrait,
    sizes: Sizes,
    term: &Term,
    updated_at: i64,
) -> Result<Option<Passed>, DbErr> {
    let begun = Instant::now();
    let eras = eras_from(db, updated_at).await?;
    if eras.is_empty() {
        return Ok(None);
    }
    let mut since = None;
    let passing = async {
        // By the statistics a term is everywhere or nowhere.
        db.execute_unprepared("SET LOCAL enable_seqscan = off").await?;
        let (mut left, mut images) = (eras.as_slice(), 0);
        while !left.is_empty() && begun.elapsed() < texts::IN_TIME {
            let (next, others) = left.split_at(together(left, images));
            if !hold(db, next, term).await? {
                since = next.last().map(|era| era.since);
                left = others;
                images = (2 * images).max(sizes.era).min(sizes.looked_into);
            } else if next.len() > 1 {
                images = 0;
            } else {
                return Ok(true);
            }
        }
        Ok(left.is_empty())
    };
    let is_late = texts::in_time(db, passing).await? != Some(true);
    Ok(Some(Passed { since, is_late }))
}

/// How many of these eras have so many images together, one at least; each is a list to be read.
fn together(eras: &[Era], images: i64) -> usize {
    const MOST: usize = 64;
    if images == 0 {
        return 1;
    }
    let mut left = images;
    let fitting = eras.iter().take(MOST).take_while(|era| {
        left -= era.images;
        left >= 0
    });
    fitting.count().max(1)
}

/// The next eras in which images were put that were updated at a time or before, the latest first; none when some may be in none.
async fn eras_from(db: &impl ConnectionTrait, updated_at: i64) -> Result<Vec<Era>, DbErr> {
    const FROM: &str = "SELECT era, since, images FROM eras \
        WHERE since < $1 AND $1 <= (SELECT MAX(until) FROM eras) ORDER BY era DESC LIMIT 1000";
    let rows = db.query_all_raw(statement(FROM, [updated_at.into()])).await?;
    let era = |row: &QueryResult| {
        Ok(Era {
            era: row.try_get_by_index(0)?,
            since: row.try_get_by_index(1)?,
            images: row.try_get_by_index(2)?,
        })
    };
    rows.iter().map(era).collect()
}

/// Whether any text in these eras holds a term.
async fn hold(db: &impl ConnectionTrait, eras: &[Era], term: &Term) -> Result<bool, DbErr> {
    let eras: Vec<String> = eras.iter().map(|era| era.era.to_string()).collect();
    let found = texts::holding_in_eras(term, &eras.join(",")).limit(1).to_owned();
    Ok(db.query_one_raw(DbBackend::Postgres.build(&found)).await?.is_some())
}

fn statement<const N: usize>(sql: &str, values: [Value; N]) -> Statement {
    Statement::from_sql_and_values(DbBackend::Postgres, sql, values)
}
