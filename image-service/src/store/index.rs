//! SQLite's index of the images: for everything that a list can ask for, the images that have it, the last updated first.
//!
//! One FTS5 table holds for each image, as words, every one, two and three characters that follow one another in its text, its
//! status and flags, its creator, and all who can see it. Its rows are in the order of updates: the last update has the
//! highest `place`. So any combination of a term, filters and a caller is one intersection of sorted lists, which gives the next images
//! at once, however rare or old they are. What the index gives are candidates: whoever reads them checks every condition on the
//! rows themselves, so that the index decides how fast something is found, never whether somebody may see it.
//!
//! It follows the tables, and is behind them for a while: see [`following`]. What it is behind at is proposed whatever it has.

use sea_orm::{
    ConnectionTrait, DbBackend, DbErr, Statement, Value,
    sea_query::{Condition, Expr, ExprTrait, JoinType, Order, Query, SelectStatement, UnionType},
};
use uuid::Uuid;

use self::words::{flag, status_word, term_words, word};
use super::rows;
use crate::{access::Sight, image as noun};

mod following;
#[cfg(test)]
mod tests;
mod words;

pub(super) use self::following::{follow, renew};

/// What images have to have, as the index is asked for it; nothing when all do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted(Vec<String>);

impl Wanted {
    /// What every image has that is in sight and matches.
    pub(super) fn of(sight: &Sight, query: &noun::Query) -> Self {
        let mut wanted = Self::without_term(sight, query);
        if let Some(term) = &query.search {
            wanted.0.push(term_words(term));
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
        let with_place = |from: &mut SelectStatement, place: (&'static str, &'static str)| {
            let place = Expr::col(place);
            from.expr_as(place.clone(), "place").column(("p", "updated_at")).and_where(place.lt(before));
        };
        let mut candidates = self.in_index();
        with_place(&mut candidates, self.place());
        if !self.0.is_empty() {
            let mut unsettled = unsettled();
            with_place(&mut unsettled, ("u", "place"));
            candidates.union(UnionType::All, unsettled);
        }
        candidates.order_by("place", Order::Desc).limit(limit);
        candidates
    }

    /// The `image` of each candidate.
    pub(super) fn images(&self) -> SelectStatement {
        let mut images = self.in_index();
        if !self.0.is_empty() {
            images.union(UnionType::All, unsettled());
        }
        images
    }

    /// The `image` of each candidate that the index has as it is; of each at all when everything is wanted.
    fn in_index(&self) -> SelectStatement {
        let mut images = Query::select();
        images.column(("p", "image"));
        let Some(expression) = self.expression() else {
            images.from_as("image_places", "p");
            return images;
        };
        let settled = Expr::cust("f.rowid NOT IN (SELECT place FROM unsettled_places)");
        images
            .from_as("image_index", "f")
            // The order in which SQLite is to join them; a condition in ON would be left out.
            .join_as(JoinType::CrossJoin, "image_places", "p", Condition::all())
            .and_where(Expr::col(("p", "place")).equals(("f", "rowid")))
            .and_where(Expr::cust_with_values("f.image_index MATCH ?", [expression]))
            .and_where(settled);
        images
    }

    fn place(&self) -> (&'static str, &'static str) {
        if self.0.is_empty() { ("p", "place") } else { ("f", "rowid") }
    }

    /// About how many candidates there are, and not less; counted to `limit`, but for what the index is behind at.
    pub(super) async fn count(&self, db: &impl ConnectionTrait, limit: u64) -> Result<u64, DbErr> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let (sql, values) = match self.expression() {
            Some(expression) => (
                "SELECT (SELECT COUNT(*) FROM (SELECT 1 FROM image_index WHERE image_index MATCH ? LIMIT ?)) \
                 + (SELECT COUNT(*) FROM unsettled_places u CROSS JOIN image_places p ON p.place = u.place)",
                vec![expression.into(), limit.into()],
            ),
            None => ("SELECT COUNT(*) FROM (SELECT 1 FROM image_places LIMIT ?)", vec![limit.into()]),
        };
        let count = number(db, sql, values).await?.unwrap_or(0);
        Ok(u64::try_from(count).unwrap_or(0))
    }
}

/// The `image` of each that the index is behind at.
fn unsettled() -> SelectStatement {
    let mut images = Query::select();
    images
        .column(("p", "image"))
        .from_as("unsettled_places", "u")
        .join_as(JoinType::CrossJoin, "image_places", "p", Condition::all())
        .and_where(Expr::col(("p", "place")).equals(("u", "place")));
    images
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

async fn number(db: &impl ConnectionTrait, sql: &str, values: Vec<Value>) -> Result<Option<i64>, DbErr> {
    let row = db.query_one_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, values)).await?;
    row.map_or(Ok(None), |row| row.try_get_by_index(0))
}
