//! Answers that are remembered for requests that may be repeated: for a day, and the latest ones of each caller.

use std::{collections::BTreeMap, time::Duration};

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, QueryOrder,
    QuerySelect, sea_query::Expr,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Store,
    entity::answer,
    transaction::WriteTransaction,
    usage,
    values::{from_json, to_json},
};
use crate::{
    error::Error,
    image::UsageChange,
    request::{Request, RequestId},
    timestamp::Timestamp,
    turns::Turn,
};

/// Time for which an answer is remembered.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// Maximum size of the remembered answers to a caller, in bytes; the oldest are forgotten beyond it.
const MOST_BYTES: i64 = 64 << 20;
/// Number of answers that are deleted at a time.
const BATCH: u64 = 100;

impl Store {
    /// Deletes a batch of expired answers, and reports whether there may be more.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn purge_answers(&self) -> Result<bool, Error> {
        let end = self.now(&self.reader).await?.before(REMEMBERED);
        let due = answer::Entity::find().filter(answer::Column::AnsweredAt.lt(end));
        let due = due.order_by_asc(answer::Column::AnsweredAt);
        // Check first, without waiting for the writer.
        if keys(&self.reader, due.clone(), 1).await?.is_empty() {
            return Ok(false);
        }
        let txn = self.write(Turn::Background).await?;
        let deleted = keys(&txn, due, BATCH).await?;
        forget(&txn, &deleted);
        let mut released = BTreeMap::<&str, i64>::new();
        for Key { subject, bytes, .. } in &deleted {
            *released.entry(subject).or_default() -= bytes;
        }
        for (subject, bytes) in released {
            usage::charge(&txn, self, subject, UsageChange::of_answers(bytes)).await?;
        }
        txn.commit().await?;
        Ok(deleted.len() as u64 == BATCH)
    }

    /// Returns the answer that the same request got before, without a transaction.
    ///
    /// # Errors
    ///
    /// Returns [`Error::RequestIdReused`] if the id was used for another request.
    pub(crate) async fn remembered<T: DeserializeOwned>(
        &self,
        request: &Request,
    ) -> Result<Option<T>, Error> {
        if request.id.is_none() {
            return Ok(None);
        }
        remembered(&self.reader, request, self.now(&self.reader).await?).await
    }
}

/// Returns the answer that the same request got before, if it is still remembered.
pub(super) async fn remembered<T: DeserializeOwned>(
    db: &impl ConnectionTrait,
    request: &Request,
    now: Timestamp,
) -> Result<Option<T>, Error> {
    let Some(id) = &request.id else {
        return Ok(None);
    };
    let key = (request.caller.subject().to_owned(), id.as_str().to_owned());
    let found = answer::Entity::find_by_id(key).one(db).await?;
    match found.filter(|found| found.answered_at >= now.before(REMEMBERED)) {
        None => Ok(None),
        Some(found) if found.digest == id.digest() => Ok(Some(from_json(&found.json)?)),
        Some(_) => Err(Error::RequestIdReused),
    }
}

/// Remembers the answer to a request, and forgets the oldest ones of the caller that there is no room for.
pub(super) async fn remember(
    txn: &WriteTransaction,
    store: &Store,
    subject: &str,
    id: &RequestId,
    answer: &impl Serialize,
    now: Timestamp,
) -> Result<(), Error> {
    let json = to_json(answer)?;
    let bytes = i64::try_from(json.len() + subject.len() + id.as_str().len()).unwrap_or(i64::MAX);
    let row = answer::Model {
        subject: subject.to_owned(),
        request: id.as_str().to_owned(),
        digest: id.digest().to_owned(),
        json,
        bytes,
        answered_at: now,
    };
    let of_subject = || answer::Entity::find().filter(answer::Column::Subject.eq(subject));
    // An expired answer may still be there.
    let expired = keys(txn, of_subject().filter(answer::Column::Request.eq(id.as_str())), 1).await?;
    forget(txn, &expired);
    txn.defer(answer::Entity::insert(row.into_active_model()));
    let added = bytes - size(&expired);
    let used = usage::charge(txn, store, subject, UsageChange::of_answers(added)).await?;
    let mut excess = used.answer_bytes - MOST_BYTES;
    while excess > 0 {
        let others = of_subject().filter(answer::Column::Request.ne(id.as_str()));
        let mut oldest = keys(txn, others.order_by_asc(answer::Column::AnsweredAt), BATCH).await?;
        if oldest.is_empty() {
            break;
        }
        oldest.retain(|key| {
            let is_needed = excess > 0;
            excess -= if is_needed { key.bytes } else { 0 };
            is_needed
        });
        forget(txn, &oldest);
        usage::charge(txn, store, subject, UsageChange::of_answers(-size(&oldest))).await?;
    }
    Ok(())
}

/// The key of an answer, with its size in bytes.
#[derive(Debug, sea_orm::FromQueryResult)]
struct Key {
    subject: String,
    request: String,
    bytes: i64,
}

async fn keys(
    db: &impl ConnectionTrait,
    of: sea_orm::Select<answer::Entity>,
    limit: u64,
) -> Result<Vec<Key>, sea_orm::DbErr> {
    let columns = [answer::Column::Subject, answer::Column::Request, answer::Column::Bytes];
    of.select_only().columns(columns).limit(limit).into_model().all(db).await
}

fn size(keys: &[Key]) -> i64 {
    keys.iter().map(|key| key.bytes).sum()
}

fn forget(txn: &WriteTransaction, keys: &[Key]) {
    if keys.is_empty() {
        return;
    }
    let key = Expr::tuple([answer::Column::Subject, answer::Column::Request].map(Expr::col));
    let these = keys
        .iter()
        .map(|key| Expr::tuple([Expr::value(key.subject.as_str()), Expr::value(key.request.as_str())]));
    txn.defer(answer::Entity::delete_many().filter(key.is_in(these)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{access::Principal, dispatch::Policy};

    fn request(id: usize) -> Result<Request, String> {
        let caller = Principal::new("alice".to_owned(), Vec::new(), Timestamp::from_micros(i64::MAX));
        let id = Some(RequestId::parse(id.to_string(), String::new())?);
        Ok(Request { id, ..Request::plain(caller) })
    }

    #[tokio::test]
    async fn the_oldest_answers_of_a_caller_are_forgotten() -> Result<(), Box<dyn std::error::Error>> {
        const EACH: usize = 1 << 20;
        let directory = tempfile::tempdir()?;
        let store = Store::open(directory.path(), None, Policy::OF_TESTS).await?;
        let most = usize::try_from(MOST_BYTES)? / EACH;
        for id in 0..most + 3 {
            let answer = char::from(b'a' + u8::try_from(id % 26)?).to_string().repeat(EACH);
            store.transact(&request(id)?, async |_| Ok(answer)).await?;
        }
        let mut remembered = Vec::new();
        for id in 0..most + 3 {
            if store.remembered::<String>(&request(id)?).await?.is_some() {
                remembered.push(id);
            }
        }
        // Each takes a little more than its text.
        assert_eq!(remembered, (4..most + 3).collect::<Vec<_>>());
        let used = super::super::entity::creator::Entity::find_by_id("alice").one(&store.reader).await?;
        let used = used.ok_or("the usage of alice")?.answer_bytes;
        let kept = answer::Entity::find().all(&store.reader).await?;
        assert_eq!(used, kept.iter().map(|row| row.bytes).sum::<i64>());
        Ok(())
    }
}
