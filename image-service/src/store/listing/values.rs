//! A walk over the values of a key that has few of them.

use std::{collections::BTreeSet, ops::Bound};

use sea_orm::{
    ConnectionTrait, DbErr, QuerySelect,
    sea_query::{Expr, ExprTrait, Query as SqlQuery},
};

use super::{
    is_let_through, terms,
    walking::{After, Group, WALKED, Walk, borrowed, looked_at},
};
use crate::{
    access::Sight,
    error::Error,
    image::{Direction, ImageId, Key, KeyValue, Place, Query, Status},
    store::{entity::image, grants},
};

/// What comes behind a value of a key.
#[derive(Debug)]
enum Next {
    Value(KeyValue),
    Nothing,
    /// None that was looked at: this value comes next, or one behind it.
    NotBefore(KeyValue),
}

impl<'a, C: ConnectionTrait> Walk<'a, C> {
    /// Walks the groups that the values of the first key make.
    pub(super) async fn walk_values(
        &mut self,
        group: Group<'a>,
        after: After<'_>,
    ) -> Result<Option<Place>, Error> {
        let Some((key, rest)) = group.keys.split_first() else {
            return Ok(None);
        };
        let creators = if key.0 == Key::Creator { self.creators_in_sight(&group).await? } else { None };
        let creators = creators.as_ref();
        let mut within = after.and_then(|(values, id)| Some((values.get(1..)?, id)));
        let mut next = match after.and_then(|(values, id)| Some((values.first()?, values.len(), id))) {
            // All of this value has been.
            Some((first, 1, id)) if id == ImageId::LAST.0 => {
                within = None;
                self.next_value(&group, *key, creators, Some(first)).await?
            }
            Some((first, ..)) => Next::Value(first.clone()),
            None => self.next_value(&group, *key, creators, None).await?,
        };
        loop {
            let value = match next {
                Next::Value(value) => value,
                Next::Nothing => return Ok(None),
                Next::NotBefore(value) => return Ok(Some(group.place(value, ImageId::FIRST))),
            };
            if let Some(query) = narrow(&group.query, key.0, &value) {
                let mut before = group.before.clone();
                before.push((key.0, value.clone()));
                if let Some(next) = self.walk(Group { before, keys: rest, query }, within).await? {
                    return Ok(Some(next));
                }
            }
            within = None;
            self.left = self.left.saturating_sub(Self::COST_OF_GROUP);
            if self.left == 0 {
                return Ok(Some(group.place(value, ImageId::LAST)));
            }
            next = self.next_value(&group, *key, creators, Some(&value)).await?;
        }
    }

    /// As much as to look at so many images.
    const COST_OF_GROUP: u64 = 100;

    /// The value of a key that comes behind another, or the first one.
    async fn next_value(
        &mut self,
        group: &Group<'_>,
        (key, direction): (Key, Direction),
        creators: Option<&BTreeSet<KeyValue>>,
        after: Option<&KeyValue>,
    ) -> Result<Next, Error> {
        if key == Key::Creator {
            return match creators {
                Some(creators) => Ok(next_of(creators, direction, after)),
                None => self.next_creator(group, direction, after).await,
            };
        }
        let last = if key == Key::Status { Status::ALL.len() as i64 } else { 1 };
        let next = match (direction, after) {
            (Direction::Ascending, None) => 0,
            (Direction::Descending, None) => last,
            (Direction::Ascending, Some(KeyValue::Number(after))) => after + 1,
            (Direction::Descending, Some(KeyValue::Number(after))) => after - 1,
            (_, Some(KeyValue::Text(_))) => return Ok(Next::Nothing),
        };
        Ok(if (0..=last).contains(&next) { Next::Value(KeyValue::Number(next)) } else { Next::Nothing })
    }

    /// The creators of whom the caller may see an image that is let through, unless it is an admin, or was granted so many that they are met
    /// with on the way.
    async fn creators_in_sight(&mut self, group: &Group<'_>) -> Result<Option<BTreeSet<KeyValue>>, DbErr> {
        let (Some(subject), None) = (self.asked.sight.subject(), &group.query.creator) else {
            return Ok(None);
        };
        let most = self.asked.bounds.near;
        let granted = grants::count(self.asked.db, grants::all_granted(subject), most + 1).await?;
        if granted > most {
            return Ok(None);
        }
        self.left = std::cmp::max(1, self.left.saturating_sub(granted));
        let mut found = SqlQuery::select();
        found
            .distinct()
            .column((image::Entity, image::Column::Creator))
            .from(image::Entity)
            .cond_where(is_let_through("images", &Sight::Everything, &group.query))
            .and_where(
                Expr::col((image::Entity, image::Column::Id)).in_subquery(grants::all_granted(subject)),
            );
        let rows = self.asked.db.query_all_raw(self.backend().build(&found)).await?;
        let granted = rows.iter().map(|row| Ok(KeyValue::Text(row.try_get_by_index(0)?)));
        granted.chain([Ok(KeyValue::Text(subject.to_owned()))]).collect::<Result<_, DbErr>>().map(Some)
    }

    /// The next creator of whom the caller sees an image: the images are walked in the order of their creators.
    async fn next_creator(
        &mut self,
        group: &Group<'_>,
        direction: Direction,
        after: Option<&KeyValue>,
    ) -> Result<Next, Error> {
        if let Some(creator) = &group.query.creator {
            let only = KeyValue::Text(creator.clone());
            let is_behind = after.is_none_or(|after| match direction {
                Direction::Ascending => only > *after,
                Direction::Descending => only < *after,
            });
            return Ok(if is_behind { Next::Value(only) } else { Next::Nothing });
        }
        let order = [(Key::Creator, direction)];
        let by_creator = Group { before: Vec::new(), keys: &order, query: group.query.clone() };
        let mut after = after.map(|value| (vec![value.clone()], ImageId::LAST.0));
        let mut length = Self::COST_OF_GROUP;
        loop {
            length = std::cmp::min(length, self.left);
            let stretch = self.stretch(&by_creator, borrowed(&after));
            let mut first = SqlQuery::select();
            first
                .column((WALKED, image::Column::Creator))
                .from_subquery(looked_at(&stretch.clone().limit(length), &order), WALKED)
                .cond_where(is_let_through(WALKED, self.asked.sight, &group.query))
                .limit(1);
            for (term, order) in terms(&order, |column| Expr::col((WALKED, column))) {
                first.order_by_expr(term, order);
            }
            if let Some(row) = self.asked.db.query_one_raw(self.backend().build(&first)).await? {
                return Ok(Next::Value(KeyValue::Text(row.try_get_by_index(0)?)));
            }
            let Some(last) = self.last_of(&stretch, length).await? else {
                return Ok(Next::Nothing);
            };
            self.left -= length;
            let creator = KeyValue::Text(last.creator);
            if self.left == 0 {
                return Ok(Next::NotBefore(creator));
            }
            after = Some((vec![creator], last.id));
            length *= 4;
        }
    }
}

/// The value that comes behind another, or the first one.
fn next_of(values: &BTreeSet<KeyValue>, direction: Direction, after: Option<&KeyValue>) -> Next {
    let after = after.map_or(Bound::Unbounded, Bound::Excluded);
    let next = match direction {
        Direction::Ascending => values.range((after, Bound::Unbounded)).next(),
        Direction::Descending => values.range((Bound::Unbounded, after)).next_back(),
    };
    next.cloned().map_or(Next::Nothing, Next::Value)
}

/// The images of a query that have a value of a key; `None` when there are none.
fn narrow(query: &Query, key: Key, value: &KeyValue) -> Option<Query> {
    let mut narrowed = query.clone();
    match (key, value) {
        (Key::Creator, KeyValue::Text(creator)) => narrowed.creator = Some(creator.clone()),
        (Key::Enabled, KeyValue::Number(enabled)) => narrowed.enabled = Some(*enabled != 0),
        (Key::Pulled, KeyValue::Number(pulled)) => narrowed.pulled = Some(*pulled != 0),
        // A template has no status, and nothing else has none.
        (Key::Status, KeyValue::Number(0)) => narrowed.template = Some(true),
        (Key::Status, KeyValue::Number(rank)) => {
            let status = Status::ALL.into_iter().find(|status| status.rank() == *rank)?;
            narrowed.statuses = BTreeSet::from([status]);
        }
        _ => return None,
    }
    let is_within = (query.creator.is_none() || query.creator == narrowed.creator)
        && (query.enabled.is_none() || query.enabled == narrowed.enabled)
        && (query.pulled.is_none() || query.pulled == narrowed.pulled)
        && (query.template.is_none() || query.template == narrowed.template)
        && (query.statuses.is_empty() || query.statuses.is_superset(&narrowed.statuses));
    is_within.then_some(narrowed)
}
