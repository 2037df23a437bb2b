//! Callers' writes: a repeated request gets the answer that it got the first time.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, QuerySelect,
    QueryTrait,
    sea_query::{Expr, OnConflict},
};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Store,
    entity::{answer, image},
    images,
    transaction::WriteTransaction,
    values::{from_json, to_json},
};
use crate::{
    access::{Action, Standing},
    dispatch::Effects,
    error::{Error, Resource},
    image::{Image, ImageId, Precondition},
    request::Request,
    timestamp::Timestamp,
    turns::Turn,
};

/// A transaction for a caller's request.
#[derive(Debug)]
pub(crate) struct RequestTransaction<'a> {
    pub(super) store: &'a Store,
    pub(super) request: &'a Request,
    pub(super) txn: WriteTransaction,
    pub(super) now: Timestamp,
    pub(super) effects: Effects,
}

/// A locked image, with the caller's standing towards it.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) row: image::Model,
    pub(super) image: Image,
    pub(super) standing: Standing,
}

impl Store {
    /// Time for which the answer to a request is remembered.
    const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

    /// Deletes a batch of expired answers, and reports whether there may be more.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TooManyWrites`] if too many background writes wait, [`Error::Busy`] if the database
    /// is locked or down, and [`Error::Internal`] if it fails otherwise.
    pub(crate) async fn purge_answers(&self) -> Result<bool, Error> {
        const BATCH: u64 = 100;
        let end = self.now(&self.reader).await?.before(Self::REMEMBERED);
        let due = answer::Entity::find()
            .select_only()
            .columns([answer::Column::Subject, answer::Column::Request])
            .filter(answer::Column::AnsweredAt.lt(end))
            .limit(BATCH);
        // Check first, without waiting for the writer.
        if due.clone().into_tuple::<(String, String)>().one(&self.reader).await?.is_none() {
            return Ok(false);
        }
        let txn = self.write(Turn::Background).await?;
        let key = Expr::tuple([answer::Column::Subject, answer::Column::Request].map(Expr::col));
        let deleted = answer::Entity::delete_many().filter(key.in_subquery(due.into_query()));
        let deleted = deleted.exec(&txn).await?.rows_affected;
        txn.commit().await?;
        Ok(deleted == BATCH)
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

    /// Answers a request by performing a write, or as it was answered before.
    ///
    /// A refused write leaves no trace and has no effects. Every answer waits until the data that it depends
    /// on is durable.
    ///
    /// # Errors
    ///
    /// Returns the error of `write`, [`Error::RequestIdReused`] if the id was used for another request, and
    /// [`Error::TooManyWrites`] if too many writes of the caller wait.
    pub(crate) async fn transact<T: Serialize + DeserializeOwned>(
        &self,
        request: &Request,
        write: impl AsyncFnOnce(&mut RequestTransaction<'_>) -> Result<T, Error>,
    ) -> Result<(T, Effects), Error> {
        let txn = self.write(Turn::Caller(&request.caller)).await?;
        let now = self.now(&txn).await?;
        if let Some(answer) = remembered(&txn, request, now).await? {
            txn.rollback().await?;
            return Ok((answer, Effects::default()));
        }
        let mut begun = RequestTransaction { store: self, request, txn, now, effects: Effects::default() };
        let answer = write(&mut begun).await;
        let RequestTransaction { txn, effects, .. } = begun;
        let answer = match answer {
            Ok(answer) => answer,
            Err(refused) => {
                txn.rollback().await?;
                return Err(refused);
            }
        };
        if let Some(id) = &request.id {
            let row = answer::Model {
                subject: request.caller.subject().to_owned(),
                request: id.as_str().to_owned(),
                digest: id.digest().to_owned(),
                json: to_json(&answer)?,
                answered_at: now,
            };
            // An expired answer may still be there.
            let anew = OnConflict::columns([answer::Column::Subject, answer::Column::Request])
                .update_columns([answer::Column::Digest, answer::Column::Json, answer::Column::AnsweredAt])
                .to_owned();
            txn.defer(answer::Entity::insert(row.into_active_model()).on_conflict(anew));
        }
        txn.commit().await?;
        Ok((answer, effects))
    }
}

impl RequestTransaction<'_> {
    /// Loads and locks an image and checks that the caller may do `action` to it now.
    pub(super) async fn target(
        &self,
        id: ImageId,
        etag: Option<Precondition>,
        action: Action,
    ) -> Result<Target, Error> {
        let target = self.seen(id).await?;
        target.image.admit(target.standing, etag, action)?;
        Ok(target)
    }

    /// Loads and locks an image that the caller sees.
    pub(super) async fn seen(&self, id: ImageId) -> Result<Target, Error> {
        let row = image::Entity::find_by_id(id)
            .filter(image::Column::Deleted.eq(false))
            .lock_exclusive()
            .one(&self.txn)
            .await?
            .ok_or(Error::NotFound(Resource::Image(id)))?;
        let standing = images::standing(&self.txn, &self.request.caller.visibility(), &row).await?;
        let standing = standing.ok_or(Error::NotFound(Resource::Image(id)))?;
        Ok(Target { image: row.clone().into(), row, standing })
    }
}

/// Returns the answer that the same request got before, if it is still remembered.
async fn remembered<T: DeserializeOwned>(
    db: &impl ConnectionTrait,
    request: &Request,
    now: Timestamp,
) -> Result<Option<T>, Error> {
    let Some(id) = &request.id else {
        return Ok(None);
    };
    let key = (request.caller.subject().to_owned(), id.as_str().to_owned());
    let found = answer::Entity::find_by_id(key).one(db).await?;
    match found.filter(|found| found.answered_at >= now.before(Store::REMEMBERED)) {
        None => Ok(None),
        Some(found) if found.digest == id.digest() => Ok(Some(from_json(&found.json)?)),
        Some(_) => Err(Error::RequestIdReused),
    }
}
