//! The answer to any write, and the part of it that can be predicted.

use std::collections::BTreeMap;

use proto::images as api;
use tonic::Status;

use crate::permissions::calls::{status_text, wording};

/// The answer to any write.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) images: Vec<Result<api::Image, Status>>,
    pub(super) build: Option<api::Build>,
    pub(super) grant: Option<api::Grant>,
    pub(super) worker: Option<api::Worker>,
}

/// An answer without the values that only the write itself can know.
///
/// Of ids of new records, times, revisions and etags, only whether they have changed is kept.
#[derive(Debug, PartialEq)]
pub(super) struct Comparable {
    /// Images, or errors with their words and their full wording.
    pub(super) rows: Vec<Result<api::Image, (String, String)>>,
    build: Option<api::Build>,
    grant: Option<api::Grant>,
    worker: Option<api::Worker>,
}

impl Answer {
    pub(super) fn new(image: Option<api::Image>, build: Option<api::Build>) -> Self {
        Self { images: image.map(Ok).into_iter().collect(), build, ..Self::default() }
    }

    pub(super) fn comparable(self, before: &BTreeMap<String, api::Image>) -> Comparable {
        let build = self.build.map(|build| comparable_build(build, before));
        let rows = self.images.into_iter().map(|row| match row {
            Ok(image) => Ok(comparable_image(image, before)),
            Err(_) => Err((status_text(&row), format!("{:?}", wording(&row)))),
        });
        Comparable { rows: rows.collect(), build, grant: self.grant, worker: self.worker }
    }
}

fn comparable_image(image: api::Image, before: &BTreeMap<String, api::Image>) -> api::Image {
    let new = api::Image::default();
    let before = before.get(&image.id).unwrap_or(&new);
    let has_changed = image.revision != before.revision;
    api::Image {
        id: known(&image.id, &before.id),
        etag: known(&image.etag, &before.etag),
        state_etag: known(&image.state_etag, &before.state_etag),
        latest_build_id: known(&image.latest_build_id, &before.latest_build_id),
        revision: has_changed.into(),
        create_time: before.create_time,
        update_time: image.update_time.filter(|_| !has_changed),
        ..image
    }
}

fn comparable_build(build: api::Build, before: &BTreeMap<String, api::Image>) -> api::Build {
    let image = before.get(&build.image_id);
    let latest = image.map_or("", |image| &image.latest_build_id);
    let is_known = build.id == latest;
    api::Build {
        id: known(&build.id, latest),
        image_id: known(&build.image_id, image.map_or("", |image| &image.id)),
        queue_time: build.queue_time.filter(|_| is_known),
        finish_time: build.finish_time.map(|_| prost_types::Timestamp::default()),
        ..build
    }
}

/// Returns the id if it was known before, or else `new`.
fn known(id: &str, before: &str) -> String {
    if id == before { id.to_owned() } else { "new".to_owned() }
}
