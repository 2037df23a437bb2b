//! Images and their configurations.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, Select, Set, TransactionTrait,
};

use super::{
    Committed, Store, apply,
    entity::{configuration, image},
    log_change, purge, rows,
};
use crate::{
    access::Sight,
    build::{Build, Kind},
    dispatch::{self, Decision, Event, Policy, Rows},
    error::{Error, Refusal, Resource},
    image::{
        Configuration, Image, ImageId, ImageInView, ImageKey, NewImage, Reference, Status, View,
        WantedReference,
    },
    timestamp::Timestamp,
};

impl Store {
    /// Creates an image with its first build in the queue.
    pub(crate) async fn create_image(
        &self,
        creator: &str,
        new: &NewImage,
        now: Timestamp,
    ) -> Result<(Image, Build), Error> {
        let txn = self.write().await?;
        let id = ImageId::new();
        let reference = free_reference(&txn, id, &new.reference).await?;
        let mut build = Build::queued(id, 1, creator.to_owned(), 1, reference.clone(), now);
        let decision = enqueue(&txn, &mut build).await?;
        let row = image::Model {
            id: id.0,
            name: new.name.as_str().to_owned(),
            description: new.description.as_str().to_owned(),
            creator: creator.to_owned(),
            status: rows::status_to_code(Status::of(build.kind, build.state)),
            status_message: String::new(),
            repository: reference.repository().to_owned(),
            tag: reference.tag().to_owned(),
            configuration_revision: 1,
            artifact_json: None,
            created_at: now.micros(),
            updated_at: now.micros(),
            revision: log_change(&txn, id, creator).await?,
            latest_build: build.id.0,
            deleted: false,
        };
        image::Entity::insert(row.clone().into_active_model()).exec_without_returning(&txn).await?;
        let configuration =
            configuration::Model { image: id.0, revision: 1, json: rows::to_json(&new.configuration)? };
        configuration::Entity::insert(configuration.into_active_model()).exec_without_returning(&txn).await?;
        apply(&txn, &decision, now).await?;
        txn.commit().await?;
        Ok((rows::image_from_row(row)?, build))
    }

    /// Queues another build of an image.
    pub(crate) async fn queue_build(
        &self,
        id: ImageId,
        requested_by: &str,
        now: Timestamp,
    ) -> Result<(Image, Build), Error> {
        let txn = self.write().await?;
        let row = visible(&txn, id).await?;
        let latest = super::builds::one(&txn, row.latest_build).await?;
        if latest.kind == Kind::Snapshot {
            return Err(Error::Refused(Refusal::SnapshotNotBuildable));
        }
        if !latest.state.is_final() {
            return Err(Error::Refused(Refusal::BuildInProgress));
        }
        let mut build = Build::queued(
            id,
            latest.number + 1,
            requested_by.to_owned(),
            row.configuration_revision,
            Reference::from_stored(row.repository.clone(), row.tag.clone()),
            now,
        );
        let decision = enqueue(&txn, &mut build).await?;
        let mut row = row.into_active_model();
        row.latest_build = Set(build.id.0);
        row.update(&txn).await?;
        apply(&txn, &decision, now).await?;
        let image = rows::image_from_row(visible(&txn, id).await?)?;
        txn.commit().await?;
        Ok((image, build))
    }

    /// Makes an image invisible, and cancels the build that is under way. What is left of it is removed at once when no
    /// work is under way, else when that has stopped.
    pub(crate) async fn delete_image(
        &self,
        id: ImageId,
        by: &str,
        policy: &Policy,
        now: Timestamp,
    ) -> Result<(Decision, Committed), Error> {
        let txn = self.write().await?;
        let row = visible(&txn, id).await?;
        let build = super::builds::one(&txn, row.latest_build).await?;
        log_change(&txn, id, &row.creator).await?;
        let mut tombstone = row.into_active_model();
        tombstone.deleted = Set(true);
        tombstone.update(&txn).await?;
        let rows = Rows { build, configuration: None };
        // A build that is over, or a snapshot that cannot be cancelled, ends by itself.
        let decision =
            dispatch::decide(rows, &Event::Cancel { by: by.to_owned() }, policy, now).unwrap_or_default();
        let mut committed = apply(&txn, &decision, now).await?;
        if decision.build.is_none() && super::builds::active_of(&txn, id).await?.is_none() {
            purge(&txn, id).await?;
        }
        txn.commit().await?;
        committed.image_changed = true;
        Ok((decision, committed))
    }

    /// One image that is in sight.
    pub(crate) async fn image(&self, sight: &Sight, id: ImageId, view: View) -> Result<ImageInView, Error> {
        let query = in_sight(sight).filter(image::Column::Id.eq(id.0));
        let mut found = self.read_images(query, view).await?;
        found.pop().ok_or(Error::NotFound(Resource::Image))
    }

    /// The next images that are in sight, the latest update first.
    pub(crate) async fn images(
        &self,
        sight: &Sight,
        after: Option<ImageKey>,
        limit: u64,
        view: View,
    ) -> Result<Vec<ImageInView>, Error> {
        let mut query = in_sight(sight)
            .order_by_desc(image::Column::UpdatedAt)
            .order_by_desc(image::Column::Id)
            .limit(limit);
        if let Some(key) = after {
            let updated_at = key.updated_at.micros();
            query = query.filter(
                Condition::any().add(image::Column::UpdatedAt.lt(updated_at)).add(
                    Condition::all()
                        .add(image::Column::UpdatedAt.eq(updated_at))
                        .add(image::Column::Id.lt(key.id.0)),
                ),
            );
        }
        self.read_images(query, view).await
    }

    /// The next images that are in sight in the order of their ids, which never changes.
    pub(crate) async fn images_by_id(
        &self,
        sight: &Sight,
        after: Option<ImageId>,
        limit: u64,
    ) -> Result<Vec<ImageInView>, Error> {
        let mut query = in_sight(sight).order_by_asc(image::Column::Id).limit(limit);
        if let Some(id) = after {
            query = query.filter(image::Column::Id.gt(id.0));
        }
        self.read_images(query, View::Basic).await
    }

    /// Those of these images that exist, whoever may see them.
    pub(crate) async fn images_among(&self, ids: &[ImageId]) -> Result<Vec<ImageInView>, Error> {
        let query = in_sight(&Sight::Everything).filter(image::Column::Id.is_in(ids.iter().map(|id| id.0)));
        self.read_images(query, View::Basic).await
    }

    /// Reads images and what belongs to them as of one moment.
    async fn read_images(&self, query: Select<image::Entity>, view: View) -> Result<Vec<ImageInView>, Error> {
        let txn = self.reader.begin().await?;
        let mut images = Vec::new();
        for row in query.all(&txn).await? {
            let image = rows::image_from_row(row)?;
            let configuration = match view {
                View::Basic => None,
                View::Full => Some(configuration(&txn, image.id, image.configuration_revision).await?),
            };
            images.push(ImageInView { image, configuration });
        }
        txn.commit().await?;
        Ok(images)
    }
}

/// The first record of a build, and its row.
async fn enqueue(txn: &DatabaseTransaction, build: &mut Build) -> Result<Decision, DbErr> {
    let now = build.queued_at;
    let queued = crate::build::Happening::State {
        state: build.state,
        message: format!("queued by {}", build.requested_by),
    };
    let record = build.record(now, queued);
    let row = rows::build_to_row(build)?;
    super::entity::build::Entity::insert(row.into_active_model()).exec_without_returning(txn).await?;
    Ok(Decision { build: Some(build.clone()), records: vec![record], ..Decision::default() })
}

async fn free_reference(
    txn: &DatabaseTransaction,
    id: ImageId,
    wanted: &WantedReference,
) -> Result<Reference, Error> {
    match wanted {
        WantedReference::Given(reference) if is_written(txn, reference).await? => {
            Err(Error::ReferenceTaken(reference.to_string()))
        }
        WantedReference::Derived(reference) if is_written(txn, reference).await? => Ok(reference.varied(id)),
        WantedReference::Given(reference) | WantedReference::Derived(reference) => Ok(reference.clone()),
    }
}

/// Whether an image, or the tombstone of one whose work has not stopped, writes the reference.
async fn is_written(txn: &DatabaseTransaction, reference: &Reference) -> Result<bool, DbErr> {
    let found = image::Entity::find()
        .filter(image::Column::Repository.eq(reference.repository()))
        .filter(image::Column::Tag.eq(reference.tag()))
        .one(txn)
        .await?;
    Ok(found.is_some())
}

fn in_sight(sight: &Sight) -> Select<image::Entity> {
    let visible = image::Entity::find().filter(image::Column::Deleted.eq(false));
    match sight {
        Sight::Everything => visible,
        Sight::CreatedBy(subject) => visible.filter(image::Column::Creator.eq(subject)),
    }
}

async fn visible(txn: &DatabaseTransaction, id: ImageId) -> Result<image::Model, Error> {
    in_sight(&Sight::Everything)
        .filter(image::Column::Id.eq(id.0))
        .lock_exclusive()
        .one(txn)
        .await?
        .ok_or(Error::NotFound(Resource::Image))
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
