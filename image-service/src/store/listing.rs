//! Lists of images: what is in sight and matches, in an order, from a place on.
//!
//! A call does bounded work. When few images can match, all of them are found by an index and sorted. Otherwise the order is
//! walked for a bounded stretch, and the page may be short. On SQLite the order of updates is that of the index itself, see
//! [`index`](super::index).

use std::sync::OnceLock;

use sea_orm::{
    Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait, ExprTrait, PaginatorTrait, QueryFilter,
    QueryOrder, QuerySelect, QueryTrait, Select, Statement, Value,
    sea_query::{Expr, Func, Order as SqlOrder, SelectStatement},
};
use uuid::Uuid;

use super::{Store, entity::image, eras, grants, index::Wanted, rows, texts};
use crate::{
    access::Sight,
    error::Error,
    image::{Direction, ImageId, ImageInView, Key, KeyValue, Order, Place, Query, View},
};

mod looking_up;
mod recent;
#[cfg(test)]
mod tests;
mod values;
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
type Found = (Vec<ImageInView>, Option<Place>);

/// How much a call does at most.
#[derive(Copy, Clone, Debug)]
pub(super) struct Bounds {
    /// How many images are few: sorted by every call rather than walked.
    few: u64,
    /// How many images a call looks at when it walks.
    stretch: u64,
    /// How many of those that the index proposes.
    candidates: u64,
    /// How many images are near: when none of them matches, those that do may be looked up or passed over to.
    near: u64,
    /// On Postgres, how many images that the caller was granted are sorted then, if those of another are asked for.
    granted: u64,
    /// On Postgres, how large eras are.
    pub(super) eras: eras::Sizes,
}

impl Bounds {
    pub(super) const DEFAULT: Self = Self {
        few: 4_000,
        stretch: 4_000,
        candidates: 1_500,
        near: 500,
        granted: 10_000,
        eras: eras::Sizes::DEFAULT,
    };
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
        let total = if with_total {
            Some(matching(self.backend(), sight, query).count(&self.reader).await?)
        } else {
            None
        };
        let asked = Asked::new(&self.reader, sight, self.bounds);
        if self.backend() == DbBackend::Sqlite && query.order == Order::default() {
            let (images, next) = asked.latest_first(query, after, limit, view).await?;
            return Ok(Page { images, next, total });
        }
        let mut walk = Walk::new(asked, query, limit, view);
        if let Some((images, next)) = walk.at_once(after).await? {
            return Ok(Page { images, next, total });
        }
        // Where one stretch ends the next begins, so they have to be of the same images.
        let txn = self.read().await?;
        let (images, next) = walk.within(&txn).page(after).await?;
        txn.commit().await?;
        Ok(Page { images, next, total })
    }
}

/// Who asks, and with what bounds, in one call.
#[derive(Debug)]
pub(super) struct Asked<'a, C> {
    db: &'a C,
    sight: &'a Sight,
    bounds: Bounds,
    /// On Postgres, how many images the caller sees, counted as far as they are few.
    in_sight: OnceLock<u64>,
}

/// Few images, among which all that match are.
#[derive(Debug)]
pub(super) struct Few {
    pub(super) among: Condition,
    /// About how many there are.
    pub(super) count: u64,
}

impl Few {
    fn among(ids: SelectStatement, count: u64) -> Self {
        let id = Expr::col((image::Entity, image::Column::Id));
        Self { among: Condition::all().add(id.in_subquery(ids)), count }
    }
}

impl<'a, C: ConnectionTrait> Asked<'a, C> {
    pub(super) fn new(db: &'a C, sight: &'a Sight, bounds: Bounds) -> Self {
        Self { db, sight, bounds, in_sight: OnceLock::new() }
    }

    /// The same in a transaction.
    fn within<T>(self, txn: &'a T) -> Asked<'a, T> {
        Asked { db: txn, sight: self.sight, bounds: self.bounds, in_sight: self.in_sight }
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
    pub(super) async fn few(&self, query: &Query) -> Result<Option<Few>, DbErr> {
        let Self { db, bounds: Bounds { few, .. }, .. } = *self;
        if db.get_database_backend() == DbBackend::Sqlite {
            let wanted = self.wanted(query).await?;
            let count = wanted.count(db, few + 1).await?;
            return Ok((count <= few).then(|| Few::among(wanted.images(), count)));
        }
        if query.search.as_ref().is_some_and(|term| !term.is_possible()) {
            return Ok(Some(Few { among: Condition::all(), count: 0 }));
        }
        if let Some(few) = self.few_in_sight().await? {
            return Ok(Some(few));
        }
        self.few_let_through(query).await
    }

    /// On Postgres, all images that the caller was granted, if they are not too many and another's are asked for.
    async fn granted(&self, query: &Query) -> Result<Option<Few>, DbErr> {
        let (Some(subject), Some(creator), None, DbBackend::Postgres) =
            (self.sight.subject(), &query.creator, &query.search, self.db.get_database_backend())
        else {
            return Ok(None);
        };
        if subject == creator {
            return Ok(None);
        }
        let most = self.bounds.granted;
        let count = grants::count(self.db, grants::all_granted(subject), most + 1).await?;
        Ok((count <= most).then(|| Few::among(grants::all_granted(subject), count)))
    }

    /// On Postgres, all images that the caller sees, if they are few.
    async fn few_in_sight(&self) -> Result<Option<Few>, DbErr> {
        let Some(subject) = self.sight.subject() else {
            return Ok(None);
        };
        let few = self.bounds.few;
        let count = match self.in_sight.get() {
            Some(count) => *count,
            None => {
                let count = grants::count(self.db, grants::all_in_sight(subject), few + 1).await?;
                *self.in_sight.get_or_init(|| count)
            }
        };
        Ok((count <= few).then(|| Few::among(grants::all_in_sight(subject), count)))
    }

    /// On Postgres, the images that the filters let through, if by its statistics they are few.
    async fn few_let_through(&self, query: &Query) -> Result<Option<Few>, DbErr> {
        let filters = Query { search: None, ..query.clone() };
        if filters.lets_all_through() && walking::is_walked_by_image(query.order.keys()) {
            return Ok(None);
        }
        let filtered = matching(DbBackend::Postgres, &Sight::Everything, &filters);
        let count = estimate(self.db, &filtered.select_only().column(image::Column::Id).into_query()).await?;
        Ok((count <= self.bounds.few).then(|| Few { among: Condition::all(), count }))
    }

    /// The same as [`Self::few`] for one who waits for all of them, however long that takes: by statistics alone.
    pub(super) async fn few_of_all(&self, query: &Query) -> Result<Option<Few>, DbErr> {
        if let (DbBackend::Postgres, Some(term)) = (self.db.get_database_backend(), &query.search)
            && term.is_possible()
        {
            let found = texts::holding_by_index(term);
            let count = estimate(self.db, &found).await?;
            if count <= self.bounds.few {
                return Ok(Some(Few::among(found, count)));
            }
            return self.few(&Query { search: None, ..query.clone() }).await;
        }
        self.few(query).await
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
        // Where the index of the first key begins: behind all that have this value, if there is nothing else to go by.
        if equal.is_empty() {
            let is_over = values.len() == 1 && id == ImageId::LAST.0;
            begin = begin.add(if is_over { beyond.clone() } else { from });
        }
        any = any.add(equal.clone().add(beyond));
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
