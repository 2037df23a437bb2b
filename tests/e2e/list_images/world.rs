//! A catalogue and its model, changed together.

use image_service::Role;
use proto::{
    dispatch::{
        Attempt, Built, Failed, FailureKind, Started, Succeeded, connect_response::Message as FromService,
        report_event::Event,
    },
    images::{self as api, ImageStatus, Permission, image_config::Source},
};

use super::{
    model::{Caller, Entry, Model, agreed, values},
    random::Random,
};
use crate::{
    actor::{Actor, IMAGE_ID, hello},
    client::{Client, grant_of, image, repository},
    stack::Service,
};

/// Callers that create images. The last one is an admin and sees everything.
const CREATORS: [&str; 6] = ["alice", "Alice", "Zoë", "z\u{327}", "😀", "root"];
/// Callers that see only what was granted to them, if anything.
const GUESTS: [&str; 2] = ["bob", "nobody"];

/// The service, its expected content, and its callers.
pub(super) struct World {
    pub(super) random: Random,
    pub(super) model: Model,
    pub(super) callers: Vec<Caller>,
    _worker: Actor,
    _service: Service,
}

impl World {
    /// Creates a catalogue of `images` images of every kind and status.
    pub(super) async fn create(seed: u64, images: usize) -> anyhow::Result<Self> {
        // A worker that has gone silent keeps its build for as long as the test lasts.
        let service = Service::start_with(&["--lease", "1h"]).await?;
        let caller = |subject: &&str| {
            let roles: &[Role] = if *subject == "root" { &[Role::Admin] } else { &[Role::Builder] };
            let client = service.client(&service.token(subject, roles));
            Caller { subject: (*subject).to_owned(), is_admin: *subject == "root", client }
        };
        let callers: Vec<Caller> = CREATORS.iter().chain(&GUESTS).map(caller).collect();
        let mut model = Model::default();
        let worker = build_some(&service, &callers[0], &mut model).await?;
        let random = Random::new(seed);
        let mut world = Self { random, model, callers, _worker: worker, _service: service };
        while world.model.entries.len() < images {
            world.insert().await?;
        }
        for _ in 0..images {
            match world.random.within(0..4) {
                0 => world.cancel_or_build().await?,
                1 | 2 => world.share().await?,
                _ => world.update().await?,
            }
        }
        Ok(world)
    }

    /// Returns every value of every image.
    pub(super) fn values(&self) -> Vec<String> {
        self.model.entries.values().flat_map(|entry| values(&entry.image)).collect()
    }

    /// Returns the subjects that may have created images.
    pub(super) fn creators(&self) -> Vec<String> {
        self.callers.iter().map(|caller| caller.subject.clone()).collect()
    }

    /// Makes a random change through the public API.
    pub(super) async fn change(&mut self) -> anyhow::Result<()> {
        match self.random.within(0..8) {
            0 => self.insert().await,
            1 | 2 => self.update().await,
            3 | 4 => self.enable_or_disable().await,
            5 => self.delete().await,
            6 => self.share().await,
            _ => self.cancel_or_build().await,
        }
    }

    async fn insert(&mut self) -> anyhow::Result<()> {
        if self.random.chance(5) {
            return self.snapshot().await;
        }
        let creator = self.random.within(0..CREATORS.len());
        let creator = &self.callers[creator];
        let mut draft = self.random.image();
        draft.repository = match draft.repository.as_str() {
            name if !name.is_empty() && creator.subject.is_ascii() => repository(&creator.subject, name),
            _ => String::new(),
        };
        let request = api::CreateImageRequest { image: Some(draft.clone()), ..Default::default() };
        let answer = creator.client.images.clone().create_image(request).await?.into_inner();
        let mut config = draft.config.clone().expect("every random image has one");
        let pulled = complete(&mut config);
        let status = (!draft.template).then_some(ImageStatus::BuildPending.into());
        let expected = api::Image {
            name: draft.name.trim().to_owned(),
            creator: creator.subject.clone(),
            status,
            enabled: Some(draft.enabled.unwrap_or(true)),
            config: Some(config),
            pulled,
            ..draft
        };
        self.add(expected, answer.image.expect("an image"));
        Ok(())
    }

    async fn snapshot(&mut self) -> anyhow::Result<()> {
        let (id, _) = self.any();
        let source = &self.model.entries[&id].image;
        let creator = self.random.one_of(&CREATORS).to_owned();
        let (name, description) = (self.random.name(), self.random.description());
        let expected = api::Image {
            name: name.trim().to_owned(),
            description: description.clone(),
            creator: creator.clone(),
            status: Some(ImageStatus::Snapshotting.into()),
            enabled: Some(true),
            snapshot: true,
            config: source.config.clone(),
            ..api::Image::default()
        };
        let request = api::SnapshotWorkspaceRequest {
            source_image_id: id,
            worker: "far away".to_owned(),
            container: "c1".to_owned(),
            creator,
            image: Some(api::Image { name, description, ..api::Image::default() }),
            ..Default::default()
        };
        let answer = self.admin().images.clone().snapshot_workspace(request).await?.into_inner();
        self.add(expected, answer.image.expect("an image"));
        Ok(())
    }

    async fn update(&mut self) -> anyhow::Result<()> {
        let (id, client) = self.any();
        let mut expected = self.model.entries[&id].image.clone();
        let mut image = api::Image { id: id.clone(), ..api::Image::default() };
        let mut paths = Vec::new();
        if self.random.chance(50) {
            image.name = self.random.name();
            image.name.trim().clone_into(&mut expected.name);
            paths.push("name".to_owned());
        }
        if self.random.chance(50) {
            image.description = self.random.description();
            expected.description.clone_from(&image.description);
            paths.push("description".to_owned());
        }
        if self.random.chance(50) || paths.is_empty() {
            let mut config = self.random.config();
            image.config = Some(config.clone());
            expected.pulled = complete(&mut config) && !expected.snapshot;
            expected.config = Some(config);
            paths.push("config".to_owned());
        }
        let request = api::UpdateImageRequest {
            image: Some(image),
            update_mask: Some(prost_types::FieldMask { paths }),
            ..Default::default()
        };
        let answer = client.images.clone().update_image(request).await?.into_inner();
        self.entry(&id).replace_with(expected, answer.image.expect("an image"));
        Ok(())
    }

    async fn enable_or_disable(&mut self) -> anyhow::Result<()> {
        let (id, client) = self.any();
        let mut images = client.images;
        let enabled = self.random.chance(50);
        let answer = if enabled {
            let request = api::EnableImageRequest { id: id.clone(), ..Default::default() };
            images.enable_image(request).await?.into_inner().image
        } else {
            let request = api::DisableImageRequest { id: id.clone(), ..Default::default() };
            images.disable_image(request).await?.into_inner().image
        };
        let entry = self.entry(&id);
        let expected = api::Image { enabled: Some(enabled), ..entry.image.clone() };
        entry.replace_with(expected, answer.expect("an image"));
        Ok(())
    }

    async fn cancel_or_build(&mut self) -> anyhow::Result<()> {
        let (id, client) = self.any();
        let entry = &self.model.entries[&id];
        let is_at_rest = [ImageStatus::BuildCancelled, ImageStatus::BuildFinished, ImageStatus::Error]
            .contains(&entry.image.status());
        let status = if entry.image.status() == ImageStatus::BuildPending {
            client.cancel(&id).await?;
            ImageStatus::BuildCancelled
        } else if is_at_rest && !entry.image.snapshot {
            client.build(&id).await?;
            ImageStatus::BuildPending
        } else {
            return Ok(());
        };
        let answer = self.admin().get(&id).await?;
        let entry = self.entry(&id);
        let expected = api::Image { status: Some(status.into()), ..entry.image.clone() };
        entry.replace_with(expected, answer);
        Ok(())
    }

    async fn delete(&mut self) -> anyhow::Result<()> {
        let (id, client) = self.any();
        if self.model.entries[&id].image.status() == ImageStatus::Building {
            return Ok(());
        }
        client.delete(&id).await?;
        self.model.entries.remove(&id);
        Ok(())
    }

    /// Grants a random caller some permissions, or revokes all of them.
    async fn share(&mut self) -> anyhow::Result<()> {
        let (id, client) = self.any();
        let guest = self.random.within(0..self.callers.len() - 1);
        let subject = self.callers[guest].subject.clone();
        let permissions = self.random.one_of(&[
            vec![],
            vec![Permission::View],
            vec![Permission::Modify],
            vec![Permission::Delete],
            vec![Permission::View, Permission::Modify, Permission::Delete],
        ]);
        let grant = grant_of(&subject, permissions.iter().map(|permission| (*permission).into()).collect());
        let request =
            api::GrantAccessRequest { image_id: id.clone(), grant: Some(grant), ..Default::default() };
        client.access.clone().grant_access(request).await?;
        let answer = self.admin().get(&id).await?;
        let entry = self.entry(&id);
        entry.replace_with(entry.image.clone(), answer);
        if permissions.is_empty() {
            entry.grants.remove(&subject);
        } else {
            entry.grants.insert(subject, permissions);
        }
        Ok(())
    }

    /// Returns a random image, and a client that may do everything with it.
    fn any(&mut self) -> (String, Client) {
        let at = self.random.within(0..self.model.entries.len());
        let (id, entry) = self.model.entries.iter().nth(at).expect("there are so many");
        let by_admin = self.random.chance(50);
        let is_fit =
            |caller: &&Caller| if by_admin { caller.is_admin } else { caller.subject == entry.image.creator };
        let caller = self.callers.iter().find(is_fit).expect("every creator is a caller");
        (id.clone(), caller.client.clone())
    }

    fn admin(&self) -> &Client {
        &self.callers.iter().find(|caller| caller.is_admin).expect("there is one").client
    }

    fn add(&mut self, expected: api::Image, answer: api::Image) {
        let image = agreed(expected, answer);
        self.model.entries.insert(image.id.clone(), Entry::new(image));
    }

    fn entry(&mut self, id: &str) -> &mut Entry {
        self.model.entries.get_mut(id).expect("it is in the model")
    }
}

/// Fills in the service's defaults and returns whether the image is pulled.
fn complete(config: &mut api::ImageConfig) -> bool {
    if let Some(Source::Generate(generate)) = &mut config.source
        && generate.base_image.is_empty()
    {
        "ubuntu:24.04".clone_into(&mut generate.base_image);
    }
    matches!(config.source, Some(Source::Pull(_)))
}

/// Creates images that a worker has built, failed to build, and is building.
async fn build_some(service: &Service, creator: &Caller, model: &mut Model) -> anyhow::Result<Actor> {
    let mut actor = Actor::connect(service, hello("w1", &[])).await?;
    for (name, status) in [
        ("built", ImageStatus::BuildFinished),
        ("Built", ImageStatus::BuildFinished),
        ("broken", ImageStatus::Error),
        ("in the making", ImageStatus::Building),
    ] {
        let (created, build) = creator.client.create(image(name, "FROM scratch")).await?;
        let (_, attempt) = actor.assignment().await?;
        let mut events = vec![Event::Started(Started {})];
        if status == ImageStatus::BuildFinished {
            events.push(Event::Built(Built {}));
        } else if status == ImageStatus::Error {
            let message = "no space left".to_owned();
            events.push(Event::Failed(Failed {
                kind: FailureKind::User.into(),
                message,
                ..Failed::default()
            }));
        }
        report(&mut actor, &attempt, 1, events).await?;
        if status == ImageStatus::BuildFinished {
            let succeeded = Succeeded { image_id: IMAGE_ID.to_owned(), size_bytes: 7, ..Default::default() };
            report(&mut actor, &attempt, 3, vec![Event::Succeeded(succeeded)]).await?;
        }
        let answer = creator.client.get(&created.id).await?;
        let artifact = (status == ImageStatus::BuildFinished).then(|| api::Artifact {
            image_id: IMAGE_ID.to_owned(),
            size_bytes: 7,
            worker: "w1".to_owned(),
            finish_time: answer.artifact.as_ref().and_then(|artifact| artifact.finish_time),
            config_revision: 1,
            build_id: build.id,
            reference: answer.reference.clone(),
            ..api::Artifact::default()
        });
        let expected = api::Image { status: Some(status.into()), artifact, ..created };
        let image = agreed(expected, answer);
        model.entries.insert(image.id.clone(), Entry::new(image));
    }
    Ok(actor)
}

/// Reports events and waits until they are durable.
async fn report(actor: &mut Actor, attempt: &Attempt, first: i64, events: Vec<Event>) -> anyhow::Result<()> {
    let last = first + i64::try_from(events.len())? - 1;
    actor.report(attempt, first, events).await;
    let mut message = actor.next().await?;
    if matches!(message, FromService::PublishGrant(_)) {
        message = actor.next().await?;
    }
    anyhow::ensure!(
        matches!(&message, FromService::ReportAck(ack) if ack.sequence == last),
        "{message:?} is no acknowledgement of {last}"
    );
    Ok(())
}
