//! Lists in the order of updates, the last first, which SQLite's index has as they are: a page is one statement, mostly.

use sea_orm::{
    Condition, ConnectionTrait, DbErr, FromQueryResult,
    sea_query::{Expr, ExprTrait, JoinType, Order as SqlOrder, Query as SqlQuery},
};
use uuid::Uuid;

use super::{Asked, is_matching};
use crate::{
    error::Error,
    image::{ImageId, ImageInView, KeyValue, Place, Query, View},
    store::{
        entity::image,
        images,
        index::{self, Wanted},
    },
};

/// Images the index proposes, in its order: what was looked at last, and those that are in sight and match.
struct Looked {
    count: u64,
    last: Option<Candidate>,
    matching: Vec<(Candidate, ImageInView)>,
}

/// An image as the index has it.
#[derive(Clone, Debug)]
struct Candidate {
    place: i64,
    updated_at: i64,
    id: ImageId,
}

impl Candidate {
    /// The place behind it in the order.
    fn behind(&self) -> Place {
        Place { keys: vec![KeyValue::Number(self.updated_at)], id: self.id }
    }
}

impl<C: ConnectionTrait> Asked<'_, C> {
    /// The next images; the page ends with the image that was looked at last, matching or not, when it has looked at enough.
    pub(super) async fn latest_first(
        &self,
        query: &Query,
        after: Option<&Place>,
        limit: u64,
        view: View,
    ) -> Result<(Vec<ImageInView>, Option<Place>), Error> {
        let wanted = self.wanted(query).await?;
        let mut below = match after.map(|place| (place.keys.as_slice(), place.id)) {
            None => index::TOP,
            Some(([KeyValue::Number(updated_at)], id)) => {
                index::above_the_next(self.db, *updated_at, id.0).await?
            }
            Some(_) => return Err(DbErr::Type("a place of another order".to_owned()).into()),
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut found, mut last_found) = (Vec::new(), None);
        let mut left = self.bounds.candidates;
        // Mostly the candidates match.
        let mut length = limit as u64 + 1;
        loop {
            let looked = self.look(&wanted, query, view, below, length).await?;
            for (candidate, image) in looked.matching {
                if found.len() == limit {
                    return Ok((found, last_found.as_ref().map(Candidate::behind)));
                }
                found.push(image);
                last_found = Some(candidate);
            }
            let Some(last) = looked.last.filter(|_| looked.count == length) else {
                return Ok((found, None));
            };
            left = left.saturating_sub(length);
            if left == 0 {
                return Ok((found, Some(last.behind())));
            }
            below = last.place;
            let growth = match view {
                View::Basic => 4,
                // Configurations are large, and read of all that match.
                View::Full => 1,
            };
            length = std::cmp::min(length * growth, left);
        }
    }

    async fn look(
        &self,
        wanted: &Wanted,
        query: &Query,
        view: View,
        below: i64,
        length: u64,
    ) -> Result<Looked, Error> {
        let backend = self.db.get_database_backend();
        let image_id = (image::Entity, image::Column::Id);
        let on = Condition::all()
            .add(Expr::col(image_id).equals(("candidate", "image")))
            .add(is_matching(backend, self.sight, query));
        let mut select = SqlQuery::select();
        select
            .expr_as(Expr::col(("candidate", "place")), "candidate_place")
            .expr_as(Expr::col(("candidate", "updated_at")), "candidate_updated_at")
            .expr_as(Expr::col(("candidate", "image")), "candidate_image")
            .from_subquery(wanted.candidates(below, length), "candidate")
            .join(JoinType::LeftJoin, image::Entity, on)
            .order_by(("candidate", "place"), SqlOrder::Desc);
        images::select_viewed(&mut select, self.sight, view);
        let rows = self.db.query_all_raw(backend.build(&select)).await?;
        let mut looked = Looked { count: rows.len() as u64, last: None, matching: Vec::new() };
        for row in rows {
            let candidate = Candidate {
                place: row.try_get("", "candidate_place")?,
                updated_at: row.try_get("", "candidate_updated_at")?,
                id: ImageId(row.try_get("", "candidate_image")?),
            };
            if row.try_get::<Option<Uuid>>("", "id")?.is_some()
                && let Some((_, image)) =
                    images::viewed(image::Model::from_query_result(&row, "")?, &row, self.sight, view)?
            {
                looked.matching.push((candidate.clone(), image));
            }
            looked.last = Some(candidate);
        }
        Ok(looked)
    }
}
