//! The lists to measure, and their goals.

use proto::images::{self as api, ListImagesRequest};

use crate::seed::{HALF, creator, term};

/// A list to measure.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) request: ListImagesRequest,
    pub(super) class: Class,
}

/// A group of lists with the same goal.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Any filter, no term, default order.
    NoTerm,
    /// A term without a filter, in the default order.
    Term,
    /// A term that only the oldest tenth of the images has.
    OldTerm,
    /// Lists that no index helps: short terms, common trigrams, other orders, and terms with filters.
    Hostile,
}

impl Class {
    pub(super) const WITH_LIMITS: [Self; 3] = [Self::Term, Self::OldTerm, Self::Hostile];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::NoTerm => "any filter, no term",
            Self::Term => "a term in 20, in 10 %, in all, in none",
            Self::OldTerm => "a term in the oldest 10 %",
            Self::Hostile => "hostile and short terms, other orders",
        }
    }

    /// Returns the quantiles and their limits, in milliseconds.
    pub(super) fn limits(self, images: u64) -> &'static [(&'static str, f64)] {
        let is_large = images > 100_000;
        match self {
            Self::NoTerm => &[],
            Self::Term if is_large => &[("p50", 1.0), ("p99", 5.0)],
            Self::OldTerm if is_large => &[("p50", 1.0), ("p99", 15.0)],
            Self::Term | Self::OldTerm => &[("p50", 1.0), ("p99", 3.0)],
            Self::Hostile if is_large => &[("p99", 200.0)],
            Self::Hostile => &[("p99", 30.0)],
        }
    }
}

/// Names of the lists that are also measured by number of images.
pub(super) const GROWING: [&str; 9] = [
    "all",
    "disabled, 1 %",
    "term in 20 images",
    "term in 10 %",
    "term in the oldest 10 %",
    "hostile term",
    "two characters, in none",
    "by name",
    "by status, name",
];

pub(super) fn cases() -> Vec<Case> {
    let groups = [
        (Class::NoTerm, filters()),
        (Class::Term, terms()),
        (Class::OldTerm, vec![("term in the oldest 10 %", search(term::IN_THE_OLDEST_10TH))]),
        (Class::Hostile, hostile()),
    ];
    let mut cases = Vec::new();
    for (class, group) in groups {
        let group = group.into_iter().map(|(name, request)| Case { name: name.to_owned(), request, class });
        cases.extend(group);
    }
    cases.extend(ORDERS.into_iter().map(|order| Case {
        name: format!("by {order}"),
        request: ordered(order, ListImagesRequest::default()),
        class: Class::Hostile,
    }));
    cases
}

/// Returns filters that match one half, 1 % or ten of the images.
///
/// Status and creator have many values and are measured at each of these shares, the other fields at one of
/// them.
fn filters() -> Vec<(&'static str, ListImagesRequest)> {
    let all = ListImagesRequest::default;
    vec![
        ("all", all()),
        ("status BUILD_FINISHED, 50 %", statuses(&[api::ImageStatus::BuildFinished])),
        ("status ERROR, 1 %", statuses(&[api::ImageStatus::Error])),
        ("status BUILDING, 10 images", statuses(&[api::ImageStatus::Building])),
        ("status SNAPSHOTTING, none", statuses(&[api::ImageStatus::Snapshotting])),
        (
            "status BUILD_FINISHED or ERROR, 51 %",
            statuses(&[api::ImageStatus::BuildFinished, api::ImageStatus::Error]),
        ),
        ("of one creator, 50 %", of_creator(HALF)),
        ("of one creator, 1 %", of_creator(creator::OF_1_PERCENT)),
        ("of one creator, 10 images", of_creator(creator::OF_10_IMAGES)),
        ("pulled, 50 %", ListImagesRequest { pulled: Some(true), ..all() }),
        ("disabled, 1 %", ListImagesRequest { enabled: Some(false), ..all() }),
        ("enabled, 99 %", ListImagesRequest { enabled: Some(true), ..all() }),
        ("templates, 10 images", ListImagesRequest { kind: api::ImageKind::Template.into(), ..all() }),
        ("not templates", ListImagesRequest { kind: api::ImageKind::Image.into(), ..all() }),
        ("disabled, pulled and failed, 0.005 %", rare()),
    ]
}

fn terms() -> Vec<(&'static str, ListImagesRequest)> {
    vec![
        ("term in 20 images", search(term::IN_20_IMAGES)),
        ("term in 10 %", search(term::IN_ONE_OF_10)),
        ("term in all", search(term::IN_ALL)),
        ("term in none", search(term::IN_NONE)),
    ]
}

fn hostile() -> Vec<(&'static str, ListImagesRequest)> {
    let failed = || statuses(&[api::ImageStatus::Error]);
    let with = |term: &str, request| ListImagesRequest { search: term.to_owned(), ..request };
    vec![
        ("hostile term", search(term::HOSTILE)),
        ("two characters, in all", search(term::TWO_IN_ALL)),
        ("two characters, in 20 images", search(term::TWO_IN_20)),
        ("two characters, in none", search(term::TWO_IN_NONE)),
        ("one character, in all", search(term::ONE_IN_ALL)),
        ("one character, in 20 images", search(term::ONE_IN_20)),
        ("one character, in none", search(term::ONE_IN_NONE)),
        ("term in 10 %, failed", with(term::IN_ONE_OF_10, failed())),
        ("term in the oldest 10 %, failed", with(term::IN_THE_OLDEST_10TH, failed())),
        ("hostile term, pulled", with(term::HOSTILE, ListImagesRequest { pulled: Some(true), ..search("") })),
        ("by name, term in 20 images", ordered("name", search(term::IN_20_IMAGES))),
        ("by name, term in 10 %", ordered("name", search(term::IN_ONE_OF_10))),
        ("by name, hostile term", ordered("name", search(term::HOSTILE))),
        ("by name, disabled, pulled and failed", ordered("name", rare())),
    ]
}

const ORDERS: [&str; 14] = [
    "name",
    "name desc",
    "creator",
    "status",
    "status desc",
    "image_name desc",
    "enabled",
    "pulled desc",
    "create_time",
    "create_time desc",
    "update_time",
    "status, name",
    "enabled desc, update_time desc",
    "pulled, status, image_name desc",
];

fn search(term: &str) -> ListImagesRequest {
    ListImagesRequest { search: term.to_owned(), ..Default::default() }
}

fn ordered(order_by: &str, request: ListImagesRequest) -> ListImagesRequest {
    ListImagesRequest { order_by: order_by.to_owned(), ..request }
}

fn statuses(statuses: &[api::ImageStatus]) -> ListImagesRequest {
    let statuses = statuses.iter().map(|&status| status.into()).collect();
    ListImagesRequest { statuses, ..Default::default() }
}

fn of_creator(creator: &str) -> ListImagesRequest {
    ListImagesRequest { creator: creator.to_owned(), ..Default::default() }
}

fn rare() -> ListImagesRequest {
    ListImagesRequest { enabled: Some(false), pulled: Some(true), ..statuses(&[api::ImageStatus::Error]) }
}
