//! Ownership of references, so that no two images write the same one. An image owns the reference that it is
//! set to, those that an active build will write, and that of its artifact.

use std::collections::{BTreeSet, HashMap};

use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, ExprTrait, IntoActiveModel, QueryFilter, QuerySelect,
    QueryTrait,
    sea_query::{Expr, UnionType},
};

use super::{
    Store,
    entity::{build, engine_image, image, image_reference, pushed_digest},
    queue,
    transaction::WriteTransaction,
    values::AsJson,
};
use crate::{
    build::Kind,
    error::Error,
    image::{ImageId, Reference, SourceReference, SourceVersion, WantedReference},
};

/// The images that a reference of a build may stand for.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    pub(crate) images: Vec<ImageId>,
    /// Set if the reference can stand for nothing but the catalogue's: an image owns a reference of its
    /// repository, or an image of the catalogue has or had its digest.
    pub(crate) is_known: bool,
}

impl Store {
    /// Returns the image that owns a reference, or those with an artifact of its digest: in a registry, in an
    /// engine, or of its configuration.
    ///
    /// Pulled artifacts are not the catalogue's. Of the artifacts that are no longer current, those that were
    /// pushed and those in the engine of `worker` are known.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn owners(&self, worker: &str, reference: &SourceReference) -> Result<Owners, Error> {
        let txn = self.read().await?;
        let of_repository = || {
            image_reference::Entity::find()
                .filter(image_reference::Column::Repository.eq(&reference.repository))
        };
        let mut is_known = of_repository().one(&txn).await?.is_some();
        let images = match &reference.version {
            SourceVersion::Tag(tag) => {
                let found = of_repository().filter(image_reference::Column::Tag.eq(tag)).one(&txn).await?;
                found.into_iter().map(|found| found.image).collect()
            }
            SourceVersion::Digest(digest) => {
                let is_of_digest = image::Column::ArtifactDigest
                    .eq(digest)
                    .or(image::Column::ArtifactImage.eq(digest))
                    .or(image::Column::ArtifactConfig.eq(digest));
                let found = image::Entity::find().select_only().column(image::Column::Id);
                let found = found.filter(image::Column::Pulled.eq(false)).filter(is_of_digest);
                let is_held = engine_image::Column::EngineId
                    .eq(digest)
                    .or(engine_image::Column::ConfigDigest.eq(digest));
                let held = engine_image::Entity::find()
                    .filter(engine_image::Column::Worker.eq(worker))
                    .filter(is_held);
                let pushed = pushed_digest::Entity::find_by_id(digest);
                is_known |= held.one(&txn).await?.is_some() || pushed.one(&txn).await?.is_some();
                found.into_tuple().all(&txn).await?
            }
        };
        is_known |= !images.is_empty();
        txn.commit().await?;
        Ok(Owners { images, is_known })
    }

    /// Returns the image that owns a reference, if any.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] if the database is locked or down, and [`Error::Internal`] otherwise.
    pub(crate) async fn reference_owner(&self, reference: &Reference) -> Result<Option<ImageId>, Error> {
        Ok(owner(&self.reader, reference).await?)
    }
}

/// Chooses the reference of an image. A derived one gets a number if it is taken.
pub(super) async fn choose(
    txn: &WriteTransaction,
    image: ImageId,
    wanted: &WantedReference,
    writes: bool,
) -> Result<Reference, Error> {
    let owner = |reference| async move { owner(txn, &reference).await };
    Ok(wanted.choose(image, writes, owner).await?)
}

/// Claims all references that the images write or have written, and releases the rest.
///
/// # Errors
///
/// Returns [`Error::ReferenceTaken`] if another image owns one.
pub(super) async fn release_unused(
    txn: &WriteTransaction,
    images: impl IntoIterator<Item = &image::Model>,
) -> Result<(), Error> {
    let images: Vec<&image::Model> = images.into_iter().collect();
    if images.is_empty() {
        return Ok(());
    }
    let mut known = held_and_writing(txn, images.iter().map(|row| row.id)).await?;
    for row in images {
        let ImageReferences { held, writing: mut wanted } = known.remove(&row.id).unwrap_or_default();
        if !row.template && !row.pulled && !row.deleted {
            wanted.insert(Reference::from_stored(row.repository.clone(), row.tag.clone()));
        }
        if let Some(AsJson(artifact)) = row.artifact_json.as_ref().filter(|AsJson(artifact)| !artifact.pulled)
        {
            wanted.extend(artifact.reference.clone());
        }
        for given_back in held.difference(&wanted) {
            txn.defer(
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

/// Claims the reference that was [chosen](choose) for a new image.
///
/// # Errors
///
/// Returns [`Error::ReferenceTaken`] if another image owns it.
pub(super) async fn take_chosen(
    txn: &WriteTransaction,
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

/// Claims a reference that the image does not own.
///
/// # Errors
///
/// Returns [`Error::ReferenceTaken`] if another image owns it.
async fn take(txn: &WriteTransaction, image: ImageId, reference: &Reference) -> Result<(), Error> {
    if owner(txn, reference).await?.is_some() {
        return Err(Error::ReferenceTaken(reference.to_string()));
    }
    hold(txn, image, reference);
    Ok(())
}

fn hold(txn: &WriteTransaction, image: ImageId, reference: &Reference) {
    let (repository, tag) = (reference.repository().to_owned(), reference.tag().to_owned());
    let held = image_reference::Model { repository, tag, image };
    txn.defer(image_reference::Entity::insert(held.into_active_model()));
}

/// The references of one image.
#[derive(Debug, Default)]
struct ImageReferences {
    held: BTreeSet<Reference>,
    /// References that an active build will write.
    writing: BTreeSet<Reference>,
}

async fn held_and_writing(
    txn: &WriteTransaction,
    images: impl Iterator<Item = ImageId> + Clone,
) -> Result<HashMap<ImageId, ImageReferences>, DbErr> {
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
    let mut all: HashMap<ImageId, ImageReferences> = HashMap::new();
    for row in txn.query_all(&both).await? {
        let known = all.entry(row.try_get_by_index(0)?).or_default();
        let references = if row.try_get_by_index(3)? { &mut known.held } else { &mut known.writing };
        references.insert(Reference::from_stored(row.try_get_by_index(1)?, row.try_get_by_index(2)?));
    }
    Ok(all)
}

pub(super) async fn owner(
    db: &impl ConnectionTrait,
    reference: &Reference,
) -> Result<Option<ImageId>, DbErr> {
    let key = (reference.repository().to_owned(), reference.tag().to_owned());
    let found = image_reference::Entity::find_by_id(key).one(db).await?;
    Ok(found.map(|found| found.image))
}
