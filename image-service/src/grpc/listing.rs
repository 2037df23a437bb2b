//! What a list of images is asked with.

use proto::images as wire;

use super::{field, image};
use crate::{
    error::{Error, Violations},
    image::{Order, Place, Query},
    search::Term,
};

/// Reads the query of a list; every violation is reported together.
pub(super) fn query(request: &wire::ListImagesRequest) -> Result<Query, Error> {
    let mut violations = Violations::default();
    let mut query = filter(
        &mut violations,
        &Filter {
            search: &request.search,
            kind: request.kind,
            statuses: &request.statuses,
            enabled: request.enabled,
            pulled: request.pulled,
            creator: &request.creator,
            view: request.view,
        },
    );
    query.order = violations.take("order_by", Order::parse(&request.order_by)).unwrap_or_default();
    if request.page_size < 0 {
        violations.add("page_size", "must not be negative");
    }
    violations.check()?;
    Ok(query)
}

/// Reads the query of a watch; every violation is reported together.
pub(super) fn watched(request: &wire::WatchImagesRequest) -> Result<Query, Error> {
    let mut violations = Violations::default();
    let query = filter(
        &mut violations,
        &Filter {
            search: &request.search,
            kind: request.kind,
            statuses: &request.statuses,
            enabled: request.enabled,
            pulled: request.pulled,
            creator: &request.creator,
            view: request.view,
        },
    );
    violations.check()?;
    Ok(query)
}

/// What lists and watches have in common.
struct Filter<'a> {
    search: &'a str,
    kind: i32,
    statuses: &'a [i32],
    enabled: Option<bool>,
    pulled: Option<bool>,
    creator: &'a str,
    view: i32,
}

fn filter(violations: &mut Violations, filter: &Filter<'_>) -> Query {
    let search = violations.take("search", Term::parse(filter.search)).flatten();
    let template = match wire::ImageKind::try_from(filter.kind) {
        Ok(wire::ImageKind::Unspecified) => None,
        Ok(wire::ImageKind::Image) => Some(false),
        Ok(wire::ImageKind::Template) => Some(true),
        Err(_) => {
            violations.add("kind", "must be a known kind");
            None
        }
    };
    let (enabled, pulled) = (filter.enabled, filter.pulled);
    let mut query = Query { search, template, enabled, pulled, ..Query::default() };
    for (i, number) in filter.statuses.iter().enumerate() {
        match image::status(*number) {
            Some(status) => {
                query.statuses.insert(status);
            }
            None => violations.add(format!("statuses[{i}]"), "must be a known status"),
        }
    }
    if !filter.creator.is_empty() {
        field::subject(violations, "creator", filter.creator);
        query.creator = Some(filter.creator.to_owned());
    }
    if field::view(filter.view).is_err() {
        violations.add("view", "must be a known view");
    }
    query
}

/// The request as a revision is bound to it.
pub(super) fn watch_bound(request: &wire::WatchImagesRequest) -> String {
    let bound = wire::WatchImagesRequest { after_revision: String::new(), ..request.clone() };
    format!("WatchImages/{bound:?}")
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

pub(super) fn write_place(place: &Place) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(place).map_err(|error| Error::Internal(Box::new(error)))
}

/// `None` when it is no place in this order.
pub(super) fn read_place(json: &[u8], order: &Order) -> Option<Place> {
    serde_json::from_slice(json).ok().filter(|place| order.fits(place))
}
