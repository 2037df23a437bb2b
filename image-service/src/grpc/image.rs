//! Conversion of images from and to their messages.

use std::{
    ptr,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use prost::Message as _;
use proto::images as wire;
use quick_cache::{Weighter, sync::Cache};

use super::field;
use crate::{
    access::Action,
    error::Violations,
    image::{Artifact, Image, ImageDraft, ImageId, ImageInView, Status},
    index::{CachedConfiguration, Entry, VisibleImage},
    search::Part,
};

/// Extracts the fields that a caller may set.
fn draft(image: wire::Image) -> ImageDraft {
    ImageDraft {
        name: image.name,
        description: image.description,
        repository: image.repository,
        tag: image.tag,
        template: image.template,
        enabled: image.enabled,
        configuration: image.config.map(super::configuration::draft),
    }
}

/// Extracts the fields that a caller may set; records a violation if the image is missing.
pub(super) fn given(violations: &mut Violations, image: Option<wire::Image>) -> Option<ImageDraft> {
    if image.is_none() {
        violations.add("image", "must be given");
    }
    image.map(draft)
}

impl From<ImageDraft> for wire::Image {
    fn from(draft: ImageDraft) -> Self {
        Self {
            name: draft.name,
            description: draft.description,
            repository: draft.repository,
            tag: draft.tag,
            template: draft.template,
            enabled: draft.enabled,
            config: draft.configuration.map(Into::into),
            ..Self::default()
        }
    }
}

impl From<ImageInView> for wire::Image {
    fn from(view: ImageInView) -> Self {
        let allowed_actions =
            view.actions.into_iter().map(|action| wire::ImageAction::from(action).into()).collect();
        let config = view.configuration.map(|configuration| (*configuration).clone().into());
        Self { config, allowed_actions, ..basic(view.image) }
    }
}

/// An encoder of images as callers see them, which caches the parts that all callers share.
#[derive(Debug)]
pub(super) struct Encoder(Cache<ImageId, EncodedRecord, ByLength>);

/// An encoded record, and the entry that it was made from. A changed image has another entry.
#[derive(Clone, Debug)]
struct EncodedRecord {
    entry: Weak<Entry>,
    record: Bytes,
}

#[derive(Clone, Debug)]
struct ByLength;

impl Weighter<ImageId, EncodedRecord> for ByLength {
    fn weight(&self, _: &ImageId, encoded: &EncodedRecord) -> u64 {
        /// Memory of a slot in the cache and of an entry that is gone, in bytes.
        const FIXED: usize = 512;
        (FIXED + encoded.record.len()) as u64
    }
}

impl Encoder {
    /// Maximum memory of the records, in bytes.
    const MEMORY: u64 = 8 * 1024 * 1024;
    /// Expected number of records in the cache.
    const EXPECTED: usize = 8_000;

    pub(super) fn new() -> Self {
        Self(Cache::with_weighter(Self::EXPECTED, Self::MEMORY, ByLength))
    }

    /// Encodes an image as its caller sees it.
    ///
    /// Concatenated messages decode as one message that has the fields of all.
    pub(super) fn encode(
        &self,
        found: &VisibleImage,
        configuration: Option<&CachedConfiguration>,
        hits: &[Part],
    ) -> Bytes {
        let record = self.record(&found.entry);
        let allowed_actions =
            found.actions().into_iter().map(|action| wire::ImageAction::from(action).into());
        let of_caller = wire::Image {
            allowed_actions: allowed_actions.collect(),
            search_hits: hits.iter().map(|part| wire::SearchHit::from(*part).into()).collect(),
            ..wire::Image::default()
        };
        let configuration = configuration.map_or(&[][..], |cached| {
            cached.encoded(|configuration| {
                let config = Some((**configuration).clone().into());
                wire::Image { config, ..wire::Image::default() }.encode_to_vec().into()
            })
        });
        let mut encoded = Vec::with_capacity(record.len() + configuration.len() + of_caller.encoded_len());
        encoded.extend_from_slice(&record);
        encoded.extend_from_slice(configuration);
        // Encoding into a vector cannot run out of space.
        of_caller.encode_raw(&mut encoded);
        encoded.into()
    }

    fn record(&self, entry: &Arc<Entry>) -> Bytes {
        let id = entry.image.id;
        let known = self.0.get(&id).filter(|known| ptr::eq(known.entry.as_ptr(), Arc::as_ptr(entry)));
        known.map_or_else(
            || {
                let record: Bytes = basic(entry.image.clone()).encode_to_vec().into();
                self.0.insert(id, EncodedRecord { entry: Arc::downgrade(entry), record: record.clone() });
                record
            },
            |known| known.record,
        )
    }
}

fn basic(image: Image) -> wire::Image {
    let artifact = image.artifact();
    let current_reference = image.current_reference().to_string();
    let setting = |text: &str, is_set: bool| if is_set { text.to_owned() } else { String::new() };
    wire::Image {
        stale: artifact.as_ref().is_some_and(|artifact| artifact.is_stale(image.configuration_revision)),
        id: image.id.to_string(),
        name: image.name,
        description: image.description,
        creator: image.creator,
        status: image.status.map(|status| wire::ImageStatus::from(status).into()),
        status_message: image.status_message,
        repository: setting(image.reference.repository(), image.reference_given),
        tag: setting(image.reference.tag(), !image.pulled),
        reference: current_reference,
        build_reference: image.reference.to_string(),
        config: None,
        config_revision: image.configuration_revision,
        artifact: artifact
            .map(|artifact| wire::Artifact { missing: image.artifact_missing, ..artifact.into() }),
        create_time: Some(field::time(image.created_at)),
        update_time: Some(field::time(image.updated_at)),
        revision: image.revision,
        latest_build_id: image.latest_build.map(|build| build.to_string()).unwrap_or_default(),
        template: image.template,
        enabled: Some(image.enabled),
        pulled: image.pulled,
        snapshot: image.snapshot,
        etag: image.etag.to_string(),
        state_etag: field::state_etag(image.revision),
        allowed_actions: Vec::new(),
        search_hits: Vec::new(),
    }
}

impl From<Status> for wire::ImageStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::BuildPending => Self::BuildPending,
            Status::Building => Self::Building,
            Status::BuildFinished => Self::BuildFinished,
            Status::BuildCancelled => Self::BuildCancelled,
            Status::Snapshotting => Self::Snapshotting,
            Status::Error => Self::Error,
        }
    }
}

/// Converts a status; `None` if no image can have it.
pub(super) fn status(number: i32) -> Option<Status> {
    match wire::ImageStatus::try_from(number) {
        Ok(wire::ImageStatus::BuildPending) => Some(Status::BuildPending),
        Ok(wire::ImageStatus::Building) => Some(Status::Building),
        Ok(wire::ImageStatus::BuildFinished) => Some(Status::BuildFinished),
        Ok(wire::ImageStatus::BuildCancelled) => Some(Status::BuildCancelled),
        Ok(wire::ImageStatus::Snapshotting) => Some(Status::Snapshotting),
        Ok(wire::ImageStatus::Error) => Some(Status::Error),
        Ok(wire::ImageStatus::Unspecified) | Err(_) => None,
    }
}

impl From<Part> for wire::SearchHit {
    fn from(part: Part) -> Self {
        match part {
            Part::Name => Self::Name,
            Part::Description => Self::Description,
            Part::Configuration => Self::Config,
        }
    }
}

impl From<Action> for wire::ImageAction {
    fn from(action: Action) -> Self {
        match action {
            Action::CreateWorkspace => Self::CreateWorkspace,
            Action::Build => Self::Build,
            Action::CancelBuild => Self::CancelBuild,
            Action::Enable => Self::Enable,
            Action::Disable => Self::Disable,
            Action::Clone => Self::Clone,
            Action::Edit => Self::Edit,
            Action::Share => Self::Share,
            Action::Delete => Self::Delete,
        }
    }
}

impl From<Artifact> for wire::Artifact {
    fn from(artifact: Artifact) -> Self {
        Self {
            image_id: artifact.image_id,
            size_bytes: artifact.size_bytes,
            worker: artifact.worker,
            finish_time: Some(field::time(artifact.finished_at)),
            config_revision: artifact.configuration_revision,
            build_id: artifact.build.to_string(),
            reference: artifact.reference.map(|reference| reference.to_string()).unwrap_or_default(),
            repo_digest: artifact.repo_digest.unwrap_or_default(),
            config_digest: artifact.config_digest.unwrap_or_default(),
            missing: false,
        }
    }
}
