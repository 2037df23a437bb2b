//! The parameters of lists and watches of images.

use proto::images as wire;

use super::{field, image};
use crate::{
    error::{Error, Violations},
    image::{Order, Position, Query},
    search::Term,
};

/// Parses the query of a list, and reports all violations together.
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
    let (enabled, pulled) = (request.enabled, request.pulled);
    let mut query = Query { search, template, enabled, pulled, ..Query::default() };
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
    if field::view(request.view).is_err() {
        violations.add("view", "must be a known view");
    }
    query.order = violations.take("order_by", Order::parse(&request.order_by)).unwrap_or_default();
    if request.page_size < 0 {
        violations.add("page_size", "must not be negative");
    }
    violations.check()?;
    Ok(query)
}

/// Parses the query of a watch, which is that of a list in any order.
pub(super) fn watched(request: &wire::WatchImagesRequest) -> Result<Query, Error> {
    query(&wire::ListImagesRequest {
        search: request.search.clone(),
        kind: request.kind,
        statuses: request.statuses.clone(),
        enabled: request.enabled,
        pulled: request.pulled,
        creator: request.creator.clone(),
        view: request.view,
        ..wire::ListImagesRequest::default()
    })
}

/// Returns the parameters to which a resume revision is bound.
pub(super) fn watch_bound(request: &wire::WatchImagesRequest) -> String {
    // The view is bound by its meaning.
    let bound = wire::WatchImagesRequest { after_revision: String::new(), view: 0, ..request.clone() };
    format!("WatchImages/{bound:?}")
}

/// Returns the watch that continues from a list.
pub(super) fn watch_of(request: &wire::ListImagesRequest) -> wire::WatchImagesRequest {
    wire::WatchImagesRequest {
        after_revision: String::new(),
        view: request.view,
        search: request.search.clone(),
        kind: request.kind,
        statuses: request.statuses.clone(),
        enabled: request.enabled,
        pulled: request.pulled,
        creator: request.creator.clone(),
    }
}

/// Returns the parameters to which a page token is bound.
pub(super) fn bound(request: &wire::ListImagesRequest) -> String {
    let bound = wire::ListImagesRequest {
        page_size: 0,
        page_token: String::new(),
        include_total_size: false,
        ..request.clone()
    };
    format!("ListImages/{bound:?}")
}

pub(super) fn write_position(position: &Position) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(position).map_err(|error| Error::Internal(Box::new(error)))
}

/// Parses a position; `None` if it is no position in this order.
pub(super) fn read_position(json: &[u8], order: &Order) -> Option<Position> {
    serde_json::from_slice(json).ok().filter(|position| order.fits(position))
}
