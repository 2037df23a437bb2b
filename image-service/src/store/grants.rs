//! Grants: permissions on an image for others than its creator.

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, ModelTrait, PaginatorTrait, QueryFilter,
    QueryOrder, QuerySelect, Set, sea_query::OnConflict,
};

use super::{
    Store,
    change_log::{self, NewChange},
    entity::{grant, image},
    request_transaction::RequestTransaction,
    transaction::WriteTransaction,
};
use crate::{
    access::{Action, Grantee, Permissions, Visibility},
    change::ChangeKind,
    error::{Error, Refusal},
    image::{Image, ImageId, Precondition, UsageChange},
};

const GRANT_BYTES: i64 = Image::GRANT_BYTES as i64;

impl Store {
    pub(crate) const MAX_GRANTS: u64 = 1_000;

    /// Returns the next grants of an image, in the order of their grantees.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn grants(
        &self,
        id: ImageId,
        after: Option<&Grantee>,
        limit: u64,
    ) -> Result<Vec<(Grantee, Permissions)>, Error> {
        let mut query = grant::Entity::find()
            .filter(grant::Column::Image.eq(id))
            .order_by_asc(grant::Column::Grantee)
            .limit(limit);
        if let Some(grantee) = after {
            query = query.filter(grant::Column::Grantee.gt(grantee.clone()));
        }
        Ok(query.all(&self.reader).await?.into_iter().map(from_row).collect())
    }
}

impl RequestTransaction<'_> {
    /// Sets the permissions of a grantee on an image. Empty permissions revoke the grant.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller does not see the image, [`Error::Forbidden`] if it may not
    /// share the image, [`Error::Refused`] if the image has too many grants, and
    /// [`Error::CreatorQuotaExceeded`] or [`Error::CatalogueFull`] if a quota leaves no room.
    pub(crate) async fn grant(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        grantee: Grantee,
        permissions: Permissions,
    ) -> Result<Permissions, Error> {
        let target = self.target(id, etag, Action::Share).await?;
        let has_then = target.image.permissions_of(&grantee, permissions);
        let found = grant::Entity::find_by_id((id, grantee.clone())).one(&self.txn).await?;
        if found.as_ref().map(permissions_of).unwrap_or_default() == permissions {
            return Ok(has_then);
        }
        let added = match (found.is_some(), permissions.can_view()) {
            (true, false) => -GRANT_BYTES,
            (false, true) => GRANT_BYTES,
            _ => 0,
        };
        let of_image = grant::Entity::find().filter(grant::Column::Image.eq(id));
        if added > 0 && of_image.count(&self.txn).await? >= Store::MAX_GRANTS {
            return Err(Error::Refused(Refusal::TooManyGrants));
        }
        let row = grant::Model {
            image: id,
            grantee: grantee.clone(),
            view: permissions.can_view(),
            modify: permissions.can_modify(),
            delete: permissions.can_delete(),
        };
        if permissions.can_view() {
            let anew = OnConflict::columns([grant::Column::Image, grant::Column::Grantee])
                .update_columns([grant::Column::View, grant::Column::Modify, grant::Column::Delete])
                .to_owned();
            self.txn.defer(grant::Entity::insert(row.into_active_model()).on_conflict(anew));
        } else {
            row.delete(&self.txn).await?;
        }
        self.charge(&target.image.creator, UsageChange::of_bytes(added)).await?;
        // The image gets a new revision, but keeps its update time and etag.
        let change = NewChange::new(id, ChangeKind::Grants, &target.image.creator);
        let change = NewChange { grantees: [grantee].into(), ..change };
        let revision = change_log::log(&self.txn, change, self.now).await?.revision;
        let row = image::ActiveModel {
            id: Set(id),
            revision: Set(revision),
            index_bytes: Set(target.row.index_bytes + added),
            ..Default::default()
        };
        self.txn.defer(image::Entity::update(row).validate()?);
        self.effects.committed.changed.insert(id);
        Ok(has_then)
    }
}

/// Returns the caller's grants on an image.
pub(super) async fn granted(
    db: &impl ConnectionTrait,
    visibility: &Visibility,
    image: ImageId,
) -> Result<BTreeMap<Grantee, Permissions>, Error> {
    let Some(grantees) = visibility.grantees() else {
        return Ok(BTreeMap::new());
    };
    let found = grant::Entity::find()
        .filter(grant::Column::Image.eq(image))
        .filter(grant::Column::Grantee.is_in(grantees.iter().cloned()));
    Ok(found.all(db).await?.into_iter().map(from_row).collect())
}

pub(super) async fn grantees(txn: &WriteTransaction, image: ImageId) -> Result<BTreeSet<Grantee>, Error> {
    let found = grant::Entity::find().filter(grant::Column::Image.eq(image)).all(txn).await?;
    Ok(found.into_iter().map(|row| row.grantee).collect())
}

fn from_row(row: grant::Model) -> (Grantee, Permissions) {
    let permissions = permissions_of(&row);
    (row.grantee, permissions)
}

fn permissions_of(row: &grant::Model) -> Permissions {
    Permissions::new(row.view, row.modify, row.delete)
}
