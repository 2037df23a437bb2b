//! A plain model of the catalogue: a map of images that is searched, filtered and sorted whole.
//!
//! It shares no code with the service. Values that only the service can know, such as ids and times, are
//! taken from its answers.

use std::{cmp::Ordering, collections::BTreeMap};

use caseless::Caseless as _;
use proto::images::{
    self as api, ImageAction, ImageKind, ImageStatus, ImageView, Permission, image_config::Source,
};
use unicode_normalization::UnicodeNormalization as _;

use crate::client::Client;

/// A caller that lists.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) subject: String,
    pub(super) is_admin: bool,
    pub(super) client: Client,
}

/// All images by id.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// The full image, without `allowed_actions`.
    pub(super) image: api::Image,
    pub(super) grants: BTreeMap<String, Vec<Permission>>,
    /// The values to search, case-folded.
    folded: Vec<String>,
}

impl Model {
    /// Returns everything that a list should contain, on all pages together.
    pub(super) fn listed(&self, caller: &Caller, request: &api::ListImagesRequest) -> Vec<api::Image> {
        let term = fold(&request.search);
        let is_asked_for = |entry: &&Entry| {
            let image = &entry.image;
            entry.is_seen_by(caller)
                && entry.folded.iter().any(|value| value.contains(&term))
                && match request.kind() {
                    ImageKind::Unspecified => true,
                    ImageKind::Image => !image.template,
                    ImageKind::Template => image.template,
                }
                && (request.statuses.is_empty() || request.statuses.contains(&image.status().into()))
                && (request.enabled.is_none() || request.enabled == image.enabled)
                && request.pulled.is_none_or(|pulled| pulled == image.pulled)
                && (request.creator.is_empty() || request.creator == image.creator)
        };
        let is_full = request.view() == ImageView::Full;
        let mut found: Vec<api::Image> = self
            .entries
            .values()
            .filter(is_asked_for)
            .map(|entry| api::Image {
                config: entry.image.config.clone().filter(|_| is_full),
                allowed_actions: entry.actions(caller),
                ..entry.image.clone()
            })
            .collect();
        found.sort_by(|a, b| compare(&request.order_by, a, b));
        found
    }
}

impl Entry {
    pub(super) fn new(image: api::Image) -> Self {
        let folded = values(&image).iter().map(|value| fold(value)).collect();
        Self { image, grants: BTreeMap::new(), folded }
    }

    /// Applies the answer to a change, which must equal `expected` except for what the service sets.
    pub(super) fn replace_with(&mut self, expected: api::Image, answer: api::Image) {
        let grants = std::mem::take(&mut self.grants);
        *self = Self { grants, ..Self::new(agreed(expected, answer)) };
    }

    fn is_seen_by(&self, caller: &Caller) -> bool {
        self.is_owned_by(caller) || self.grants.contains_key(&caller.subject)
    }

    fn is_owned_by(&self, caller: &Caller) -> bool {
        caller.is_admin || self.image.creator == caller.subject
    }

    /// Returns the actions that a caller who sees the image may take now.
    fn actions(&self, caller: &Caller) -> Vec<i32> {
        let is_owner = self.is_owned_by(caller);
        let granted = self.grants.get(&caller.subject).map_or(&[][..], Vec::as_slice);
        let can_modify = is_owner || granted.contains(&Permission::Modify);
        let can_delete = is_owner || granted.contains(&Permission::Delete);
        let (status, is_enabled) = (self.image.status(), self.image.enabled());
        let is_finished = status == ImageStatus::BuildFinished;
        let is_at_rest =
            [ImageStatus::BuildFinished, ImageStatus::BuildCancelled, ImageStatus::Error].contains(&status);
        let is_in_progress = [ImageStatus::BuildPending, ImageStatus::Building].contains(&status);
        [
            (ImageAction::CreateWorkspace, is_finished && is_enabled),
            (ImageAction::Build, can_modify && is_at_rest && !self.image.snapshot),
            (ImageAction::CancelBuild, can_modify && is_in_progress),
            (ImageAction::Enable, can_modify && !is_enabled),
            (ImageAction::Disable, can_modify && is_enabled),
            (ImageAction::Clone, !self.image.snapshot || is_finished),
            (ImageAction::Edit, can_modify),
            (ImageAction::Share, is_owner),
            (ImageAction::Delete, can_delete),
        ]
        .into_iter()
        .filter_map(|(action, is_allowed)| is_allowed.then_some(action.into()))
        .collect()
    }
}

/// Returns the expected image with the values that only the service can know.
///
/// Panics if the answer differs from it in anything else.
pub(super) fn agreed(expected: api::Image, answer: api::Image) -> api::Image {
    let is_stale =
        expected.artifact.as_ref().is_some_and(|built| built.config_revision != answer.config_revision);
    let agreed = api::Image {
        id: answer.id.clone(),
        status_message: answer.status_message.clone(),
        repository: answer.repository.clone(),
        tag: answer.tag.clone(),
        reference: answer.reference.clone(),
        build_reference: answer.build_reference.clone(),
        search_hits: answer.search_hits.clone(),
        config_revision: answer.config_revision,
        create_time: answer.create_time,
        update_time: answer.update_time,
        revision: answer.revision,
        latest_build_id: answer.latest_build_id.clone(),
        etag: answer.etag.clone(),
        state_etag: answer.state_etag.clone(),
        stale: is_stale,
        allowed_actions: Vec::new(),
        ..expected
    };
    // Answers in the BASIC view have no configuration.
    let config = answer.config.clone().or_else(|| agreed.config.clone());
    assert_eq!(api::Image { config, allowed_actions: Vec::new(), ..answer }, agreed);
    agreed
}

/// Compares two images by the order of a list.
pub(super) fn compare(order_by: &str, a: &api::Image, b: &api::Image) -> Ordering {
    let order_by = if order_by.is_empty() { "update_time desc" } else { order_by };
    let by_keys = order_by.split(',').map(str::trim).map(|key| match key.strip_suffix(" desc") {
        Some(key) => compare_by(key.trim(), b, a),
        None => compare_by(key, a, b),
    });
    by_keys.fold(Ordering::Equal, Ordering::then).then_with(|| a.id.cmp(&b.id))
}

fn compare_by(key: &str, a: &api::Image, b: &api::Image) -> Ordering {
    let created = |image: &api::Image| image.create_time.map(|time| (time.seconds, time.nanos));
    let updated = |image: &api::Image| image.update_time.map(|time| (time.seconds, time.nanos));
    match key {
        "name" => fold(&a.name).chars().cmp(fold(&b.name).chars()),
        "creator" => a.creator.chars().cmp(b.creator.chars()),
        "image_name" => a.reference.chars().cmp(b.reference.chars()),
        "status" => a.status.cmp(&b.status),
        "enabled" => a.enabled.cmp(&b.enabled),
        "pulled" => a.pulled.cmp(&b.pulled),
        "create_time" => created(a).cmp(&created(b)),
        "update_time" => updated(a).cmp(&updated(b)),
        _ => panic!("{key} is no key"),
    }
}

/// Returns the full case folding of the text, over NFC.
fn fold(text: &str) -> String {
    text.nfc().default_case_fold().nfc().collect()
}

/// Returns every value by which an image can be found.
pub(super) fn values(image: &api::Image) -> Vec<String> {
    let mut values = vec![image.name.clone(), image.description.clone()];
    let Some(config) = &image.config else {
        return values;
    };
    // Content with a NUL is not text.
    let text = |content: &[u8]| {
        String::from_utf8(content.to_vec()).ok().filter(|text| !text.contains('\0')).unwrap_or_default()
    };
    match &config.source {
        Some(Source::Dockerfile(source)) => {
            values.extend([source.text.clone(), source.target.clone()]);
            values.extend(pairs(&source.build_args));
            values.extend(source.files.iter().flat_map(|file| [file.path.clone(), text(&file.content)]));
        }
        Some(Source::Generate(source)) => {
            values.extend([source.base_image.clone(), source.user.clone()]);
            values.extend(source.apt_packages.iter().chain(&source.python_packages).cloned());
            values.extend(source.start_commands.iter().cloned());
            values.extend(pairs(&source.environment));
            values.extend(source.files.iter().flat_map(|file| [file.path.clone(), text(&file.content)]));
        }
        Some(Source::Pull(source)) => values.push(source.reference.clone()),
        None => {}
    }
    for service in &config.services {
        values.extend([service.name.clone(), service.command.clone()]);
        values.extend(service.packages.iter().cloned());
        values.extend(service.ports.iter().map(ToString::to_string));
        values.extend(pairs(&service.environment));
    }
    values.push(config.worker.clone());
    values.extend(pairs(&config.worker_labels));
    values
}

fn pairs(map: &BTreeMap<String, String>) -> impl Iterator<Item = String> {
    map.iter().flat_map(|(name, value)| [name.clone(), value.clone()])
}
