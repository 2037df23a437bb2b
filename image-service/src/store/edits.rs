//! What callers change: images created, edited, enabled, built, cancelled and deleted.

use std::collections::BTreeSet;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, DbErr, EntityTrait, IntoActiveModel, QueryFilter, Set, sea_query::Expr,
};

use super::{
    Effects, Store, apply, builds, changes,
    entity::{configuration, image},
    grants, images, purge, references, rows, texts,
    write::{Target, Write},
};
use crate::{
    access::{Action, Standing},
    build::{Build, BuildId, BuildInView, Happening, Job, Kind, Workspace},
    dispatch::{self, Decision, Event, Rows},
    error::{Error, Refusal, Resource},
    image::{
        BatchAction, Configuration, EditDraft, Etag, Image, ImageId, ImageInView, NewImage,
        RepositoryPrefixes, Requirements, Status, View, WantedReference,
    },
    request::Request,
};

/// An image and the build that was asked for, if it has one.
pub(crate) type WithBuild = (ImageInView, Option<BuildInView>);

/// One image of a batch, or what is wrong with how it was named.
pub(crate) type BatchTarget = Result<(ImageId, Option<Etag>), Error>;

/// What came of one image of a batch.
pub(crate) type BatchOutcome = Result<ImageInView, Error>;

/// The workspace that a snapshot is taken of.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotOrder {
    pub(crate) workspace: Workspace,
    pub(crate) worker: String,
    /// Who shall be the creator of the image.
    pub(crate) creator: String,
}

impl Store {
    /// Creates an image; its first build is in the queue, unless it is a template.
    pub(crate) async fn create_image(
        &self,
        request: &Request,
        new: &NewImage,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let answer = write.create(new, request.caller.subject(), None).await?;
        write.finish(answer).await
    }

    /// Creates an image from a running workspace; the snapshot is in the queue.
    pub(crate) async fn snapshot_workspace(
        &self,
        request: &Request,
        new: impl FnOnce(Configuration) -> NewImage,
        order: &SnapshotOrder,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let source = image::Entity::find_by_id(order.workspace.source.0)
            .filter(image::Column::Deleted.eq(false))
            .one(&write.txn)
            .await?
            .ok_or(Error::NotFound(Resource::Image))?;
        let configuration =
            images::configuration(&write.txn, ImageId(source.id), source.configuration_revision).await?;
        let new = new(configuration);
        let answer = write.create(&new, &order.creator, Some(order)).await?;
        write.finish(answer).await
    }

    /// Changes what clients may write.
    pub(crate) async fn update_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
        edit: EditDraft,
        prefixes: &RepositoryPrefixes,
    ) -> Result<(ImageInView, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let answer = write.update(id, etag, edit, prefixes).await?;
        write.finish(answer).await
    }

    /// Says whether an image can back workspaces.
    pub(crate) async fn enable_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
        enabled: bool,
    ) -> Result<(ImageInView, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let answer = write.enable(id, etag, enabled).await?;
        write.finish(answer).await
    }

    /// Queues another build of an image.
    pub(crate) async fn build_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let (image, build) = write.build(id, etag).await?;
        let build = builds::in_view(&write.txn, build, self.policy(), request.now).await?;
        write.finish((image, Some(build))).await
    }

    /// Cancels the latest build, if it is the one that is meant.
    pub(crate) async fn cancel_build(
        &self,
        request: &Request,
        id: ImageId,
        meant: Option<BuildId>,
    ) -> Result<(WithBuild, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let (image, build) = write.cancel(id, None, meant).await?;
        let build = builds::in_view(&write.txn, build, self.policy(), request.now).await?;
        write.finish((image, Some(build))).await
    }

    /// Makes an image invisible, and cancels the build that is under way. What is left of it is removed at once when no
    /// work is under way, else when that has stopped.
    pub(crate) async fn delete_image(
        &self,
        request: &Request,
        id: ImageId,
        etag: Option<Etag>,
    ) -> Result<((), Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        write.delete(id, etag).await?;
        write.finish(()).await
    }

    /// Does one thing to each of the images, each for itself, in one transaction.
    pub(crate) async fn batch_images(
        &self,
        request: &Request,
        action: BatchAction,
        targets: Vec<BatchTarget>,
    ) -> Result<(Vec<BatchOutcome>, Effects), Error> {
        let mut write = self.begin(request).await?;
        if let Some(answer) = write.repeated().await? {
            return Ok((answer, Effects::default()));
        }
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            let outcome = match target {
                Ok((id, etag)) => write.one_of_batch(action, id, etag).await,
                Err(error) => Err(error),
            };
            // What is refused has written nothing; when the database fails, all fail.
            if let Err(error @ (Error::Internal(_) | Error::Busy)) = outcome {
                return Err(error);
            }
            outcomes.push(outcome);
        }
        write.finish(outcomes).await
    }
}

impl Write<'_> {
    async fn create(
        &mut self,
        new: &NewImage,
        creator: &str,
        snapshot: Option<&SnapshotOrder>,
    ) -> Result<WithBuild, Error> {
        let now = self.now();
        let id = ImageId::new();
        let pulled = new.configuration.is_pull() && snapshot.is_none();
        let reference = references::choose(&self.txn, id, &new.reference, !new.template && !pulled).await?;
        let job = Job {
            kind: match snapshot {
                Some(_) => Kind::Snapshot,
                None if pulled => Kind::Pull,
                None => Kind::Build,
            },
            configuration_revision: 1,
            reference: reference.clone(),
            requirements: snapshot.map_or_else(
                || new.configuration.requirements(),
                |order| Requirements::of_snapshot(order.worker.clone()),
            ),
            workspace: snapshot.map(|order| order.workspace.clone()),
        };
        let requested_by = self.request.caller.subject().to_owned();
        let mut build = (!new.template).then(|| Build::queued(id, 1, requested_by, job, now));
        let revision = changes::log(&self.txn, id, creator, &BTreeSet::new(), now).await?;
        let row = image::Model {
            id: id.0,
            name: new.name.as_str().to_owned(),
            description: new.description.as_str().to_owned(),
            creator: creator.to_owned(),
            status: build
                .as_ref()
                .map_or(rows::NO_STATUS, |build| rows::status_to_code(Status::of(build.kind, build.state))),
            status_message: String::new(),
            image_name: reference.to_string(),
            repository: reference.repository().to_owned(),
            tag: reference.tag().to_owned(),
            reference_given: matches!(new.reference, WantedReference::Given(_)),
            template: new.template,
            snapshot: snapshot.is_some(),
            enabled: new.enabled,
            pulled,
            configuration_revision: 1,
            artifact_json: None,
            created_at: now.micros(),
            updated_at: now.micros(),
            revision,
            edit_revision: revision,
            latest_build: build.as_ref().map(|build| build.id.0),
            deleted: false,
        };
        image::Entity::insert(row.clone().into_active_model()).exec_without_returning(&self.txn).await?;
        self.write_configuration(id, 1, &new.configuration).await?;
        texts::write(&self.txn, &row, &new.configuration).await?;
        references::settle(&self.txn, &row).await?;
        self.effects.committed.image_changed = true;
        let build = match &mut build {
            Some(build) => {
                self.enqueue(build).await?;
                Some(builds::in_view(&self.txn, build.clone(), self.store.policy(), now).await?)
            }
            None => None,
        };
        let image = rows::image_from_row(row)?;
        let standing = if snapshot.is_some() { self.standing_of_new(&image) } else { Standing::Owner };
        let actions = image.allowed_actions(standing);
        Ok((ImageInView { image, configuration: Some(new.configuration.clone()), actions }, build))
    }

    /// What the caller is to an image that it has created in another's name.
    fn standing_of_new(&self, image: &Image) -> Standing {
        let nothing = crate::access::Permissions::default();
        self.request.caller.sight().standing(&image.creator, nothing).unwrap_or(Standing::Guest(nothing))
    }

    async fn write_configuration(
        &self,
        image: ImageId,
        revision: i64,
        configuration: &Configuration,
    ) -> Result<(), DbErr> {
        let row = configuration::Model { image: image.0, revision, json: rows::to_json(configuration)? };
        configuration::Entity::insert(row.into_active_model()).exec_without_returning(&self.txn).await?;
        Ok(())
    }

    /// Puts a build into the queue: its row, and the first record of its history.
    async fn enqueue(&mut self, build: &mut Build) -> Result<(), Error> {
        let message = format!("queued by {}", build.requested_by);
        let queued = Happening::State { state: build.state, message };
        let record = build.record(build.queued_at, queued);
        let row = rows::build_to_row(build)?;
        super::entity::build::Entity::insert(row.into_active_model())
            .exec_without_returning(&self.txn)
            .await?;
        let decision = Decision { build: Some(build.clone()), records: vec![record], ..Decision::default() };
        apply(&self.txn, &decision, self.now(), &mut self.effects.committed).await
    }

    async fn update(
        &mut self,
        id: ImageId,
        etag: Option<Etag>,
        edit: EditDraft,
        prefixes: &RepositoryPrefixes,
    ) -> Result<ImageInView, Error> {
        let target = self.target(id, etag, Action::Edit).await?;
        let edit = edit.check(&target.image, prefixes, self.request.caller.is_admin())?;
        let current = images::configuration(&self.txn, id, target.image.configuration_revision).await?;
        let configuration = edit.configuration.filter(|configuration| *configuration != current);
        let mut row = target.row.clone();
        edit.name.as_str().clone_into(&mut row.name);
        edit.description.as_str().clone_into(&mut row.description);
        if let Some(configuration) = &configuration {
            row.configuration_revision += 1;
            row.pulled = configuration.is_pull() && !row.snapshot;
            self.write_configuration(id, row.configuration_revision, configuration).await?;
        }
        if let Some(wanted) = &edit.reference {
            let reference = references::choose(&self.txn, id, wanted, !row.template && !row.pulled).await?;
            row.image_name = reference.to_string();
            reference.repository().clone_into(&mut row.repository);
            reference.tag().clone_into(&mut row.tag);
            row.reference_given = matches!(wanted, WantedReference::Given(_));
        }
        if row != target.row {
            texts::write(&self.txn, &row, configuration.as_ref().unwrap_or(&current)).await?;
            references::settle(&self.txn, &row).await?;
            self.save_edit(row).await?;
        }
        let (image, standing) = target.reread(&self.txn).await?;
        Ok(images::in_view(&self.txn, image, standing, View::Full).await?)
    }

    /// Writes the row that a client has changed, under a new revision and etag.
    async fn save_edit(&mut self, mut row: image::Model) -> Result<(), Error> {
        let id = ImageId(row.id);
        let viewers = grants::viewers(&self.txn, id).await?;
        row.revision = changes::log(&self.txn, id, &row.creator, &viewers, self.now()).await?;
        row.edit_revision = row.revision;
        row.updated_at = self.now().micros();
        row.into_active_model().reset_all().update(&self.txn).await?;
        self.effects.committed.image_changed = true;
        Ok(())
    }

    async fn enable(&mut self, id: ImageId, etag: Option<Etag>, enabled: bool) -> Result<ImageInView, Error> {
        let action = if enabled { Action::Enable } else { Action::Disable };
        let target = self.target(id, etag, action).await?;
        if target.row.enabled != enabled {
            self.save_edit(image::Model { enabled, ..target.row.clone() }).await?;
        }
        self.basic(target).await
    }

    async fn build(&mut self, id: ImageId, etag: Option<Etag>) -> Result<(ImageInView, Build), Error> {
        let target = self.target(id, etag, Action::Build).await?;
        let revision = target.image.configuration_revision;
        let configuration = images::configuration(&self.txn, id, revision).await?;
        let number = match target.row.latest_build {
            Some(latest) => builds::one(&self.txn, latest).await?.number,
            None => 0,
        };
        let job = Job {
            kind: if target.image.pulled { Kind::Pull } else { Kind::Build },
            configuration_revision: revision,
            reference: target.image.reference.clone(),
            requirements: configuration.requirements(),
            workspace: None,
        };
        let requested_by = self.request.caller.subject().to_owned();
        let mut build = Build::queued(id, number + 1, requested_by, job, self.now());
        image::Entity::update_many()
            .col_expr(image::Column::LatestBuild, Expr::value(build.id.0))
            .filter(image::Column::Id.eq(id.0))
            .exec(&self.txn)
            .await?;
        self.enqueue(&mut build).await?;
        Ok((self.basic(target).await?, build))
    }

    async fn cancel(
        &mut self,
        id: ImageId,
        etag: Option<Etag>,
        meant: Option<BuildId>,
    ) -> Result<(ImageInView, Build), Error> {
        let target = self.target(id, etag, Action::CancelBuild).await;
        // A build that is meant and is not the latest one says more than that there is nothing to cancel.
        if let (Some(meant), Err(Error::Refused(Refusal::NoBuildInProgress))) = (meant, &target) {
            let latest =
                image::Entity::find_by_id(id.0).one(&self.txn).await?.and_then(|row| row.latest_build);
            if latest != Some(meant.0) {
                return Err(Error::Refused(Refusal::OtherBuild));
            }
        }
        let target = target?;
        let latest = target.image.latest_build.ok_or(Error::Refused(Refusal::NoBuildInProgress))?;
        if meant.is_some_and(|meant| meant != latest) {
            return Err(Error::Refused(Refusal::OtherBuild));
        }
        let build = builds::one(&self.txn, latest.0).await?;
        let build = self.request_cancel(build).await?;
        Ok((self.basic(target).await?, build))
    }

    /// Decides a cancel and writes what follows from it.
    async fn request_cancel(&mut self, build: Build) -> Result<Build, Error> {
        let event = Event::Cancel { by: self.request.caller.subject().to_owned() };
        let rows = Rows { build: build.clone(), configuration: None };
        let mut decision =
            dispatch::decide(rows, &event, self.store.policy(), self.now()).map_err(Error::Refused)?;
        apply(&self.txn, &decision, self.now(), &mut self.effects.committed).await?;
        self.effects.messages.append(&mut decision.messages);
        Ok(decision.build.unwrap_or(build))
    }

    async fn delete(&mut self, id: ImageId, etag: Option<Etag>) -> Result<ImageInView, Error> {
        let target = self.target(id, etag, Action::Delete).await?;
        let actions = target.image.allowed_actions(target.standing);
        let viewers = grants::viewers(&self.txn, id).await?;
        changes::log(&self.txn, id, &target.image.creator, &viewers, self.now()).await?;
        self.effects.committed.image_changed = true;
        image::Entity::update(image::ActiveModel { id: Set(id.0), deleted: Set(true), ..Default::default() })
            .exec(&self.txn)
            .await?;
        let active = builds::active_of(&self.txn, id).await?;
        if let Some(build) = active {
            // A snapshot that has begun ends by itself.
            match self.request_cancel(build).await {
                Ok(_) | Err(Error::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        } else {
            purge(&self.txn, id).await?;
        }
        Ok(ImageInView { image: target.image, configuration: None, actions })
    }

    async fn one_of_batch(&mut self, action: BatchAction, id: ImageId, etag: Option<Etag>) -> BatchOutcome {
        match action {
            BatchAction::Build => self.build(id, etag).await.map(|(image, _)| image),
            BatchAction::CancelBuild => self.cancel(id, etag, None).await.map(|(image, _)| image),
            BatchAction::Enable => self.enable(id, etag, true).await,
            BatchAction::Disable => self.enable(id, etag, false).await,
            BatchAction::Delete => self.delete(id, etag).await,
        }
    }

    async fn basic(&self, target: Target) -> Result<ImageInView, Error> {
        let (image, standing) = target.reread(&self.txn).await?;
        Ok(images::in_view(&self.txn, image, standing, View::Basic).await?)
    }
}
