//! Grants: what others than its creator may do with an image.

use std::collections::{BTreeSet, HashMap};

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, ExprTrait,
    IntoActiveModel, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait, Select, Set,
    sea_query::{Expr, Func, Query as SqlQuery, SelectStatement, UnionType},
};
use uuid::Uuid;

use super::{
    Effects, Store, changes,
    entity::{grant, image},
    write::Write,
    writing::Writing,
};
use crate::{
    access::{Action, Permissions, Sight, SubjectDigest},
    error::{Error, Refusal},
    image::ImageId,
    request::Request,
};

impl Store {
    const MAX_GRANTS: u64 = 1_000;

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
            return Ok((answer, Effects::default()));
        }
        let target = write.target(id, None, Action::Share).await?;
        let found = grant::Entity::find_by_id((id.0, subject.to_owned())).one(&write.txn).await?;
        if found.as_ref().map(permissions_of).unwrap_or_default() == permissions {
            return write.finish(permissions).await;
        }
        let row = grant::Model {
            image: id.0,
            subject: subject.to_owned(),
            view: permissions.can_view(),
            modify: permissions.can_modify(),
            delete: permissions.can_delete(),
        };
        let row = row.into_active_model().reset_all();
        match (found, permissions.can_view()) {
            (Some(found), false) => {
                grant::Entity::delete_by_id((found.image, found.subject)).exec(&write.txn).await?;
            }
            (Some(_), true) => {
                row.update(&write.txn).await?;
            }
            (None, _) => {
                let of_image = grant::Entity::find().filter(grant::Column::Image.eq(id.0));
                if of_image.count(&write.txn).await? >= Self::MAX_GRANTS {
                    return Err(Error::Refused(Refusal::TooManyGrants));
                }
                grant::Entity::insert(row).exec_without_returning(&write.txn).await?;
            }
        }
        share(&mut write, id, &target.image.creator, subject).await?;
        write.finish(permissions).await
    }

    /// The next grants of an image that the caller may share, by subject.
    pub(crate) async fn grants(
        &self,
        sight: &Sight,
        id: ImageId,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Vec<(String, Permissions)>, Error> {
        let txn = self.read().await?;
        let (image, standing) = super::images::image_in_sight(&txn, sight, id).await?;
        image.require(standing, Action::Share)?;
        let mut query = grant::Entity::find()
            .filter(grant::Column::Image.eq(id.0))
            .order_by_asc(grant::Column::Subject)
            .limit(limit);
        if let Some(subject) = after {
            query = query.filter(grant::Column::Subject.gt(subject));
        }
        let found = query.all(&txn).await?;
        txn.commit().await?;
        Ok(found.into_iter().map(|row| (row.subject.clone(), permissions_of(&row))).collect())
    }
}

/// Logs a change of grants: a new revision, but no update of the record.
async fn share(write: &mut Write<'_>, id: ImageId, creator: &str, subject: &str) -> Result<(), Error> {
    let gains_or_loses_sight = [subject.to_owned()].into();
    let revision = changes::log(&write.txn, id, creator, &gains_or_loses_sight, write.now).await?.revision;
    let row = image::ActiveModel { id: Set(id.0), revision: Set(revision), ..Default::default() };
    write.txn.later(image::Entity::update(row).validate()?);
    write.effects.committed.changed.insert(id);
    Ok(())
}

/// What the caller was granted of each of these images; nothing for those that are missing.
pub(super) async fn granted(
    db: &impl ConnectionTrait,
    sight: &Sight,
    images: &[ImageId],
) -> Result<HashMap<ImageId, Permissions>, DbErr> {
    let Some(subject) = sight.subject() else {
        return Ok(HashMap::new());
    };
    let found = grant::Entity::find()
        .filter(grant::Column::Subject.eq(subject))
        .filter(grant::Column::Image.is_in(images.iter().map(|id| id.0)))
        .all(db)
        .await?;
    Ok(found.into_iter().map(|row| (ImageId(row.image), permissions_of(&row))).collect())
}

/// All grants of these images.
pub(super) async fn all(
    db: &impl ConnectionTrait,
    images: &[ImageId],
) -> Result<HashMap<ImageId, HashMap<SubjectDigest, Permissions>>, DbErr> {
    let found = grant::Entity::find()
        .filter(grant::Column::Image.is_in(images.iter().map(|id| id.0)))
        .all(db)
        .await?;
    let mut all: HashMap<ImageId, HashMap<SubjectDigest, Permissions>> = HashMap::new();
    for row in found {
        let of_image = all.entry(ImageId(row.image)).or_default();
        of_image.insert(SubjectDigest::of(&row.subject), permissions_of(&row));
    }
    Ok(all)
}

/// Those to whom the image was granted.
pub(super) async fn viewers(txn: &Writing, image: ImageId) -> Result<BTreeSet<String>, DbErr> {
    let found = grant::Entity::find()
        .select_only()
        .column(grant::Column::Subject)
        .filter(grant::Column::Image.eq(image.0))
        .into_tuple::<String>()
        .all(txn)
        .await?;
    Ok(found.into_iter().collect())
}

/// Whether an image is in sight, looked up for each image in question.
pub(super) fn in_sight(sight: &Sight) -> Condition {
    in_sight_among("images", sight)
}

/// The same of a table that has the `id`, the `creator` and `deleted` of images.
pub(super) fn in_sight_among(table: &'static str, sight: &Sight) -> Condition {
    let condition = Condition::all().add(Expr::col((table, image::Column::Deleted)).eq(false));
    match sight {
        Sight::Everything => condition,
        Sight::Of(subject) => {
            let granted = granted_to(subject)
                .filter(Expr::col((grant::Entity, grant::Column::Image)).equals((table, image::Column::Id)))
                .into_query();
            condition.add(
                Condition::any()
                    .add(Expr::col((table, image::Column::Creator)).eq(subject))
                    .add(Expr::exists(granted)),
            )
        }
    }
}

/// The ids of all images that a subject has created or was granted.
pub(super) fn all_in_sight(subject: &str) -> SelectStatement {
    let mut all = created_by(subject).into_query();
    all.union(UnionType::All, all_granted(subject));
    all
}

/// The ids of all images that a subject was granted.
pub(super) fn all_granted(subject: &str) -> SelectStatement {
    granted_to(subject).into_query()
}

/// How many these are, counted to `limit`.
pub(super) async fn count(
    db: &impl ConnectionTrait,
    mut some: SelectStatement,
    limit: u64,
) -> Result<u64, DbErr> {
    let mut counted = SqlQuery::select();
    counted.expr(Func::count(Expr::cust("*"))).from_subquery(some.limit(limit).take(), "some");
    let row = db.query_one_raw(db.get_database_backend().build(&counted)).await?;
    let count: i64 = row.map_or(Ok(0), |row| row.try_get_by_index(0))?;
    Ok(u64::try_from(count).unwrap_or(0))
}

fn created_by(subject: &str) -> Select<image::Entity> {
    image::Entity::find().select_only().column(image::Column::Id).filter(image::Column::Creator.eq(subject))
}

/// The images that a subject was granted.
fn granted_to(subject: &str) -> Select<grant::Entity> {
    grant::Entity::find()
        .select_only()
        .column(grant::Column::Image)
        .filter(grant::Column::Subject.eq(subject))
}

pub(super) fn purge(txn: &Writing, image: Uuid) {
    txn.later(grant::Entity::delete_many().filter(grant::Column::Image.eq(image)));
}

fn permissions_of(row: &grant::Model) -> Permissions {
    Permissions::new(row.view, row.modify, row.delete)
}
