//! Which image a reference belongs to. No two images ever write the same one: neither what they are set to, nor what a build
//! under way will write, nor what an artifact has.

use std::collections::BTreeSet;

use sea_orm::{ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, IntoActiveModel, QueryFilter};
use uuid::Uuid;

use super::{
    builds,
    entity::{image, image_reference},
    rows,
};
use crate::{
    build::Kind,
    error::Error,
    image::{Artifact, ImageId, Reference, WantedReference},
};

/// The reference that an image gets: what is derived is varied until it is free.
pub(super) async fn choose(
    txn: &DatabaseTransaction,
    image: ImageId,
    wanted: &WantedReference,
    writes: bool,
) -> Result<Reference, Error> {
    match wanted {
        WantedReference::Pulled(reference) | WantedReference::Given(reference) => Ok(reference.clone()),
        WantedReference::Derived(reference) => {
            let mut chosen = reference.clone();
            let mut variation = image;
            while writes && owner(txn, &chosen).await?.is_some_and(|owner| owner != image.0) {
                chosen = reference.varied(variation);
                variation = ImageId::new();
            }
            Ok(chosen)
        }
    }
}

/// Takes every reference that the image writes or has written, and gives the others back. Fails when one is another image's.
pub(super) async fn settle(txn: &DatabaseTransaction, row: &image::Model) -> Result<(), Error> {
    let mut wanted = BTreeSet::new();
    if !row.template && !row.pulled && !row.deleted {
        wanted.insert((row.repository.clone(), row.tag.clone()));
    }
    if let Some(build) =
        builds::active_of(txn, ImageId(row.id)).await?.filter(|build| build.kind != Kind::Pull)
    {
        wanted.insert(parts(&build.reference));
    }
    let artifact: Option<Artifact> = row.artifact_json.as_deref().map(rows::from_json).transpose()?;
    if let Some(artifact) = artifact.filter(|artifact| !artifact.pulled) {
        wanted.extend(artifact.reference.as_ref().map(parts));
    }
    let held: BTreeSet<(String, String)> = image_reference::Entity::find()
        .filter(image_reference::Column::Image.eq(row.id))
        .all(txn)
        .await?
        .into_iter()
        .map(|held| (held.repository, held.tag))
        .collect();
    for free in held.difference(&wanted) {
        image_reference::Entity::delete_by_id(free.clone()).exec(txn).await?;
    }
    for (repository, tag) in wanted.difference(&held).cloned() {
        let reference = Reference::from_stored(repository, tag);
        if owner(txn, &reference).await?.is_some() {
            return Err(Error::ReferenceTaken(reference.to_string()));
        }
        let (repository, tag) = parts(&reference);
        let held = image_reference::Model { repository, tag, image: row.id };
        image_reference::Entity::insert(held.into_active_model()).exec_without_returning(txn).await?;
    }
    Ok(())
}

pub(super) async fn purge(txn: &DatabaseTransaction, image: Uuid) -> Result<(), DbErr> {
    image_reference::Entity::delete_many().filter(image_reference::Column::Image.eq(image)).exec(txn).await?;
    Ok(())
}

async fn owner(txn: &DatabaseTransaction, reference: &Reference) -> Result<Option<Uuid>, DbErr> {
    let found = image_reference::Entity::find_by_id(parts(reference)).one(txn).await?;
    Ok(found.map(|found| found.image))
}

fn parts(reference: &Reference) -> (String, String) {
    (reference.repository().to_owned(), reference.tag().to_owned())
}
