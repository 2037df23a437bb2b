//! Fields that many requests share: ids, pages, views, times.

use prost_types::Timestamp as WireTimestamp;
use proto::images as wire;
use uuid::Uuid;

use crate::{
    access::is_subject,
    error::{Error, Violations},
    image::{Etag, ImageId, Precondition, View},
    timestamp::Timestamp,
};

/// First character of a state etag; no hexadecimal digit.
const STATE_ETAG: char = 's';
const DEFAULT_PAGE: u64 = 50;
const MAX_PAGE: u64 = 1_000;

/// Parses a UUID.
pub(super) fn id(field: &str, text: &str) -> Result<Uuid, Error> {
    // Only the hyphenated form is accepted, so that an id has one spelling.
    Uuid::try_parse(text).ok().filter(|_| text.len() == 36).ok_or_else(|| {
        let rule =
            if text.is_empty() { "must not be empty" } else { "must be a UUID in its hyphenated form" };
        Error::Invalid(Violations::one(field, rule))
    })
}

/// Parses the id of an image; records a violation and returns the nil id if it is invalid.
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

/// Returns the etag of everything that callers are shown of an image with its last change at this revision.
pub(super) fn state_etag(revision: i64) -> String {
    format!("{STATE_ETAG}{revision:x}")
}

/// Parses an etag or a state etag; `None` for an empty one, which matches any version.
///
/// An invalid one becomes one that never matches.
pub(super) fn etag(text: &str) -> Option<Precondition> {
    let parse = |revision| i64::from_str_radix(revision, 16).unwrap_or(i64::MIN);
    let state = text.strip_prefix(STATE_ETAG).map(|revision| Precondition::State(parse(revision)));
    (!text.is_empty()).then(|| state.unwrap_or_else(|| Precondition::Record(Etag(parse(text)))))
}

/// Checks the name of a caller, and records a violation if it is invalid.
pub(super) fn subject(violations: &mut Violations, field: &str, subject: &str) {
    if !is_subject(subject) {
        violations.add(field, "must have 1 to 255 bytes and no control or format characters");
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

/// Returns the error for a page token that does not open.
pub(super) fn foreign_page_token() -> Error {
    let rule = "must be the `next_page_token` of this list, given to the same caller for the same request";
    Error::Invalid(Violations::one("page_token", rule))
}

/// Returns the error for a resume revision that was issued for another watch.
pub(super) fn foreign_revision() -> Error {
    let rule =
        "must be a `resume_revision` of this service, given to the same caller for the same query and view";
    Error::Invalid(Violations::one("after_revision", rule))
}

/// Parses a view.
pub(super) fn view(number: i32) -> Result<View, Error> {
    match wire::ImageView::try_from(number) {
        Ok(wire::ImageView::Unspecified | wire::ImageView::Basic) => Ok(View::Basic),
        Ok(wire::ImageView::Full) => Ok(View::Full),
        Err(_) => Err(Error::Invalid(Violations::one("view", "must be a known view"))),
    }
}

/// Converts a time to its message; a time after the year 9999, which a message cannot have, to the last that it can.
pub(super) fn time(at: Timestamp) -> WireTimestamp {
    const LAST: i64 = 253_402_300_799_999_999;
    let micros = at.micros().min(LAST);
    WireTimestamp {
        seconds: micros.div_euclid(1_000_000),
        nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1_000).unwrap_or(0),
    }
}
