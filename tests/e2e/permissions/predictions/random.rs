//! Random writes, the same for the same seed, to images that exist, existed, or never did.

use std::collections::BTreeMap;

use fastrand::Rng;
use image_service::Role;
use proto::images::{self as api, image_config::Source};

use super::{answer::Answer, write::Write};
use crate::{
    client::{Client, grant_of, image, repository, revoked_from},
    permissions::cast::{self, WORKER},
    stack::Service,
};

/// Name of a worker without any capability.
pub(super) const IDLE_WORKER: &str = "w2";
const PLATFORM: &str = "platform";

#[rustfmt::skip]
const CALLERS: [&str; 12] = [
    "creator", "creator", "creator", "creator", "admin", "admin", "guest-m", "guest-m*", "guest-d", "guest-v", "stranger", PLATFORM,
];
const SUBJECTS: [&str; 5] = ["creator", "guest-m", "guest-v", "stranger", "nobody"];
const NAMES: [&str; 5] = ["Go tools", "go  tools", "Rust", "image-queued", "Mine"];
const REPOSITORIES: [&str; 5] = ["", "", "mine", "go-tools", "rust"];
const TAGS: [&str; 4] = ["", "", "", "v1"];
const UNKNOWN_ARCHIVE: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
const MOST_ROWS: usize = 12;

/// The images that are the targets of writes.
pub(super) struct World {
    random: Rng,
    /// Images that exist or existed, in the order of their creation.
    images: Vec<String>,
    /// Images in each of the states, without those that a write has tried to build.
    unbuilt: Vec<String>,
    /// Latest build of each image, and the one before.
    builds: BTreeMap<String, (String, String)>,
    /// Digest of a stored archive.
    archive: String,
}

/// Returns a caller by its name.
pub(super) fn client(service: &Service, name: &str) -> Client {
    match name {
        PLATFORM => service.client(&service.token(name, &[Role::Service])),
        _ => cast::client(service, name),
    }
}

impl World {
    pub(super) fn new(seed: u64, images: Vec<String>, archive: String) -> Self {
        let builds = BTreeMap::new();
        Self { random: Rng::with_seed(seed), unbuilt: images.clone(), images, builds, archive }
    }

    /// Adds the images that a write has created.
    pub(super) fn remember(&mut self, done: &Answer) {
        let ids: Vec<_> = done.images.iter().flatten().map(|image| image.id.clone()).collect();
        for id in ids {
            if !self.images.contains(&id) {
                self.images.push(id);
            }
        }
    }

    /// Returns the next write and its caller.
    pub(super) fn next(&mut self, now: &BTreeMap<String, api::Image>) -> (&'static str, Write) {
        for (id, image) in now {
            let (latest, earlier) = self.builds.entry(id.clone()).or_default();
            if *latest != image.latest_build_id {
                *earlier = std::mem::replace(latest, image.latest_build_id.clone());
            }
        }
        if let Some(id) = self.unbuilt.pop() {
            let caller = ["creator", "admin", "guest-m"][self.unbuilt.len() % 3];
            return (caller, Write::Build(api::BuildImageRequest { id, ..Default::default() }));
        }
        let caller = self.one_of(&CALLERS);
        let id = self.id();
        let etag = self.etag(&id, now);
        let write = match self.random.u8(0..40) {
            0..5 => {
                let image = Some(self.image());
                Write::Create(api::CreateImageRequest { image, ..Default::default() })
            }
            5..11 => self.update(id, etag),
            11..13 => Write::Enable(api::EnableImageRequest { id, etag, ..Default::default() }),
            13..15 => Write::Disable(api::DisableImageRequest { id, etag, ..Default::default() }),
            15..18 => Write::Build(api::BuildImageRequest { id, etag, ..Default::default() }),
            18..21 => {
                let (latest, earlier) = self.builds.get(&id).cloned().unwrap_or_default();
                let build_id = self.one_of(&["", &latest, &earlier, &missing()]).to_owned();
                Write::Cancel(api::CancelBuildRequest { id, build_id, etag, ..Default::default() })
            }
            21 => Write::Delete(api::DeleteImageRequest { id, etag, ..Default::default() }),
            22..32 => self.batch(now),
            32..34 => {
                let snapshot = api::SnapshotWorkspaceRequest {
                    source_image_id: id,
                    worker: self.one_of(&[WORKER, "absent"]).to_owned(),
                    container: "workspace".to_owned(),
                    creator: self.one_of(&["creator", "admin"]).to_owned(),
                    image: Some(api::Image { config: None, template: false, ..self.image() }),
                    ..Default::default()
                };
                return (self.one_of(&[PLATFORM, PLATFORM, "admin", "creator"]), Write::Snapshot(snapshot));
            }
            34..37 => {
                let all = [api::Permission::View, api::Permission::Modify, api::Permission::Delete];
                let permissions = all.into_iter().filter(|_| self.random.bool()).map(Into::into).collect();
                let grant = Some(grant_of(self.one_of(&SUBJECTS), permissions));
                Write::Grant(api::GrantAccessRequest { image_id: id, grant, ..Default::default() })
            }
            37 => {
                let grantee = revoked_from(self.one_of(&SUBJECTS));
                Write::Revoke(api::RevokeAccessRequest { image_id: id, grantee, ..Default::default() })
            }
            _ => {
                let name = self.one_of(&[IDLE_WORKER, IDLE_WORKER, "absent"]).to_owned();
                let write = if self.random.bool() {
                    Write::Drain(api::DrainWorkerRequest { name, ..Default::default() })
                } else {
                    Write::Resume(api::ResumeWorkerRequest { name, ..Default::default() })
                };
                return (self.one_of(&["admin", "admin", "creator"]), write);
            }
        };
        (caller, write)
    }

    fn update(&mut self, id: String, etag: String) -> Write {
        let fields = ["name", "description", "repository", "tag", "config"];
        let paths: Vec<_> =
            fields.into_iter().filter(|_| self.random.u8(0..3) == 0).map(str::to_owned).collect();
        let image = api::Image { id, etag, ..self.image() };
        let update_mask = Some(prost_types::FieldMask { paths });
        Write::Update(api::UpdateImageRequest { image: Some(image), update_mask, ..Default::default() })
    }

    fn batch(&mut self, now: &BTreeMap<String, api::Image>) -> Write {
        use api::BatchAction::{Build, CancelBuild, Delete, Disable, Enable};
        let action = self.one_of(&[Build, Build, CancelBuild, CancelBuild, Disable, Enable, Delete]);
        // A few, so that some images are left.
        let most = if action == Delete { 3 } else { MOST_ROWS };
        let mut targets: Vec<api::BatchTarget> = Vec::new();
        for _ in 0..self.random.usize(1..=most) {
            let target = match (self.random.u8(0..12), targets.len()) {
                (0, _) => api::BatchTarget { id: "nonsense".to_owned(), ..Default::default() },
                (1..4, 1..) => targets[self.random.usize(0..targets.len())].clone(),
                _ => {
                    let id = self.id_for(action, now);
                    api::BatchTarget { etag: self.etag(&id, now), id }
                }
            };
            targets.push(target);
        }
        Write::Batch(api::BatchImagesRequest { action: action.into(), targets, ..Default::default() })
    }

    /// Returns an image as callers may send it.
    fn image(&mut self) -> api::Image {
        let mut wanted = image(self.one_of(&NAMES), "FROM scratch");
        wanted.description = self.one_of(&["", "described"]).to_owned();
        let name = self.one_of(&REPOSITORIES);
        // Often that of another creator.
        wanted.repository = if name.is_empty() { String::new() } else { repository("creator", name) };
        wanted.tag = self.one_of(&TAGS).to_owned();
        wanted.template = self.random.u8(0..4) == 0;
        wanted.enabled = [None, Some(false), Some(true)][self.random.usize(0..3)];
        let config = wanted.config.as_mut().expect("an image has a configuration");
        config.worker = self.one_of(&["", WORKER, "absent"]).to_owned();
        match self.random.u8(0..16) {
            0 => config.source = None,
            1 => wanted.name.clear(),
            2 => wanted.repository = "ubuntu".to_owned(),
            3..6 => {
                config.source = Some(Source::Pull(api::PullSource { reference: "busybox:1".to_owned() }));
            }
            6..9 => {
                let archive = self.one_of(&[&self.archive.clone(), UNKNOWN_ARCHIVE]).to_owned();
                let source = api::DockerfileSource { archive, ..Default::default() };
                config.source = Some(Source::Dockerfile(source));
            }
            _ => {}
        }
        wanted
    }

    /// Returns the id of an image that was created at some time, or of one that never was.
    fn id(&mut self) -> String {
        match self.random.usize(0..=self.images.len()) {
            0 => missing(),
            pick => self.images[pick - 1].clone(),
        }
    }

    /// Returns an id like [`Self::id`], but most often one on which the action has an effect.
    fn id_for(&mut self, action: api::BatchAction, now: &BTreeMap<String, api::Image>) -> String {
        use api::ImageStatus::{BuildCancelled, BuildFinished, BuildPending, Building, Error};
        let fits = |image: &api::Image| match action {
            api::BatchAction::Build => {
                !image.snapshot && [BuildCancelled, BuildFinished, Error].contains(&image.status())
            }
            api::BatchAction::CancelBuild => [BuildPending, Building].contains(&image.status()),
            api::BatchAction::Unspecified
            | api::BatchAction::Enable
            | api::BatchAction::Disable
            | api::BatchAction::Delete => true,
        };
        let fitting: Vec<_> = now.values().filter(|image| fits(image)).map(|image| &image.id).collect();
        if fitting.is_empty() || self.random.u8(0..3) == 0 {
            self.id()
        } else {
            self.one_of(&fitting).clone()
        }
    }

    fn etag(&mut self, id: &str, now: &BTreeMap<String, api::Image>) -> String {
        match self.random.u8(0..9) {
            0 => "0".to_owned(),
            1 | 2 => now.get(id).map(|image| image.etag.clone()).unwrap_or_default(),
            3 | 4 => now.get(id).map(|image| image.state_etag.clone()).unwrap_or_default(),
            _ => String::new(),
        }
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.random.usize(0..all.len())]
    }
}

fn missing() -> String {
    uuid::Uuid::now_v7().to_string()
}
