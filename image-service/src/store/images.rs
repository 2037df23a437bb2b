//! Reading images and their configurations.

use std::{collections::HashMap, sync::Arc};

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, ExprTrait, FromQueryResult, Iterable,
    QueryFilter, QueryOrder, QueryResult, QuerySelect, QueryTrait, Statement,
    sea_query::{Expr, JoinType, Order as SqlOrder, Query as SqlQuery, SelectStatement},
};

use super::{
    Store,
    entity::{configuration, grant, image},
    grants, listing, rows,
};
use crate::{
    access::{Action, Permissions, Sight, Standing},
    error::{Error, Resource},
    image::{Configuration, Image, ImageId, ImageInView, Query, View},
};

impl Store {
    /// One image that is in sight.
    pub(crate) async fn image(&self, sight: &Sight, id: ImageId, view: View) -> Result<ImageInView, Error> {
        self.image_for(sight, id, view, None).await
    }

    /// One image that is in sight, if the caller may do this with it now.
    pub(crate) async fn image_for(
        &self,
        sight: &Sight,
        id: ImageId,
        view: View,
        action: Option<Action>,
    ) -> Result<ImageInView, Error> {
        let found = found_at_once(&self.reader, sight, id, view).await?;
        let (standing, found) = found.ok_or(Error::NotFound(Resource::Image))?;
        if let Some(action) = action {
            found.image.require(standing, action)?;
        }
        Ok(found)
    }

    /// The next images that are in sight and match, in the order of their ids, which never changes.
    pub(crate) async fn images_by_id(
        &self,
        sight: &Sight,
        query: &Query,
        after: Option<ImageId>,
        limit: u64,
    ) -> Result<Vec<ImageInView>, Error> {
        let matching = listing::matching(self.backend(), sight, query).limit(limit);
        let mut select = match listing::Asked::new(&self.reader, sight, self.bounds).few_of_all(query).await?
        {
            Some(few) => matching.filter(few.among).order_by_asc(listing::unindexed(image::Column::Id)),
            None => matching.order_by_asc(image::Column::Id),
        };
        if let Some(id) = after {
            select = select.filter(image::Column::Id.gt(id.0));
        }
        let by_id = [(Expr::col((image::Entity, image::Column::Id)), SqlOrder::Asc)];
        Ok(all_viewed(&self.reader, select.into_query(), by_id, sight, View::Basic).await?)
    }
}

/// Reads all that is to be known of an image in one statement: it is what is read most often.
async fn found_at_once(
    db: &impl ConnectionTrait,
    sight: &Sight,
    id: ImageId,
    view: View,
) -> Result<Option<(Standing, ImageInView)>, DbErr> {
    const BASIC: &str = "SELECT i.*, g.\"view\", g.modify, g.\"delete\" FROM images i \
                         LEFT JOIN grants g ON g.image = i.id AND g.subject = $1 WHERE i.id = $2 AND NOT i.deleted";
    const FULL: &str = "SELECT i.*, c.json, g.\"view\", g.modify, g.\"delete\" FROM images i \
                        JOIN configurations c ON c.image = i.id AND c.revision = i.configuration_revision \
                        LEFT JOIN grants g ON g.image = i.id AND g.subject = $1 WHERE i.id = $2 AND NOT i.deleted";
    let sql = match view {
        View::Basic => BASIC,
        View::Full => FULL,
    };
    let values = [sight.subject().into(), id.0.into()];
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, values);
    let Some(row) = db.query_one_raw(statement).await? else {
        return Ok(None);
    };
    viewed(image::Model::from_query_result(&row, "")?, &row, sight, view)
}

/// An image as the caller sees it and what the caller is to it, if it sees it: from a row that has the caller's grant and, for the full
/// view, the configuration beside it.
pub(super) fn viewed(
    model: image::Model,
    row: &QueryResult,
    sight: &Sight,
    view: View,
) -> Result<Option<(Standing, ImageInView)>, DbErr> {
    let image = rows::image_from_row(model)?;
    let granted = match row.try_get::<Option<bool>>("", "view")? {
        Some(view) => Permissions::new(view, row.try_get("", "modify")?, row.try_get("", "delete")?),
        None => Permissions::default(),
    };
    let Some(standing) = sight.standing(&image.creator, granted) else {
        return Ok(None);
    };
    let configuration = match view {
        View::Basic => None,
        View::Full => Some(rows::from_json(&row.try_get::<String>("", "json")?)?),
    };
    Ok(Some((standing, ImageInView { actions: image.allowed_actions(standing), image, configuration })))
}

/// One image, and what the caller is to it.
pub(super) async fn image_in_sight(
    db: &impl ConnectionTrait,
    sight: &Sight,
    id: ImageId,
) -> Result<(Image, Standing), Error> {
    let found = image::Entity::find_by_id(id.0).filter(image::Column::Deleted.eq(false)).one(db).await?;
    let row = found.ok_or(Error::NotFound(Resource::Image))?;
    let standing = standing(db, sight, &row).await?.ok_or(Error::NotFound(Resource::Image))?;
    Ok((rows::image_from_row(row)?, standing))
}

/// What the caller is to an image, if it sees it.
pub(super) async fn standing(
    db: &impl ConnectionTrait,
    sight: &Sight,
    row: &image::Model,
) -> Result<Option<Standing>, DbErr> {
    // Most often the caller needs no grant.
    if let Some(standing) = sight.standing(&row.creator, Permissions::default()) {
        return Ok(Some(standing));
    }
    let id = ImageId(row.id);
    let granted = grants::granted(db, sight, &[id]).await?.remove(&id).unwrap_or_default();
    Ok(sight.standing(&row.creator, granted))
}

/// Adds to a statement that has `images` what they are viewed by, which [`viewed`] reads.
pub(super) fn select_viewed(select: &mut SelectStatement, sight: &Sight, view: View) {
    let image_id = (image::Entity, image::Column::Id);
    let granted = Condition::all()
        .add(Expr::col((grant::Entity, grant::Column::Image)).equals(image_id))
        .add(grant::Column::Subject.eq(sight.subject()));
    select
        .columns(image::Column::iter().map(|column| (image::Entity, column)))
        .columns(
            [grant::Column::View, grant::Column::Modify, grant::Column::Delete]
                .map(|column| (grant::Entity, column)),
        )
        .join(JoinType::LeftJoin, grant::Entity, granted);
    if view == View::Full {
        let of_image = Condition::all()
            .add(Expr::col((configuration::Entity, configuration::Column::Image)).equals(image_id))
            .add(
                Expr::col((configuration::Entity, configuration::Column::Revision))
                    .equals((image::Entity, image::Column::ConfigurationRevision)),
            );
        select.column((configuration::Entity, configuration::Column::Json)).join(
            JoinType::LeftJoin,
            configuration::Entity,
            of_image,
        );
    }
}

/// Reads images that a statement finds, with their order, as the caller sees them.
pub(super) async fn all_viewed(
    db: &impl ConnectionTrait,
    found: SelectStatement,
    order: impl IntoIterator<Item = (Expr, SqlOrder)>,
    sight: &Sight,
    view: View,
) -> Result<Vec<ImageInView>, DbErr> {
    let mut select = SqlQuery::select();
    select.from_subquery(found, image::Entity);
    select_viewed(&mut select, sight, view);
    for (term, order) in order {
        select.order_by_expr(term, order);
    }
    let rows = db.query_all_raw(db.get_database_backend().build(&select)).await?;
    let mut images = Vec::with_capacity(rows.len());
    for row in rows {
        let viewed = viewed(image::Model::from_query_result(&row, "")?, &row, sight, view)?;
        images.extend(viewed.map(|(_, image)| image));
    }
    Ok(images)
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
    let row = configuration::Entity::find_by_id((image.0, revision))
        .one(db)
        .await?
        .ok_or_else(|| DbErr::RecordNotFound("a configuration".to_owned()))?;
    rows::from_json(&row.json)
}

/// The configurations of these images and revisions.
pub(super) async fn configurations(
    db: &impl ConnectionTrait,
    of: impl Iterator<Item = (ImageId, i64)>,
) -> Result<HashMap<(ImageId, i64), Arc<Configuration>>, DbErr> {
    let mut named = Condition::any();
    for (image, revision) in of {
        named = named
            .add(configuration::Column::Image.eq(image.0).and(configuration::Column::Revision.eq(revision)));
    }
    let found = configuration::Entity::find().filter(named).all(db).await?;
    found
        .into_iter()
        .map(|row| Ok(((ImageId(row.image), row.revision), Arc::new(rows::from_json(&row.json)?))))
        .collect()
}
