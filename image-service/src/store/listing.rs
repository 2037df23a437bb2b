//! Lists of images: what is in sight and matches, in an order, from a place on.
//!
//! A call does bounded work. When few images can match, because the term is rare or the caller sees few, all of them are
//! found and sorted. Otherwise the order is walked for a bounded stretch, and the page may be short.

use sea_orm::{
    ColumnTrait, Condition, DatabaseTransaction, DbBackend, DbErr, EntityTrait, ExprTrait, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect, QueryTrait, Select, Value,
    sea_query::{Expr, Func, Order as SqlOrder},
};

use super::{Store, entity::image, grants, images, rows, texts};
use crate::{
    access::Sight,
    error::Error,
    image::{Direction, ImageInView, Key, KeyValue, Place, Query, View},
};

/// A page of images.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) images: Vec<ImageInView>,
    /// Where the next page begins; none on the last one.
    pub(crate) next: Option<Place>,
    /// How many match on all pages together, if that was asked for.
    pub(crate) total: Option<u64>,
}

impl Store {
    /// How many images are few: sorted by every call rather than walked.
    const FEW: u64 = 10_000;
    /// How many images a call looks at when it walks.
    const STRETCH: u64 = 10_000;

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
        let txn = self.read().await?;
        let is_rare = is_rare(&txn, query).await?;
        let matching = image::Entity::find().filter(grants::in_sight(sight)).filter(matching(
            self.backend(),
            query,
            is_rare,
        ));
        let total = if with_total { Some(matching.clone().count(&txn).await?) } else { None };
        let (found, next) = if is_rare || sees_few(&txn, sight).await? {
            self.sorted(&txn, matching, query, after, limit).await?
        } else {
            self.walked(&txn, matching, query, after, limit).await?
        };
        let images = images::all_in_view(&txn, found, sight, view).await?;
        txn.commit().await?;
        Ok(Page { images, next, total })
    }

    async fn sorted(
        &self,
        txn: &DatabaseTransaction,
        matching: Select<image::Entity>,
        query: &Query,
        after: Option<&Place>,
        limit: u64,
    ) -> Result<(Vec<image::Model>, Option<Place>), Error> {
        // Not by the order's index: that would be to walk past everything else.
        let mut found =
            sorted_by(from(matching, query, after), query, unindexed).limit(limit + 1).all(txn).await?;
        let next = cut(&mut found, query, limit)?;
        Ok((found, next))
    }

    async fn walked(
        &self,
        txn: &DatabaseTransaction,
        matching: Select<image::Entity>,
        query: &Query,
        after: Option<&Place>,
        limit: u64,
    ) -> Result<(Vec<image::Model>, Option<Place>), Error> {
        // Mostly much matches, and a short stretch is enough.
        let short = std::cmp::min(limit.saturating_mul(4), Self::STRETCH);
        let (found, next) = within(txn, matching.clone(), query, after, short, limit).await?;
        if next.is_some() {
            return Ok((found, next));
        }
        let (found, next) = within(txn, matching, query, after, Self::STRETCH, limit).await?;
        if next.is_some() {
            return Ok((found, next));
        }
        // Nothing more within the stretch: the next page begins behind it, if it was a whole one.
        let last = stretch(query, after, 1).offset(Self::STRETCH - 1).one(txn).await?;
        Ok((found, last.map(|last| place_of(last, query)).transpose()?))
    }
}

/// The images of an order after a place, whoever may see them.
fn stretch(query: &Query, after: Option<&Place>, length: u64) -> Select<image::Entity> {
    let alive = image::Entity::find().filter(image::Column::Deleted.eq(false));
    ordered(from(alive, query, after), query).limit(length)
}

/// What matches within a stretch, and the place behind it if there is more within.
async fn within(
    txn: &DatabaseTransaction,
    matching: Select<image::Entity>,
    query: &Query,
    after: Option<&Place>,
    length: u64,
    limit: u64,
) -> Result<(Vec<image::Model>, Option<Place>), DbErr> {
    let ids = stretch(query, after, length).select_only().column(image::Column::Id).into_query();
    let matching = matching.filter(Expr::col((image::Entity, image::Column::Id)).in_subquery(ids));
    let mut found = ordered(matching, query).limit(limit + 1).all(txn).await?;
    let next = cut(&mut found, query, limit)?;
    Ok((found, next))
}

/// Whether few images hold what is looked for, so that an index finds all of them at once.
pub(super) async fn is_rare(txn: &DatabaseTransaction, query: &Query) -> Result<bool, DbErr> {
    let Some(term) = query.search.as_ref().filter(|term| term.is_possible()) else {
        return Ok(query.search.is_some());
    };
    let count = texts::count(txn, term, Store::FEW + 1).await?;
    Ok(count.is_some_and(|count| count <= Store::FEW))
}

/// Whether the caller sees so few images that all of them can be looked at.
pub(super) async fn sees_few(txn: &DatabaseTransaction, sight: &Sight) -> Result<bool, DbErr> {
    let Some(subject) = sight.subject() else {
        return Ok(false);
    };
    let created = image::Entity::find()
        .filter(image::Column::Creator.eq(subject))
        .select_only()
        .column(image::Column::Id)
        .limit(Store::FEW + 1)
        .count(txn)
        .await?;
    let granted = grants::granted_to(subject).limit(Store::FEW + 1).count(txn).await?;
    Ok(created + granted <= Store::FEW)
}

/// The images that a query asks for.
pub(super) fn matching(backend: DbBackend, query: &Query, is_rare: bool) -> Condition {
    let mut condition = Condition::all();
    if let Some(term) = &query.search {
        condition = condition.add(texts::holding(backend, term, is_rare));
    }
    if let Some(template) = query.template {
        condition = condition.add(image::Column::Template.eq(template));
    }
    if !query.statuses.is_empty() {
        let statuses = query.statuses.iter().map(|status| rows::status_to_code(*status));
        condition = condition.add(image::Column::Status.is_in(statuses));
    }
    if let Some(enabled) = query.enabled {
        condition = condition.add(image::Column::Enabled.eq(enabled));
    }
    if let Some(pulled) = query.pulled {
        condition = condition.add(image::Column::Pulled.eq(pulled));
    }
    if let Some(creator) = &query.creator {
        condition = condition.add(image::Column::Creator.eq(creator));
    }
    condition
}

/// Takes away what is over the limit; the place behind the rest then.
fn cut(found: &mut Vec<image::Model>, query: &Query, limit: u64) -> Result<Option<Place>, DbErr> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    if found.len() <= limit {
        return Ok(None);
    }
    found.truncate(limit);
    found.last().cloned().map(|last| place_of(last, query)).transpose()
}

fn place_of(row: image::Model, query: &Query) -> Result<Place, DbErr> {
    Ok(query.order.place_of(&rows::image_from_row(row)?))
}

/// In the order of the query, read off an index where there is one.
fn ordered(select: Select<image::Entity>, query: &Query) -> Select<image::Entity> {
    sorted_by(select, query, |column| Expr::col((image::Entity, column)))
}

/// The column as no index has it, so that what is found is sorted.
pub(super) fn unindexed(column: image::Column) -> Expr {
    let column = || Expr::col((image::Entity, column));
    Func::coalesce([column(), column()]).into()
}

fn sorted_by(
    select: Select<image::Entity>,
    query: &Query,
    key_of: fn(image::Column) -> Expr,
) -> Select<image::Entity> {
    let by_keys = query.order.keys().iter().fold(select, |select, (key, direction)| {
        let direction = match direction {
            Direction::Ascending => SqlOrder::Asc,
            Direction::Descending => SqlOrder::Desc,
        };
        select.order_by(key_of(column(*key)), direction)
    });
    by_keys.order_by_asc(key_of(image::Column::Id))
}

/// What comes after a place: greater in a key, or equal in it and greater in the next.
fn from(select: Select<image::Entity>, query: &Query, after: Option<&Place>) -> Select<image::Entity> {
    let Some(after) = after else {
        return select;
    };
    let mut any = Condition::any();
    let mut equal = Condition::all();
    for ((key, direction), value) in query.order.keys().iter().zip(&after.keys) {
        let column = column(*key);
        let value = key_value(*key, value);
        let beyond = match direction {
            Direction::Ascending => column.gt(value.clone()),
            Direction::Descending => column.lt(value.clone()),
        };
        any = any.add(equal.clone().add(beyond));
        equal = equal.add(column.eq(value));
    }
    select.filter(any.add(equal.add(image::Column::Id.gt(after.id.0))))
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
