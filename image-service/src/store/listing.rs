//! Lists of images: what is in sight and matches, in an order, from a place on.
//!
//! A call does bounded work. When few images can match, all of them are found by an index and sorted. Otherwise the order is
//! walked for a bounded stretch, and the page may be short. On SQLite the order of updates is that of the index itself, see
//! [`index`](super::index).

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait, ExprTrait, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect, QueryTrait, Select, Statement, Value,
    sea_query::{Expr, Func, Order as SqlOrder, SelectStatement},
};
use uuid::Uuid;

use super::{Store, entity::image, grants, images, index::Wanted, rows, texts};
use crate::{
    access::Sight,
    error::Error,
    image::{Direction, ImageInView, Key, KeyValue, Order, Place, Query, View},
};

mod recent;
#[cfg(test)]
mod tests;
mod walking;

use self::walking::Walk;

/// A page of images.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) images: Vec<ImageInView>,
    /// Where the next page begins; none on the last one.
    pub(crate) next: Option<Place>,
    /// How many match on all pages together, if that was asked for.
    pub(crate) total: Option<u64>,
}

/// What a page was found to hold, and where the next one begins.
type Found = (Vec<image::Model>, Option<Place>);

/// How much a call does at most.
#[derive(Copy, Clone, Debug)]
pub(super) struct Bounds {
    /// How many images are few: sorted by every call rather than walked.
    few: u64,
    /// How many images a call looks at when it walks.
    stretch: u64,
    /// How many of those that the index proposes.
    candidates: u64,
}

impl Bounds {
    pub(super) const DEFAULT: Self = Self { few: 5_000, stretch: 5_000, candidates: 2_000 };
}

impl Store {
    /// The next images of a query after a place.
    pub(crate) async fn list(
        &self,
        sight: &Sight,
        query: &Query,
        after: Option<&Place>,
        limit: u64,
        view: View,
        with_total: bool,
    ) -> Result<Page, Error> {
        let matching = matching(self.backend(), sight, query);
        if self.backend() == DbBackend::Sqlite && query.order == Order::default() {
            let total = if with_total { Some(matching.count(&self.reader).await?) } else { None };
            let asked = Asked::new(&self.reader, sight, self.bounds);
            let (images, next) = asked.latest_first(query, after, limit, view).await?;
            return Ok(Page { images, next, total });
        }
        let txn = self.read().await?;
        let total = if with_total { Some(matching.count(&txn).await?) } else { None };
        let asked = Asked::new(&txn, sight, self.bounds);
        let (found, next) = Walk::new(asked, query, limit).page(after).await?;
        let images = images::all_in_view(&txn, found, sight, view).await?;
        txn.commit().await?;
        Ok(Page { images, next, total })
    }
}

/// Who asks, and with what bounds.
#[derive(Debug)]
pub(super) struct Asked<'a, C> {
    db: &'a C,
    sight: &'a Sight,
    bounds: Bounds,
}

impl<'a, C: ConnectionTrait> Asked<'a, C> {
    pub(super) fn new(db: &'a C, sight: &'a Sight, bounds: Bounds) -> Self {
        Self { db, sight, bounds }
    }

    /// What the index is asked for. When a caller and its filters leave very few images, their texts are read at once sooner than
    /// the term is looked up.
    async fn wanted(&self, query: &Query) -> Result<Wanted, DbErr> {
        const VERY_FEW: u64 = 100;
        let without_term = Wanted::without_term(self.sight, query);
        if query.search.is_some() && without_term.count(self.db, VERY_FEW + 1).await? > VERY_FEW {
            return Ok(Wanted::of(self.sight, query));
        }
        Ok(without_term)
    }

    /// The images among which all that match are, if they are few.
    pub(super) async fn few(&self, query: &Query) -> Result<Option<Condition>, DbErr> {
        let Self { db, sight, bounds: Bounds { few, .. } } = *self;
        let among = |ids: SelectStatement| {
            Some(Condition::all().add(Expr::col((image::Entity, image::Column::Id)).in_subquery(ids)))
        };
        if db.get_database_backend() == DbBackend::Sqlite {
            let wanted = self.wanted(query).await?;
            let is_few = wanted.count(db, few + 1).await? <= few;
            return Ok(if is_few { among(wanted.images()) } else { None });
        }
        if let Some(subject) = sight.subject()
            && grants::count_in_sight(db, subject, few + 1).await? <= few
        {
            return Ok(among(grants::all_in_sight(subject)));
        }
        if let Some(term) = query.search.as_ref().filter(|term| texts::has_trigrams(term)) {
            let found = texts::holding_by_index(term);
            if estimate(db, &found).await? <= few
                && let Some(images) = texts::found_in_time(db, found, few + 1).await?
                && images.len() as u64 <= few
            {
                return Ok(Some(Condition::all().add(image::Column::Id.is_in(images))));
            }
        }
        let filters = Query { search: None, ..query.clone() };
        let filtered = matching(DbBackend::Postgres, &Sight::Everything, &filters);
        let is_few =
            estimate(db, &filtered.select_only().column(image::Column::Id).into_query()).await? <= few;
        Ok(is_few.then(Condition::all))
    }
}

/// How many rows Postgres expects of a statement, by its statistics.
async fn estimate(db: &impl ConnectionTrait, select: &SelectStatement) -> Result<u64, DbErr> {
    let statement = DbBackend::Postgres.build(select);
    let sql = format!("EXPLAIN {}", statement.sql);
    let explain = Statement { sql, ..statement };
    let plan = db.query_one_raw(explain).await?.ok_or_else(|| DbErr::RecordNotFound("a plan".to_owned()))?;
    let plan: String = plan.try_get_by_index(0)?;
    let rows = plan.split_once("rows=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    rows.ok_or_else(|| DbErr::Type(format!("a plan without rows: {plan}")))
}

/// Everything that is in sight and matches.
pub(super) fn matching(backend: DbBackend, sight: &Sight, query: &Query) -> Select<image::Entity> {
    image::Entity::find().filter(is_matching(backend, sight, query))
}

/// Whether an image is in sight and matches, looked up for each image in question.
fn is_matching(backend: DbBackend, sight: &Sight, query: &Query) -> Condition {
    is_matching_among("images", backend, sight, query)
}

/// The same of a table that has what indexes of orders have of `images`, beside them.
fn is_matching_among(table: &'static str, backend: DbBackend, sight: &Sight, query: &Query) -> Condition {
    let mut condition = is_let_through(table, sight, query);
    if let Some(term) = &query.search {
        condition = condition.add(texts::holds(backend, term));
    }
    condition
}

/// Whether an image is in sight and the filters let it through, whatever it is searched for.
fn is_let_through(table: &'static str, sight: &Sight, query: &Query) -> Condition {
    let column = |column: image::Column| Expr::col((table, column));
    let mut condition = grants::in_sight_among(table, sight);
    if let Some(template) = query.template {
        condition = condition.add(column(image::Column::Template).eq(template));
    }
    if !query.statuses.is_empty() {
        let statuses = query.statuses.iter().map(|status| rows::status_to_code(*status));
        condition = condition.add(column(image::Column::Status).is_in(statuses));
    }
    if let Some(enabled) = query.enabled {
        condition = condition.add(column(image::Column::Enabled).eq(enabled));
    }
    if let Some(pulled) = query.pulled {
        condition = condition.add(column(image::Column::Pulled).eq(pulled));
    }
    if let Some(creator) = &query.creator {
        condition = condition.add(column(image::Column::Creator).eq(creator));
    }
    condition
}

fn place_of(row: image::Model, order: &Order) -> Result<Place, DbErr> {
    Ok(order.place_of(&rows::image_from_row(row)?))
}

/// The column as an index may have it.
fn indexed(column: image::Column) -> Expr {
    Expr::col((image::Entity, column))
}

/// The column as no index has it, so that what is found is sorted.
pub(super) fn unindexed(column: image::Column) -> Expr {
    let column = || Expr::col((image::Entity, column));
    Func::coalesce([column(), column()]).into()
}

/// The terms of an order, and behind them the id.
fn terms(keys: &[(Key, Direction)], key_of: fn(image::Column) -> Expr) -> Vec<(Expr, SqlOrder)> {
    let of_keys = keys.iter().map(|(key, direction)| {
        let direction = match direction {
            Direction::Ascending => SqlOrder::Asc,
            Direction::Descending => SqlOrder::Desc,
        };
        (key_of(column(*key)), direction)
    });
    of_keys.chain([(key_of(image::Column::Id), SqlOrder::Asc)]).collect()
}

fn sorted_by(
    select: Select<image::Entity>,
    keys: &[(Key, Direction)],
    key_of: fn(image::Column) -> Expr,
) -> Select<image::Entity> {
    terms(keys, key_of).into_iter().fold(select, |select, (term, order)| select.order_by(term, order))
}

/// What comes behind a place: greater in a key, or equal in it and greater in the next. With fewer values than keys it is
/// behind all that have these.
fn beyond(
    select: Select<image::Entity>,
    keys: &[(Key, Direction)],
    after: Option<(&[KeyValue], Uuid)>,
    key_of: fn(image::Column) -> Expr,
) -> Select<image::Entity> {
    let Some((values, id)) = after else {
        return select;
    };
    let (mut begin, mut any, mut equal) = (Condition::all(), Condition::any(), Condition::all());
    for ((key, direction), value) in keys.iter().zip(values) {
        let value = key_value(*key, value);
        let (beyond, from) = match direction {
            Direction::Ascending => {
                (key_of(column(*key)).gt(value.clone()), key_of(column(*key)).gte(value.clone()))
            }
            Direction::Descending => {
                (key_of(column(*key)).lt(value.clone()), key_of(column(*key)).lte(value.clone()))
            }
        };
        any = any.add(equal.clone().add(beyond));
        // Where the index of the first key begins.
        if equal.is_empty() {
            begin = begin.add(from);
        }
        equal = equal.add(key_of(column(*key)).eq(value));
    }
    select.filter(begin).filter(any.add(equal.add(key_of(image::Column::Id).gt(id))))
}

fn column(key: Key) -> image::Column {
    match key {
        Key::Name => image::Column::Name,
        Key::Creator => image::Column::Creator,
        Key::Status => image::Column::Status,
        Key::ImageName => image::Column::ImageName,
        Key::Enabled => image::Column::Enabled,
        Key::Pulled => image::Column::Pulled,
        Key::CreateTime => image::Column::CreatedAt,
        Key::UpdateTime => image::Column::UpdatedAt,
    }
}

fn key_value(key: Key, value: &KeyValue) -> Value {
    match (key, value) {
        (_, KeyValue::Text(text)) => text.clone().into(),
        (Key::Enabled | Key::Pulled, KeyValue::Number(number)) => (*number != 0).into(),
        (Key::Status, KeyValue::Number(number)) => i32::try_from(*number).unwrap_or(i32::MAX).into(),
        (
            Key::Name | Key::Creator | Key::ImageName | Key::CreateTime | Key::UpdateTime,
            KeyValue::Number(number),
        ) => (*number).into(),
    }
}
