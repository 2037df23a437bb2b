//! What makes an image: its record, its configuration, its first build.

use sea_orm::{EntityTrait, IntoActiveModel};

use super::{SnapshotOrder, WithBuild};
use crate::{
    access::{Permissions, Standing},
    build::{Build, Happening, Job, Kind, Record},
    error::Error,
    image::{
        Configuration, Image, ImageId, ImageInView, NewImage, Requirements, Status, WantedReference,
        search_text,
    },
    store::{
        ChangeKind, builds,
        changes::{self, NewChange},
        contexts,
        decided::{self, Moved},
        entity::{self, configuration, image},
        queue, references, rows, usage,
        write::Write,
    },
};

impl Write<'_> {
    /// Creates an image, and its first build unless it is a template.
    pub(super) async fn create(
        &mut self,
        new: &NewImage,
        creator: &str,
        snapshot: Option<&SnapshotOrder>,
    ) -> Result<WithBuild, Error> {
        if !new.template {
            queue::require_room(&self.txn, self.request.caller.subject(), self.store.policy()).await?;
        }
        let now = self.now;
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
            preferred_worker: None,
            workspace: snapshot.map(|order| order.workspace.clone()),
        };
        let requested_by = self.request.caller.subject().to_owned();
        let mut build = (!new.template).then(|| Build::queued(id, 1, requested_by, job, now));
        let changes::Logged { revision, at } =
            changes::log(&self.txn, NewChange::new(id, ChangeKind::Content, creator), now).await?;
        let mut row = image::Model {
            id: id.0,
            name: new.name.as_str().to_owned(),
            description: new.description.as_str().to_owned(),
            creator: creator.to_owned(),
            status: build
                .as_ref()
                .map_or(rows::NO_STATUS, |build| rows::status_to_code(Status::of(build.kind, build.state))),
            status_message: String::new(),
            repository: reference.repository().to_owned(),
            tag: reference.tag().to_owned(),
            reference_given: matches!(new.reference, WantedReference::Given(_)),
            template: new.template,
            snapshot: snapshot.is_some(),
            enabled: new.enabled,
            pulled,
            configuration_revision: 1,
            artifact_json: None,
            artifact_image: None,
            created_at: at.micros(),
            updated_at: at.micros(),
            revision,
            edit_revision: revision,
            latest_build: build.as_ref().map(|build| build.id.0),
            deleted: false,
            index_bytes: 0,
        };
        let image = rows::image_from_row(row.clone())?;
        row.index_bytes = index_bytes(&image, &new.configuration);
        self.charge(creator, usage::Change { images: 1, bytes: row.index_bytes }).await?;
        self.txn.later(image::Entity::insert(row.into_active_model()));
        self.write_configuration(id, 1, &new.configuration).await?;
        if !new.template && !pulled {
            references::take_chosen(&self.txn, id.0, &new.reference, &reference).await?;
        }
        self.effects.committed.changed.insert(id);
        let build = match &mut build {
            Some(build) => {
                self.enqueue(build).await?;
                Some(builds::in_view(&self.txn, build.clone(), self.store.policy(), now).await?)
            }
            None => None,
        };
        let standing = if snapshot.is_some() { self.standing_of_new(&image) } else { Standing::Owner };
        let actions = image.allowed_actions(standing);
        // Whoever vouches for somebody else does not see what that one sees.
        let configuration = (standing == Standing::Owner).then(|| new.configuration.clone());
        Ok((ImageInView { image, configuration, actions }, build))
    }

    /// What the caller is to an image that it has created in another's name.
    fn standing_of_new(&self, image: &Image) -> Standing {
        let nothing = Permissions::default();
        let standing = self.request.caller.sight().standing(&image.creator, |_| nothing);
        standing.unwrap_or(Standing::Guest(nothing))
    }

    pub(super) async fn write_configuration(
        &self,
        image: ImageId,
        revision: i64,
        configuration: &Configuration,
    ) -> Result<(), Error> {
        contexts::require(&self.txn, configuration, self.now).await?;
        let row = configuration::Model {
            image: image.0,
            revision,
            json: rows::to_json(configuration)?,
            archive: configuration.archive().map(str::to_owned),
            base: configuration.base().map(str::to_owned),
        };
        self.txn.later(configuration::Entity::insert(row.into_active_model()));
        Ok(())
    }

    /// Puts a build into the queue: its row, and the first record of its history, which is the answer.
    pub(super) async fn enqueue(&mut self, build: &mut Build) -> Result<Record, Error> {
        build.round = queue::next_round(&self.txn, &build.requested_by).await?;
        build.trace.clone_from(&self.request.trace);
        let message = format!("queued by {}", build.requested_by);
        let queued = Happening::State { state: build.state, message };
        let first = build.record(build.queued_at, queued);
        self.txn.later(entity::build::Entity::insert(rows::build_to_row(build)?.into_active_model()));
        decided::record(&self.txn, &[Moved::queued(build, &first)], &mut self.effects.committed)?;
        Ok(first)
    }
}

/// Returns what an image takes in the memory of the index, but for its grants. Bytes.
pub(super) fn index_bytes(image: &Image, configuration: &Configuration) -> i64 {
    let text = search_text(&image.name, &image.description, configuration);
    i64::try_from(image.index_bytes(text.as_str().len())).unwrap_or(i64::MAX)
}
