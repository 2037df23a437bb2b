//! Callers' changes to images: edit, enable, build, cancel and delete.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, Set, sea_query::Expr,
};

use super::{
    builds,
    change_log::{self, NewChange},
    contexts, decisions,
    entity::image,
    grants, images, references,
    request_transaction::{RequestTransaction, Target},
    required, retention,
};
use crate::{
    access::Action,
    build::{Build, BuildId, BuildInView},
    change::ChangeKind,
    dispatch::{self, BuildChange, Event, Rows},
    error::{Error, Refusal},
    image::{
        BatchAction, EditDraft, Etag, Image, ImageId, ImageInView, Precondition, RepositoryPrefixes,
        UsageChange, View,
    },
};

/// An image and the build that the write has queued or cancelled, if any.
pub(crate) type WithBuild = (ImageInView, Option<BuildInView>);

/// One image of a batch, or the error in the request for it.
pub(crate) type BatchTarget = Result<(ImageId, Option<Precondition>), Error>;

/// The outcome of one image of a batch.
pub(crate) type BatchOutcome = Result<ImageInView, Error>;

impl RequestTransaction<'_> {
    /// Applies an edit to an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller does not see the image, the errors of [`Image::admit_edit`]
    /// and [`EditDraft::check`], [`Error::Invalid`] if the archive of the configuration is not kept,
    /// [`Error::ReferenceTaken`] if another image owns the new reference, and [`Error::CreatorQuotaExceeded`]
    /// or [`Error::CatalogueFull`] if a quota leaves no room.
    pub(crate) async fn update(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        edit: EditDraft,
        prefixes: &RepositoryPrefixes,
    ) -> Result<ImageInView, Error> {
        let Target { row, image: before, standing } = self.seen(id).await?;
        before.admit_edit(standing, etag, &edit)?;
        let edit = edit.check(
            &before,
            &prefixes.namespace(&before.creator, self.request.caller.is_admin()),
            standing.may_change_reference(),
        )?;
        let current = images::configuration(&self.txn, id, before.configuration_revision).await?;
        let mut image = before.clone();
        let configuration = edit.apply(&mut image, &current);
        if let Some(configuration) = configuration {
            // The previous one stays for as long as a build names it.
            self.store.require_storage()?;
            contexts::touch_named(&self.txn, id, self.now);
            self.write_configuration(id, image.configuration_revision, configuration).await?;
        }
        if let Some(wanted) = &edit.reference {
            let chosen = references::choose(&self.txn, id, wanted, image.writes_reference()).await?;
            image.set_reference(chosen, wanted.is_given());
        }
        if image != before {
            let bytes =
                image.index_bytes_with(configuration.unwrap_or(&current)) - before.index_bytes_with(&current);
            self.charge(&image.creator, UsageChange::of_bytes(bytes)).await?;
            let row = image::Model { index_bytes: row.index_bytes + bytes, ..image.into() };
            references::release_unused(&self.txn, [&row]).await?;
            image = self.save_edit(row, ChangeKind::Content).await?;
            if configuration.is_some() {
                retention::delete_unused_configurations(&self.txn, id);
            }
        }
        Ok(images::in_view(&self.txn, image, standing, View::Full).await?)
    }

    /// Saves a row that a client has changed, under a new revision and etag.
    async fn save_edit(&mut self, mut row: image::Model, kind: ChangeKind) -> Result<Image, Error> {
        let id = row.id;
        let logged = change_log::log(&self.txn, NewChange::new(id, kind, &row.creator), self.now).await?;
        row.revision = logged.revision;
        row.edit_revision = Etag(logged.revision);
        row.updated_at = logged.at;
        self.txn.defer(image::Entity::update(row.clone().into_active_model().reset_all()).validate()?);
        self.effects.committed.changed.insert(id);
        Ok(row.into())
    }

    /// Sets whether workspaces can be started from an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller does not see the image, and the errors of [`Image::admit`].
    pub(crate) async fn enable(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        enabled: bool,
    ) -> Result<ImageInView, Error> {
        let action = if enabled { Action::Enable } else { Action::Disable };
        let target = self.target(id, etag, action).await?;
        let image = if target.row.enabled == enabled {
            target.image
        } else {
            self.save_edit(image::Model { enabled, ..target.row }, ChangeKind::Record).await?
        };
        Ok(images::in_view(&self.txn, image, target.standing, View::Basic).await?)
    }

    /// Queues another build of an image.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller does not see the image, the errors of [`Image::admit`], and
    /// [`Error::TooManyPendingBuilds`] if the caller may not queue another build.
    pub(crate) async fn build(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<WithBuild, Error> {
        let (image, build) = self.queue_next(id, etag).await?;
        self.with_build(image, build).await
    }

    async fn queue_next(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<(ImageInView, Build), Error> {
        let target = self.target(id, etag, Action::Build).await?;
        self.require_room().await?;
        let revision = target.image.configuration_revision;
        let configuration = images::configuration(&self.txn, id, revision).await?;
        let number = match target.row.latest_build {
            Some(latest) => builds::one(&self.txn, latest).await?.number,
            None => 0,
        };
        let requester = self.request.caller.identity().clone();
        let mut build = target.image.next_build(number + 1, &configuration, requester, self.now);
        self.txn.defer(
            image::Entity::update_many()
                .col_expr(image::Column::LatestBuild, Expr::value(build.id))
                .filter(image::Column::Id.eq(id)),
        );
        let first = self.enqueue(&mut build).await?;
        let queued = vec![BuildChange::queued(&build, &first)];
        decisions::apply_to_images(&self.txn, queued, self.now, &mut self.effects.committed).await?;
        references::release_unused(&self.txn, [&target.row]).await?;
        Ok((self.basic(target).await?, build))
    }

    /// Cancels the latest build of an image, which must be `meant` if that is given.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller does not see the image, and the errors of
    /// [`Image::build_to_cancel`].
    pub(crate) async fn cancel(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        meant: Option<BuildId>,
    ) -> Result<WithBuild, Error> {
        let (image, build) = self.cancel_latest(id, etag, meant).await?;
        self.with_build(image, build).await
    }

    async fn cancel_latest(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
        meant: Option<BuildId>,
    ) -> Result<(ImageInView, Build), Error> {
        let target = self.seen(id).await?;
        let latest = match target.image.build_to_cancel(target.standing, etag, meant) {
            Err(Error::Refused(Refusal::OtherBuild)) => {
                return Err(builds::other_build(&self.txn, meant, id).await?);
            }
            latest => latest?,
        };
        let build = builds::one(&self.txn, latest).await?;
        let build = self.request_cancel(build).await?;
        Ok((self.basic(target).await?, build))
    }

    /// Decides a cancellation and writes its consequences.
    async fn request_cancel(&mut self, build: Build) -> Result<Build, Error> {
        let event = Event::Cancel { by: self.request.caller.subject().to_owned() };
        let rows = Rows { build: build.clone(), configuration: None };
        let mut decision =
            dispatch::decide(rows, &event, self.store.policy(), self.now).map_err(Error::Refused)?;
        decisions::apply(&self.txn, [&decision], self.now, &mut self.effects.committed).await?;
        self.effects.messages.append(&mut decision.messages);
        Ok(decision.build.unwrap_or(build))
    }

    /// Makes an image a tombstone and cancels its active build. Its rows are purged now, or once that build
    /// has stopped.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NotFound`] if the caller does not see the image, and the errors of [`Image::admit`].
    pub(crate) async fn delete(
        &mut self,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> Result<ImageInView, Error> {
        let target = self.target(id, etag, Action::Delete).await?;
        let actions = target.image.allowed_actions(target.standing);
        let grantees = grants::grantees(&self.txn, id).await?;
        let change = NewChange { grantees, ..NewChange::new(id, ChangeKind::Deleted, &target.image.creator) };
        change_log::log(&self.txn, change, self.now).await?;
        self.effects.committed.changed.insert(id);
        let usage = UsageChange::of_deleted_image(target.row.index_bytes);
        self.charge(&target.row.creator, usage).await?;
        let deleted = image::ActiveModel { id: Set(id), deleted: Set(true), ..Default::default() };
        self.txn.defer(image::Entity::update(deleted).validate()?);
        let active = builds::active_of(&self.txn, id).await?;
        if let Some(build) = active {
            // A snapshot that has begun cannot be cancelled, but ends by itself.
            match self.request_cancel(build).await {
                Ok(_) | Err(Error::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        } else {
            decisions::purge(&self.txn, id, self.now);
        }
        Ok(ImageInView { image: target.image, configuration: None, actions })
    }

    /// Applies an action to each of the images independently.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Busy`] or [`Error::Internal`] if the database fails. Any other error is the outcome
    /// of its image.
    pub(crate) async fn batch(
        &mut self,
        action: BatchAction,
        targets: Vec<BatchTarget>,
    ) -> Result<Vec<BatchOutcome>, Error> {
        let mut outcomes = Vec::with_capacity(targets.len());
        for target in targets {
            let outcome = match target {
                Ok((id, etag)) => self.one_of_batch(action, id, etag).await,
                Err(error) => Err(error),
            };
            // A refusal has written nothing. If the database fails, the whole batch does.
            if let Err(error @ (Error::Internal(_) | Error::Busy)) = outcome {
                return Err(error);
            }
            outcomes.push(outcome);
        }
        Ok(outcomes)
    }

    async fn one_of_batch(
        &mut self,
        action: BatchAction,
        id: ImageId,
        etag: Option<Precondition>,
    ) -> BatchOutcome {
        let image = match action {
            BatchAction::Build => self.queue_next(id, etag).await?.0,
            BatchAction::CancelBuild => self.cancel_latest(id, etag, None).await?.0,
            BatchAction::Enable => self.enable(id, etag, true).await?,
            BatchAction::Disable => self.enable(id, etag, false).await?,
            BatchAction::Delete => self.delete(id, etag).await?,
        };
        Ok(image.without_long_texts())
    }

    /// Adds the caller's view of a build.
    async fn with_build(&self, image: ImageInView, build: Build) -> Result<WithBuild, Error> {
        let build = builds::in_view(&self.txn, build, self.store.policy(), self.now).await?;
        Ok((image, Some(build)))
    }

    /// Returns an image as it is after the write.
    async fn basic(&self, target: Target) -> Result<ImageInView, Error> {
        let row = image::Entity::find_by_id(target.row.id).one(&self.txn).await?;
        let image = required(row, "an image that was written")?.into();
        Ok(images::in_view(&self.txn, image, target.standing, View::Basic).await?)
    }
}
