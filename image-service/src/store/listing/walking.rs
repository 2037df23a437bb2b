//! Orders that are walked, because what is asked for is much.
//!
//! A key that has few values - a status, a flag, a creator - is walked value by value: within one value it is a filter, and the
//! rest of the order is left. What few images have together is sorted; only a key with many values, or the ids alone, is
//! walked image by image, off its index. So no order sorts more than a few images, whatever its keys are.

use futures_util::future::BoxFuture;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbBackend, DbErr, EntityTrait, IdenStatic, Iterable, QueryFilter,
    QuerySelect, QueryTrait, Select,
    sea_query::{Condition, Expr, ExprTrait, JoinType, Query as SqlQuery, SelectStatement},
};
use uuid::Uuid;

use super::{
    Asked, Few, Found, beyond, column, indexed, is_matching_among, key_value, matching, sorted_by, terms,
    unindexed,
};
use crate::{
    error::Error,
    image::{Direction, ImageId, ImageInView, Key, KeyValue, Place, Query, View},
    store::{entity::image, images, rows},
};

/// The stretch of the order that is walked.
pub(super) const WALKED: &str = "walked";

/// The walk of one call, and what it has found.
#[derive(Debug)]
pub(super) struct Walk<'a, C> {
    pub(super) asked: Asked<'a, C>,
    query: &'a Query,
    limit: usize,
    view: View,
    found: Vec<ImageInView>,
    /// Whether all that is asked for is known to be much.
    is_much: bool,
    /// How many images are looked at first.
    first_length: u64,
    /// How many images it may still look at.
    pub(super) left: u64,
    /// Whether the images that hold the term may yet be looked up, when none near does.
    pub(super) may_look_far: bool,
    /// Whether what the caller was granted may yet be sorted.
    pub(super) may_sort_granted: bool,
    /// Whether images of which none holds the term may yet be passed over.
    pub(super) may_pass_over: bool,
}

/// The images that have the same values of the keys before, in the order of the other keys.
#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    pub(super) before: Vec<(Key, KeyValue)>,
    pub(super) keys: &'a [(Key, Direction)],
    /// What is asked for, and these values.
    pub(super) query: Query,
}

impl Group<'_> {
    pub(super) fn values_before(&self) -> impl Iterator<Item = KeyValue> {
        self.before.iter().map(|(_, value)| value.clone())
    }

    /// Behind the images up to `id` of those that have this value of the first key.
    pub(super) fn place(&self, value: KeyValue, id: ImageId) -> Place {
        Place { keys: self.values_before().chain([value]).collect(), id }
    }
}

/// The keys and the id of the image to go on behind. With fewer keys, or [`ImageId::LAST`]: behind all images that have these.
pub(super) type After<'a> = Option<(&'a [KeyValue], Uuid)>;

/// Whether an order is walked image by image rather than value by value.
pub(super) fn is_walked_by_image(keys: &[(Key, Direction)]) -> bool {
    match keys {
        [(Key::Status | Key::Enabled | Key::Pulled | Key::Creator, _), ..] => false,
        [] | [(Key::Name | Key::ImageName | Key::CreateTime | Key::UpdateTime, _), ..] => true,
    }
}

impl<'a, C: ConnectionTrait> Walk<'a, C> {
    pub(super) fn new(asked: Asked<'a, C>, query: &'a Query, limit: u64, view: View) -> Self {
        // Mostly much matches, and a short stretch is enough.
        let first_length = limit.saturating_add(1).saturating_mul(4);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let left = asked.bounds.stretch;
        Self {
            asked,
            query,
            limit,
            view,
            found: Vec::new(),
            is_much: false,
            first_length,
            left,
            may_look_far: false,
            may_sort_granted: true,
            may_pass_over: true,
        }
    }

    fn all(&self) -> Group<'a> {
        Group { before: Vec::new(), keys: self.query.order.keys(), query: self.query.clone() }
    }

    /// The next images behind a place, if one statement finds them: mostly much matches, or few images can.
    pub(super) async fn at_once(&mut self, after: Option<&Place>) -> Result<Option<Found>, Error> {
        let (all, after) = (self.all(), after.map(behind));
        // Only a transaction limits the time that it takes to look up a term.
        let is_looked_up = self.looked_up(&all).is_some();
        let few =
            if is_looked_up { self.asked.few_in_sight().await? } else { self.asked.few(self.query).await? };
        if let Some(few) = few {
            let next = self.sort(&all, few, after).await?;
            return Ok(Some((std::mem::take(&mut self.found), next)));
        }
        self.is_much = !is_looked_up;
        if is_looked_up || !is_walked_by_image(all.keys) {
            return Ok(None);
        }
        let stretch = self.stretch(&all, after).limit(std::cmp::min(self.first_length, self.left));
        let next = self.look(&all, &stretch).await?;
        // It is known now not to be enough.
        self.first_length = self.first_length.saturating_mul(4);
        let found = std::mem::take(&mut self.found);
        Ok(next.map(|next| (found, Some(next))))
    }

    /// The same in a transaction, from the beginning.
    pub(super) fn within<T: ConnectionTrait>(self, txn: &'a T) -> Walk<'a, T> {
        let Self { is_much, first_length, .. } = self;
        let walk = Walk::new(self.asked.within(txn), self.query, self.limit as u64, self.view);
        Walk { is_much, first_length, ..walk }
    }

    /// The next images behind a place. To be called in a transaction.
    pub(super) async fn page(mut self, after: Option<&Place>) -> Result<Found, Error> {
        let next = self.walk(self.all(), after.map(behind)).await?;
        Ok((self.found, next))
    }

    /// Walks a group; where the next page begins, when this one is over.
    pub(super) fn walk<'b>(
        &'b mut self,
        group: Group<'a>,
        after: After<'b>,
    ) -> BoxFuture<'b, Result<Option<Place>, Error>>
    where
        'a: 'b,
    {
        Box::pin(async move {
            let is_much = self.is_much && group.before.is_empty();
            if !is_much && let Some(few) = self.few(&group, after).await? {
                return self.sort(&group, few, after).await;
            }
            if is_walked_by_image(group.keys) {
                self.walk_images(&group, after).await
            } else {
                self.walk_values(group, after).await
            }
        })
    }

    /// Sorts few images.
    async fn sort(&mut self, group: &Group<'_>, few: Few, after: After<'_>) -> Result<Option<Place>, Error> {
        let found = matching(self.backend(), self.asked.sight, &group.query).filter(few.among);
        let sorted = sorted_by(beyond(found, group.keys, after, unindexed), group.keys, unindexed);
        self.left = self.left.saturating_sub(few.count);
        Ok(self.take(group, sorted.limit(self.missing() as u64 + 1).into_query()).await?)
    }

    /// Looks at the images of a group one by one, in longer and longer stretches.
    async fn walk_images(&mut self, group: &Group<'_>, after: After<'_>) -> Result<Option<Place>, Error> {
        let mut after = after.map(|(values, id)| (values.to_vec(), id));
        let mut length = self.first_length;
        loop {
            length = std::cmp::min(length, self.left);
            let stretch = self.stretch(group, borrowed(&after));
            if let Some(next) = self.look(group, &stretch.clone().limit(length)).await? {
                return Ok(Some(next));
            }
            let Some(last) = self.last_of(&stretch, length).await? else {
                return Ok(None);
            };
            self.left -= length;
            let last = rows::image_from_row(last)?;
            let mut values: Vec<KeyValue> = group.keys.iter().map(|(key, _)| key.of(&last)).collect();
            let mut id = last.id;
            length *= 4;
            if self.found.is_empty() && (self.left == 0 || length > self.asked.bounds.near) {
                let here = (values.as_slice(), id.0);
                if let Some(few) = self.far(group, Some(here)).await? {
                    return self.sort(group, few, Some(here)).await;
                }
                if let Some(behind) = self.passed_over(group, &values).await? {
                    (values, id) = (behind, ImageId::LAST);
                    length = self.first_length;
                }
            }
            if self.left == 0 {
                let keys = group.values_before().chain(values).collect();
                return Ok(Some(Place { keys, id }));
            }
            after = Some((values, id.0));
        }
    }

    /// Takes what matches of a stretch; where the next page begins when this one is full.
    async fn look(
        &mut self,
        group: &Group<'_>,
        stretch: &Select<image::Entity>,
    ) -> Result<Option<Place>, DbErr> {
        let mut among = SqlQuery::select();
        among
            .columns(image::Column::iter().map(|column| (image::Entity, column)))
            .from_subquery(looked_at(stretch, group.keys), WALKED)
            .join(JoinType::CrossJoin, image::Entity, Condition::all())
            .cond_where(is_matching_among(WALKED, self.backend(), self.asked.sight, &group.query))
            .and_where(Expr::col((image::Entity, image::Column::Id)).equals((WALKED, image::Column::Id)))
            .limit(self.missing() as u64 + 1);
        // The order that the stretch is in already: no more of it is read than is taken.
        for (term, order) in terms(group.keys, |column| Expr::col((WALKED, column))) {
            among.order_by_expr(term, order);
        }
        self.take(group, among).await
    }

    /// The image at the end of a stretch of that length, if it is not shorter; the others are not read.
    pub(super) async fn last_of(
        &self,
        stretch: &Select<image::Entity>,
        length: u64,
    ) -> Result<Option<image::Model>, DbErr> {
        let last = stretch.clone().select_only().column(image::Column::Id).offset(length - 1).limit(1);
        image::Entity::find()
            .filter(image::Column::Id.in_subquery(last.into_query()))
            .one(self.asked.db)
            .await
    }

    /// The images of an order behind a place, whoever may see them.
    pub(super) fn stretch(&self, group: &Group<'_>, after: After<'_>) -> Select<image::Entity> {
        let mut select = image::Entity::find().filter(image::Column::Deleted.eq(false));
        // The ids alone are walked within a value of the last key, as its index has them.
        if let (true, Some((key, value))) = (group.keys.is_empty(), group.before.last()) {
            select = select.filter(column(*key).eq(key_value(*key, value)));
        }
        sorted_by(beyond(select, group.keys, after, indexed), group.keys, indexed)
    }

    /// Takes images that a statement finds into the page; where the next one begins when it is full.
    async fn take(&mut self, group: &Group<'_>, found: SelectStatement) -> Result<Option<Place>, DbErr> {
        let order = terms(group.keys, indexed);
        let found = images::all_viewed(self.asked.db, found, order, self.asked.sight, self.view).await?;
        let is_full = found.len() > self.missing();
        self.found.extend(found.into_iter().take(self.missing()));
        let last = self.found.last().filter(|_| is_full);
        Ok(last.map(|last| self.query.order.place_of(&last.image)))
    }

    pub(super) fn missing(&self) -> usize {
        self.limit - self.found.len()
    }

    pub(super) fn backend(&self) -> DbBackend {
        self.asked.db.get_database_backend()
    }
}

/// What the indexes of orders have of a stretch: the rest is read of those images that are let through.
pub(super) fn looked_at(stretch: &Select<image::Entity>, keys: &[(Key, Direction)]) -> SelectStatement {
    use image::Column::{Creator, Deleted, Enabled, Id, Pulled, Status, Template};
    let mut columns = vec![Id, Creator, Deleted, Template, Status, Enabled, Pulled];
    for key in keys.iter().map(|(key, _)| column(*key)) {
        if columns.iter().all(|column| column.as_str() != key.as_str()) {
            columns.push(key);
        }
    }
    stretch.clone().select_only().columns(columns).into_query()
}

fn behind(place: &Place) -> (&[KeyValue], Uuid) {
    (&place.keys, place.id.0)
}

pub(super) fn borrowed(after: &Option<(Vec<KeyValue>, Uuid)>) -> After<'_> {
    after.as_ref().map(|(values, id)| (values.as_slice(), *id))
}
