//! Terms as Postgres looks them up in a walk: at once when few images hold one, and when none near has it, for all may be far. Then it
//! also passes over images of which none holds it, and sorts what the caller was granted of another's.

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait, QueryFilter, QuerySelect,
    QueryTrait,
};

use super::{
    Few, beyond, estimate, is_let_through, sorted_by, unindexed,
    walking::{After, Group, Walk},
};
use crate::{
    image::{Direction, Key, KeyValue},
    search::Term,
    store::{
        entity::image,
        eras::{self, Passed},
        texts,
    },
};

impl<C: ConnectionTrait> Walk<'_, C> {
    /// As often as few: whatever the statistics say, so many images may be sorted in time. Of what has no trigram they know what is
    /// common alone.
    const STILL_SORTED: u64 = 5;

    /// The images among which all that match of a group are, if they are few; or the next ones of them.
    pub(super) async fn few(&mut self, group: &Group<'_>, after: After<'_>) -> Result<Option<Few>, DbErr> {
        let Some(term) = self.looked_up(group) else {
            return self.asked.few(&group.query).await;
        };
        if let Some(few) = self.asked.few_in_sight().await? {
            return Ok(Some(few));
        }
        if group.before.is_empty() {
            let count = estimate(self.asked.db, &texts::holding_by_index(term)).await?;
            let few = self.asked.bounds.few;
            if count > few {
                self.may_look_far = !texts::has_trigrams(term) || count <= few * Self::STILL_SORTED;
            } else if let Some(few) = self.next_holding(term, group, after).await? {
                return Ok(Some(few));
            } else {
                // All that makes up the term is in many texts and the term in few, so eras do not tell in time either.
                self.may_pass_over = false;
            }
        }
        self.asked.few_let_through(&group.query).await
    }

    /// The term of a group, if Postgres' indexes are to find it.
    pub(super) fn looked_up<'b>(&self, group: &'b Group<'_>) -> Option<&'b Term> {
        group.query.search.as_ref().filter(|term| self.backend() == DbBackend::Postgres && term.is_possible())
    }

    /// The images among which all that match behind a place are, when none near it does: once in a call.
    pub(super) async fn far(&mut self, group: &Group<'_>, after: After<'_>) -> Result<Option<Few>, DbErr> {
        if let Some(term) = self.looked_up(group)
            && std::mem::take(&mut self.may_look_far)
            && let Some(few) = self.next_holding(term, group, after).await?
        {
            return Ok(Some(few));
        }
        if std::mem::take(&mut self.may_sort_granted) {
            self.asked.granted(&group.query).await
        } else {
            Ok(None)
        }
    }

    /// The place to go on behind, when none near it holds the term and eras tell that none does up to there either: once in a call.
    pub(super) async fn passed_over(
        &mut self,
        group: &Group<'_>,
        after: &[KeyValue],
    ) -> Result<Option<Vec<KeyValue>>, DbErr> {
        let (Some(term), Some((Key::UpdateTime, Direction::Descending)), Some(KeyValue::Number(updated_at))) =
            (self.looked_up(group), group.keys.first(), after.first())
        else {
            return Ok(None);
        };
        if !self.may_pass_over {
            return Ok(None);
        }
        let passed = eras::pass_over(self.asked.db, self.asked.bounds.eras, term, *updated_at).await?;
        let Some(Passed { since, is_late }) = passed else {
            // It is among the latest yet.
            return Ok(None);
        };
        self.may_pass_over = false;
        if is_late && since.is_some() {
            self.left = 0;
        }
        // Behind all that were updated right after that.
        Ok(since.map(|since| vec![KeyValue::Number(since.saturating_add(1))]))
    }

    /// The next images behind a place that hold the term; none when there are too many to be sorted in time.
    async fn next_holding(
        &self,
        term: &Term,
        group: &Group<'_>,
        after: After<'_>,
    ) -> Result<Option<Few>, DbErr> {
        let holding = image::Entity::find()
            .filter(is_let_through("images", self.asked.sight, &group.query))
            .filter(image::Column::Id.in_subquery(texts::holding_by_index(term)));
        let sorted = sorted_by(beyond(holding, group.keys, after, unindexed), group.keys, unindexed);
        let sorted = sorted.select_only().column(image::Column::Id).into_query();
        let found = texts::found_in_time(self.asked.db, sorted, self.missing() as u64 + 1).await?;
        Ok(found.map(|found| {
            let count = found.len() as u64;
            Few { among: Condition::all().add(image::Column::Id.is_in(found)), count }
        }))
    }
}
