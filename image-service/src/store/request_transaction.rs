//! Callers' writes: a repeated request gets the answer that it got the first time.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QuerySelect};
use serde::{Serialize, de::DeserializeOwned};

use super::{Store, answers, entity::image, images, transaction::WriteTransaction, usage};
use crate::{
    access::{Action, Standing},
    dispatch::Effects,
    error::{Error, Resource},
    image::{Image, ImageId, Precondition, UsageChange},
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
        if let Some(answer) = answers::remembered(&txn, request, now).await? {
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
            answers::remember(&txn, self, request.caller.subject(), id, &answer, now).await?;
        }
        txn.commit().await?;
        Ok((answer, effects))
    }
}

impl RequestTransaction<'_> {
    /// Adds `change` to the usage of a creator.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`usage::charge`].
    pub(super) async fn charge(&self, subject: &str, change: UsageChange) -> Result<(), Error> {
        usage::charge(&self.txn, self.store, subject, change).await?;
        Ok(())
    }

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
