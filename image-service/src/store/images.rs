//! Reads of images and their configurations.

use std::{collections::HashMap, sync::Arc};

use sea_orm::{ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, ExprTrait, QueryFilter, Select};

use super::{
    Store,
    entity::{configuration, image},
    grants, required,
    values::from_json,
};
use crate::{
    access::{Permissions, Standing, Visibility},
    error::Error,
    image::{Configuration, Image, ImageId, ImageInView, View},
};

impl Store {
    /// Returns those of the configurations that exist, by image and revision, each with its size in bytes.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] if it fails
    /// otherwise or a configuration cannot be parsed.
    pub(crate) async fn configurations(
        &self,
        keys: &[(ImageId, i64)],
    ) -> Result<HashMap<(ImageId, i64), (Configuration, usize)>, Error> {
        let found = of_revisions(keys.iter().copied()).all(&self.reader).await?;
        let found = found.into_iter().map(|row| {
            let size = row.json.len();
            Ok(((row.image, row.revision), (from_json(&row.json)?, size)))
        });
        found.collect()
    }
}

fn of_revisions(keys: impl Iterator<Item = (ImageId, i64)>) -> Select<configuration::Entity> {
    let one = |(image, revision)| {
        configuration::Column::Image.eq(image).and(configuration::Column::Revision.eq(revision))
    };
    configuration::Entity::find().filter(keys.map(one).fold(Condition::any(), Condition::add))
}

/// Returns the caller's standing towards an image, if it sees the image.
pub(super) async fn standing(
    db: &impl ConnectionTrait,
    visibility: &Visibility,
    row: &image::Model,
) -> Result<Option<Standing>, Error> {
    // Usually the caller needs no grant.
    let nothing = |_: &_| Permissions::default();
    if let Some(standing) = visibility.standing(&row.creator, nothing) {
        return Ok(Some(standing));
    }
    let granted = grants::granted(db, visibility, row.id).await?;
    Ok(visibility.standing(&row.creator, |grantee| granted.get(grantee).copied().unwrap_or_default()))
}

pub(super) async fn in_view(
    db: &impl ConnectionTrait,
    image: Image,
    standing: Standing,
    view: View,
) -> Result<ImageInView, DbErr> {
    let configuration = match view {
        View::Basic => None,
        View::Full => Some(configuration(db, image.id, image.configuration_revision).await?),
    };
    Ok(ImageInView { actions: image.allowed_actions(standing), image, configuration })
}

pub(super) async fn configuration(
    db: &impl ConnectionTrait,
    image: ImageId,
    revision: i64,
) -> Result<Configuration, DbErr> {
    let row = configuration::Entity::find_by_id((image, revision)).one(db).await?;
    from_json(&required(row, "a configuration")?.json)
}

pub(super) async fn configurations(
    db: &impl ConnectionTrait,
    revisions: impl Iterator<Item = (ImageId, i64)>,
) -> Result<HashMap<(ImageId, i64), Arc<Configuration>>, DbErr> {
    let found = of_revisions(revisions).all(db).await?;
    found.into_iter().map(|row| Ok(((row.image, row.revision), Arc::new(from_json(&row.json)?)))).collect()
}
