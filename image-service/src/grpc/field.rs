//! Fields that many requests have: ids, pages, views, times.

use prost_types::Timestamp as WireTimestamp;
use proto::images as wire;
use uuid::Uuid;

use crate::{
    access::is_subject,
    error::{Error, Violations},
    image::{Etag, ImageId, View},
    timestamp::Timestamp,
};

const DEFAULT_PAGE: u64 = 50;
const MAX_PAGE: u64 = 1_000;

/// Parses a UUID.
pub(super) fn id(field: &str, text: &str) -> Result<Uuid, Error> {
    // Only the hyphenated form: one id has one spelling.
    Uuid::try_parse(text).ok().filter(|_| text.len() == 36).ok_or_else(|| {
        let rule =
            if text.is_empty() { "must not be empty" } else { "must be a UUID in its hyphenated form" };
        Error::Invalid(Violations::one(field, rule))
    })
}

/// Parses an image's id, or notes what is wrong with it and gives one that no image has.
pub(super) fn image(violations: &mut Violations, field: &str, text: &str) -> ImageId {
    match id(field, text) {
        Ok(id) => return ImageId(id),
        Err(Error::Invalid(found)) => {
            found.iter().for_each(|found| violations.add(&found.field, &found.rule))
        }
        Err(_) => violations.add(field, "must be an id"),
    }
    ImageId(Uuid::nil())
}

/// Parses an etag; any when empty. What was never given as one is nobody's.
pub(super) fn etag(text: &str) -> Option<Etag> {
    (!text.is_empty()).then(|| Etag(i64::from_str_radix(text, 16).unwrap_or(i64::MIN)))
}

/// Checks what names a caller.
pub(super) fn subject(violations: &mut Violations, field: &str, subject: &str) {
    if !is_subject(subject) {
        violations.add(field, "must have 1 to 255 bytes and no control characters");
    }
}

/// Parses a page size.
pub(super) fn page_size(size: i32) -> Result<u64, Error> {
    match u64::try_from(size) {
        Ok(0) => Ok(DEFAULT_PAGE),
        Ok(size) => Ok(size.min(MAX_PAGE)),
        Err(_) => Err(Error::Invalid(Violations::one("page_size", "must not be negative"))),
    }
}

/// What is wrong with a page token that does not open.
pub(super) fn foreign_page_token() -> Error {
    let rule = "must be the `next_page_token` of this list, given to the same caller for the same request";
    Error::Invalid(Violations::one("page_token", rule))
}

/// Parses a view.
pub(super) fn view(number: i32) -> Result<View, Error> {
    match wire::ImageView::try_from(number) {
        Ok(wire::ImageView::Unspecified | wire::ImageView::Basic) => Ok(View::Basic),
        Ok(wire::ImageView::Full) => Ok(View::Full),
        Err(_) => Err(Error::Invalid(Violations::one("view", "must be a known view"))),
    }
}

/// A time for the wire.
pub(super) fn time(at: Timestamp) -> WireTimestamp {
    WireTimestamp {
        seconds: at.micros().div_euclid(1_000_000),
        nanos: i32::try_from(at.micros().rem_euclid(1_000_000) * 1_000).unwrap_or(0),
    }
}
