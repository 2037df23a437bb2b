//! Which image a reference belongs to. No two images ever write the same one: neither what they are set to, nor what a build
//! under way will write, nor what an artifact has.

use std::collections::{BTreeSet, HashMap};

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, IntoActiveModel, QueryFilter, QuerySelect, QueryTrait,
    sea_query::{Expr, UnionType},
};

use super::{
    Store,
    entity::{build, image, image_reference},
    queue,
    values::AsJson,
    writing::Writing,
};
use crate::{
    build::Kind,
    error::Error,
    image::{ImageId, Reference, WantedReference},
};

impl Store {
    /// Returns the image that a reference belongs to.
    pub(crate) async fn reference_owner(&self, reference: &Reference) -> Result<Option<ImageId>, Error> {
        Ok(owner(&self.reader, reference).await?)
    }
}

/// The reference that an image gets: what is derived is varied until it is free.
pub(super) async fn choose(
    txn: &Writing,
    image: ImageId,
    wanted: &WantedReference,
    writes: bool,
) -> Result<Reference, Error> {
    let owner = |reference| async move { owner(txn, &reference).await };
    Ok(wanted.choose(image, writes, owner).await?)
}

/// Takes every reference that the images write or have written, and gives the others back. Fails when one is another image's.
pub(super) async fn settle(
    txn: &Writing,
    images: impl IntoIterator<Item = &image::Model>,
) -> Result<(), Error> {
    let images: Vec<&image::Model> = images.into_iter().collect();
    if images.is_empty() {
        return Ok(());
    }
    let mut known = held_and_writing(txn, images.iter().map(|row| row.id)).await?;
    for row in images {
        let Known { held, writing: mut wanted } = known.remove(&row.id).unwrap_or_default();
        if !row.template && !row.pulled && !row.deleted {
            wanted.insert(Reference::from_stored(row.repository.clone(), row.tag.clone()));
        }
        if let Some(AsJson(artifact)) = row.artifact_json.as_ref().filter(|AsJson(artifact)| !artifact.pulled)
        {
            wanted.extend(artifact.reference.clone());
        }
        for given_back in held.difference(&wanted) {
            txn.later(
                image_reference::Entity::delete_many()
                    .filter(image_reference::Column::Repository.eq(given_back.repository()))
                    .filter(image_reference::Column::Tag.eq(given_back.tag())),
            );
        }
        for taken in wanted.difference(&held) {
            take(txn, row.id, taken).await?;
        }
    }
    Ok(())
}

/// Takes the reference that was [chosen](choose) for a new image. Fails when it is another image's.
pub(super) async fn take_chosen(
    txn: &Writing,
    image: ImageId,
    wanted: &WantedReference,
    chosen: &Reference,
) -> Result<(), Error> {
    if let WantedReference::Derived(_) = wanted {
        hold(txn, image, chosen);
        return Ok(());
    }
    take(txn, image, chosen).await
}

/// Takes a reference that the image does not hold. Fails when it is another image's.
async fn take(txn: &Writing, image: ImageId, reference: &Reference) -> Result<(), Error> {
    if owner(txn, reference).await?.is_some() {
        return Err(Error::ReferenceTaken(reference.to_string()));
    }
    hold(txn, image, reference);
    Ok(())
}

fn hold(txn: &Writing, image: ImageId, reference: &Reference) {
    let (repository, tag) = (reference.repository().to_owned(), reference.tag().to_owned());
    let held = image_reference::Model { repository, tag, image };
    txn.later(image_reference::Entity::insert(held.into_active_model()));
}

/// What is known of the references of one image.
#[derive(Debug, Default)]
struct Known {
    held: BTreeSet<Reference>,
    /// What a build under way will write.
    writing: BTreeSet<Reference>,
}

async fn held_and_writing(
    txn: &Writing,
    images: impl Iterator<Item = ImageId> + Clone,
) -> Result<HashMap<ImageId, Known>, DbErr> {
    let mut both = image_reference::Entity::find()
        .select_only()
        .columns([
            image_reference::Column::Image,
            image_reference::Column::Repository,
            image_reference::Column::Tag,
        ])
        .expr_as(Expr::value(true), "held")
        .filter(image_reference::Column::Image.is_in(images.clone()))
        .into_query();
    let writing = build::Entity::find()
        .select_only()
        .columns([build::Column::Image, build::Column::Repository, build::Column::Tag])
        .expr_as(Expr::value(false), "held")
        .filter(build::Column::Image.is_in(images))
        .filter(queue::is_active())
        .filter(build::Column::Kind.ne(Kind::Pull));
    both.union(UnionType::All, writing.into_query());
    let mut all: HashMap<ImageId, Known> = HashMap::new();
    for row in txn.query_all(&both).await? {
        let known = all.entry(row.try_get_by_index(0)?).or_default();
        let of = if row.try_get_by_index(3)? { &mut known.held } else { &mut known.writing };
        of.insert(Reference::from_stored(row.try_get_by_index(1)?, row.try_get_by_index(2)?));
    }
    Ok(all)
}

/// Reads which image a reference belongs to.
pub(super) async fn owner(
    db: &impl ConnectionTrait,
    reference: &Reference,
) -> Result<Option<ImageId>, DbErr> {
    let key = (reference.repository().to_owned(), reference.tag().to_owned());
    let found = image_reference::Entity::find_by_id(key).one(db).await?;
    Ok(found.map(|found| found.image))
}
