//! Grants: what others than its creator may do with an image.

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, PaginatorTrait,
    QueryFilter, QueryOrder, QuerySelect, Set,
};
use uuid::Uuid;

use super::{
    ChangeKind, Effects, Store, UsageChange,
    changes::{self, NewChange},
    entity::{grant, image},
    write::{Target, Write},
    writing::Writing,
};
use crate::{
    access::{Action, Grantee, Permissions, Sight},
    error::{Error, Refusal},
    image::{Image, ImageId},
    request::Request,
};

const GRANT_BYTES: i64 = Image::GRANT_BYTES as i64;

impl Store {
    /// The most grants that an image has.
    pub(crate) const MAX_GRANTS: u64 = 1_000;

    /// Says what a subject may do with an image; nothing when it is permitted nothing.
    pub(crate) async fn grant(
        &self,
        request: &Request,
        id: ImageId,
        subject: &str,
        permissions: Permissions,
    ) -> Result<(Permissions, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return write.repeat(answer).await;
        }
        let granted = write.grant(id, subject, permissions).await;
        write.finish(granted).await
    }

    /// Reads the next grants of an image, in the order of their grantees.
    pub(crate) async fn grants(
        &self,
        id: ImageId,
        after: Option<&Grantee>,
        limit: u64,
    ) -> Result<Vec<(Grantee, Permissions)>, Error> {
        let mut query = grant::Entity::find()
            .filter(grant::Column::Image.eq(id.0))
            .order_by_asc(grant::Column::Grantee)
            .limit(limit);
        if let Some(grantee) = after {
            query = query.filter(grant::Column::Grantee.gt(grantee.to_string()));
        }
        query.all(&self.reader).await?.into_iter().map(from_row).collect()
    }
}

impl Write<'_> {
    async fn grant(
        &mut self,
        id: ImageId,
        subject: &str,
        permissions: Permissions,
    ) -> Result<Permissions, Error> {
        let target = self.target(id, None, Action::Share).await?;
        let grantee = Grantee::Subject(subject.to_owned());
        let found = grant::Entity::find_by_id((id.0, grantee.to_string())).one(&self.txn).await?;
        if found.as_ref().map(permissions_of).unwrap_or_default() == permissions {
            return Ok(permissions);
        }
        let row = grant::Model {
            image: id.0,
            grantee: grantee.to_string(),
            view: permissions.can_view(),
            modify: permissions.can_modify(),
            delete: permissions.can_delete(),
        };
        let row = row.into_active_model().reset_all();
        let added = match (found, permissions.can_view()) {
            (Some(found), false) => {
                grant::Entity::delete_by_id((found.image, found.grantee)).exec(&self.txn).await?;
                -GRANT_BYTES
            }
            (Some(_), true) => {
                row.update(&self.txn).await?;
                0
            }
            (None, _) => {
                let of_image = grant::Entity::find().filter(grant::Column::Image.eq(id.0));
                if of_image.count(&self.txn).await? >= Store::MAX_GRANTS {
                    return Err(Error::Refused(Refusal::TooManyGrants));
                }
                grant::Entity::insert(row).exec_without_returning(&self.txn).await?;
                GRANT_BYTES
            }
        };
        self.charge(&target.image.creator, UsageChange { images: 0, bytes: added }).await?;
        self.log_grant(&target, grantee, added).await?;
        Ok(permissions)
    }

    /// Logs a change of grants: a new revision, but no update of the record. It takes so many bytes more in the memory of the
    /// index.
    async fn log_grant(&mut self, target: &Target, grantee: Grantee, added: i64) -> Result<(), Error> {
        let id = target.image.id;
        let change = NewChange::new(id, ChangeKind::Grants, &target.image.creator);
        let change = NewChange { grantees: [grantee].into(), ..change };
        let revision = changes::log(&self.txn, change, self.now).await?.revision;
        let row = image::ActiveModel {
            id: Set(id.0),
            revision: Set(revision),
            index_bytes: Set(target.row.index_bytes + added),
            ..Default::default()
        };
        self.txn.later(image::Entity::update(row).validate()?);
        self.effects.committed.changed.insert(id);
        Ok(())
    }
}

/// Reads what the caller was granted of an image.
pub(super) async fn granted(
    db: &impl ConnectionTrait,
    sight: &Sight,
    image: ImageId,
) -> Result<BTreeMap<Grantee, Permissions>, Error> {
    let Some(grantees) = sight.grantees() else {
        return Ok(BTreeMap::new());
    };
    let found = grant::Entity::find()
        .filter(grant::Column::Image.eq(image.0))
        .filter(grant::Column::Grantee.is_in(grantees.iter().map(Grantee::to_string)));
    found.all(db).await?.into_iter().map(from_row).collect()
}

/// Reads all to whom an image was granted.
pub(super) async fn grantees(txn: &Writing, image: ImageId) -> Result<BTreeSet<Grantee>, Error> {
    let found = grant::Entity::find().filter(grant::Column::Image.eq(image.0)).all(txn).await?;
    found.into_iter().map(|row| Ok(from_row(row)?.0)).collect()
}

pub(super) fn purge(txn: &Writing, image: Uuid) {
    txn.later(grant::Entity::delete_many().filter(grant::Column::Image.eq(image)));
}

fn from_row(row: grant::Model) -> Result<(Grantee, Permissions), Error> {
    let permissions = permissions_of(&row);
    let grantee = Grantee::try_from(row.grantee).map_err(|wrong| Error::Internal(wrong.into()))?;
    Ok((grantee, permissions))
}

fn permissions_of(row: &grant::Model) -> Permissions {
    Permissions::new(row.view, row.modify, row.delete)
}
