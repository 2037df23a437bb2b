//! What a list of images is asked with.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use proto::images as wire;

use super::{field, image};
use crate::{
    error::{Error, Violations},
    image::{Order, Place, Query},
    search::Term,
};

/// Reads the query of a request; every violation is reported together.
pub(super) fn query(request: &wire::ListImagesRequest) -> Result<Query, Error> {
    let mut violations = Violations::default();
    let search = violations.take("search", Term::parse(&request.search)).flatten();
    let template = match wire::ImageKind::try_from(request.kind) {
        Ok(wire::ImageKind::Unspecified) => None,
        Ok(wire::ImageKind::Image) => Some(false),
        Ok(wire::ImageKind::Template) => Some(true),
        Err(_) => {
            violations.add("kind", "must be a known kind");
            None
        }
    };
    let mut query =
        Query { search, template, enabled: request.enabled, pulled: request.pulled, ..Query::default() };
    for (i, number) in request.statuses.iter().enumerate() {
        match image::status(*number) {
            Some(status) => {
                query.statuses.insert(status);
            }
            None => violations.add(format!("statuses[{i}]"), "must be a known status"),
        }
    }
    if !request.creator.is_empty() {
        field::subject(&mut violations, "creator", &request.creator);
        query.creator = Some(request.creator.clone());
    }
    query.order = violations.take("order_by", Order::parse(&request.order_by)).unwrap_or_default();
    if request.page_size < 0 {
        violations.add("page_size", "must not be negative");
    }
    if field::view(request.view).is_err() {
        violations.add("view", "must be a known view");
    }
    violations.check()?;
    Ok(query)
}

/// The request as a page token is bound to it.
pub(super) fn bound(request: &wire::ListImagesRequest) -> String {
    let bound = wire::ListImagesRequest {
        page_size: 0,
        page_token: String::new(),
        include_total_size: false,
        ..request.clone()
    };
    format!("ListImages/{bound:?}")
}

pub(super) fn write_place(place: &Place) -> Result<String, Error> {
    let json = serde_json::to_vec(place).map_err(|error| Error::Internal(Box::new(error)))?;
    Ok(BASE64_URL_SAFE_NO_PAD.encode(json))
}

/// `None` when it is no place in this order.
pub(super) fn read_place(text: &str, order: &Order) -> Option<Place> {
    let json = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
    serde_json::from_slice(&json).ok().filter(|place| order.fits(place))
}
