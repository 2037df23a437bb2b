//! ListImages: every filter, order and kind of term, as everybody from an admin to somebody who sees ten images.

use std::time::{Duration, Instant};

use image_service::Role;
use proto::images::{self as api, ListImagesRequest};

use crate::{
    client::Client,
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seeding::{self, Catalogue, term},
    service::Service,
};

/// How often each list is asked for, unless that takes too long.
const CALLS: usize = 300;
const TOO_LONG: Duration = Duration::from_secs(1);
/// How many pages are asked for until one has an image.
const PAGES: usize = 100;

/// Everybody who lists.
const CALLERS: [&str; 4] = ["admin", seeding::TEN, seeding::ONE_IN_100, seeding::HALF];

/// What is asked for.
#[derive(Clone, Debug)]
struct Case {
    name: String,
    request: ListImagesRequest,
    class: Class,
}

/// What a list is to reach.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Class {
    /// The default order, with any filter and search.
    Default,
    /// Every other order, and terms of one or two characters.
    Other,
}

/// What the calls for one case took, in milliseconds.
#[derive(Debug)]
struct Measured {
    times: Samples,
    /// How many pages it took to find an image, or that there is none.
    pages: usize,
}

/// What a service is like before and after it has answered all cases.
#[derive(Debug)]
struct Starting {
    ready_after: f64,
    /// In MiB.
    memory_before: f64,
    memory_after: f64,
}

pub(crate) async fn run(large: &Catalogue, small: &Catalogue, table: &mut Table) -> anyhow::Result<()> {
    let database = if large.url.is_some() { "Postgres" } else { "SQLite" };
    let (at_small, _) = measure(small).await?;
    let (at_large, starting) = measure(large).await?;
    let mut all = Table::new(&["p50 / p99 in ms", "admin", "who sees 10", "10,000", "half"]);
    for (case, measured) in cases().iter().zip(&at_large) {
        let mut cells = vec![case.name.clone()];
        cells.extend(measured.iter().map(|Measured { times, pages }| {
            let more = if *pages > 1 { format!(", {pages} pages") } else { String::new() };
            format!("{} / {}{more}", figure(times.median()), figure(times.p99()))
        }));
        all.row(&cells);
    }
    all.print(&format!("ListImages of {}, {database}", large.images));

    for (class, what) in [
        (Class::Default, "the default order, any filter, any term"),
        (Class::Other, "other orders, hostile and short terms"),
    ] {
        let cases = cases();
        let of_class = |measured: &[Vec<Measured>], pick: fn(&Samples) -> f64| -> Vec<f64> {
            let of_class = cases.iter().zip(measured).filter(|(case, _)| case.class == class);
            of_class.flat_map(|(_, measured)| measured.iter().map(move |one| pick(&one.times))).collect()
        };
        let (p50, p99) = (of_class(&at_large, Samples::median), of_class(&at_large, Samples::p99));
        let goals = match class {
            Class::Default => vec![("p50", p50, 2.0), ("p99", p99, 10.0)],
            Class::Other => {
                let small = of_class(&at_small, Samples::median);
                let growth = p50.iter().zip(small).map(|(large, small)| large / small).collect();
                vec![("p99", p99, 100.0), ("p50 over that of 10,000 images", growth, 2.0)]
            }
        };
        for (quantile, values, most) in goals {
            let reaching = values.iter().filter(|value| **value <= most).count();
            let values = Samples::new(values);
            let (cases, worst, median) = (values.count(), values.quantile(1.0), values.median());
            let measured = format!("{reaching} of {cases} cases reach it; the median is {}", figure(median));
            let what = format!("ListImages, {database}, {what}, the worst case: {quantile}");
            table.compare(what, measured, "", &Samples::new(vec![worst]), Goal::AtMost(most));
        }
    }
    for (what, value, goal) in [
        ("ready, in ms", starting.ready_after, Goal::AtMost(1_000.0)),
        ("memory before, MiB", starting.memory_before, Goal::AtMost(60.0)),
        ("memory after all lists, MiB", starting.memory_after, Goal::AtMost(120.0)),
    ] {
        let what = format!("image-service with {} images, {database}: {what}", large.images);
        table.compare(what, figure(value), "", &Samples::new(vec![value]), goal);
    }
    Ok(())
}

/// The same lists of more and more images.
pub(crate) async fn growth() -> anyhow::Result<()> {
    const IMAGES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
    let names = [
        "all",
        "disabled, 1 %",
        "term in 20 images",
        "term in 10 %",
        "term in the oldest 10 %",
        "two characters, in none",
        "by name",
        "by status, name",
        "hostile term",
    ];
    let cases: Vec<Case> = cases().into_iter().filter(|case| names.contains(&case.name.as_str())).collect();
    let mut cells: Vec<Vec<String>> = cases.iter().map(|case| vec![case.name.clone()]).collect();
    for images in IMAGES {
        let catalogue = Catalogue::on_sqlite(images).await?;
        let service = catalogue.service(&[]).await?;
        for (case, cells) in cases.iter().zip(&mut cells) {
            for who in ["admin", seeding::HALF] {
                let measured = calls(&caller(&service, who), &case.request).await?;
                cells.push(figure(measured.times.median()));
            }
        }
        service.end().await?;
    }
    let mut table = Table::new(&[
        "p50 in ms, as admin and as who sees half",
        "1,000",
        "half",
        "10,000",
        "half",
        "100,000",
        "half",
        "1,000,000",
        "half",
    ]);
    cells.iter().for_each(|cells| table.row(cells));
    table.print("ListImages by the number of images, SQLite");
    Ok(())
}

/// Of every case and caller.
async fn measure(catalogue: &Catalogue) -> anyhow::Result<(Vec<Vec<Measured>>, Starting)> {
    let service = catalogue.service(&[]).await?;
    let before = service.memory()?;
    let mut all = Vec::new();
    for case in cases() {
        let mut of_case = Vec::new();
        for who in CALLERS {
            of_case.push(calls(&caller(&service, who), &case.request).await?);
        }
        let shown: Vec<String> = of_case.iter().map(|one| figure(one.times.median())).collect();
        eprintln!("    {}: {}", case.name, shown.join(", "));
        all.push(of_case);
    }
    let starting = Starting {
        ready_after: milliseconds(service.ready_after),
        memory_before: before,
        memory_after: service.memory()?,
    };
    service.end().await?;
    Ok((all, starting))
}

fn caller(service: &Service, who: &str) -> Client {
    let role = if who == "admin" { Role::Admin } else { Role::Builder };
    service.client(who, &[role])
}

async fn calls(caller: &Client, request: &ListImagesRequest) -> anyhow::Result<Measured> {
    let mut images = caller.images.clone();
    let mut pages = 0;
    let mut page_token = String::new();
    loop {
        let request = ListImagesRequest { page_token, ..request.clone() };
        let answer = images.list_images(request).await?.into_inner();
        pages += 1;
        page_token = answer.next_page_token;
        if !answer.images.is_empty() || page_token.is_empty() || pages == PAGES {
            break;
        }
    }
    let begun = Instant::now();
    let mut times = Vec::new();
    while times.len() < CALLS && begun.elapsed() < TOO_LONG {
        let called = Instant::now();
        images.list_images(request.clone()).await?;
        times.push(milliseconds(called.elapsed()));
    }
    Ok(Measured { times: Samples::new(times), pages })
}

fn cases() -> Vec<Case> {
    let all = ListImagesRequest::default;
    let statuses = |statuses: &[api::ImageStatus]| ListImagesRequest {
        statuses: statuses.iter().map(|&status| status.into()).collect(),
        ..all()
    };
    let default = [
        ("all", all()),
        ("templates, 1 %", ListImagesRequest { kind: api::ImageKind::Template.into(), ..all() }),
        ("not templates", ListImagesRequest { kind: api::ImageKind::Image.into(), ..all() }),
        ("status ERROR, 3 %", statuses(&[api::ImageStatus::Error])),
        (
            "status ERROR or BUILD_CANCELLED, 7 %",
            statuses(&[api::ImageStatus::Error, api::ImageStatus::BuildCancelled]),
        ),
        ("status BUILDING, none", statuses(&[api::ImageStatus::Building])),
        ("disabled, 1 %", ListImagesRequest { enabled: Some(false), ..all() }),
        ("pulled, 10 %", ListImagesRequest { pulled: Some(true), ..all() }),
        ("of one creator, 0.05 %", ListImagesRequest { creator: "user-77".to_owned(), ..all() }),
        ("of the creator of half", ListImagesRequest { creator: seeding::HALF.to_owned(), ..all() }),
        (
            "disabled, pulled and failed, 0.003 %",
            ListImagesRequest {
                enabled: Some(false),
                pulled: Some(true),
                ..statuses(&[api::ImageStatus::Error])
            },
        ),
    ];
    let search = |search: &str| ListImagesRequest { search: search.to_owned(), ..all() };
    let terms = [
        ("term in 20 images", search(term::IN_20_IMAGES)),
        ("term in 10 %", search(term::IN_ONE_OF_10)),
        ("term in the oldest 10 %", search(term::IN_THE_OLDEST_10TH)),
        ("term in all", search(term::IN_ALL)),
        ("term in none", search(term::IN_NONE)),
        (
            "term in 10 %, failed",
            ListImagesRequest {
                search: term::IN_ONE_OF_10.to_owned(),
                ..statuses(&[api::ImageStatus::Error])
            },
        ),
        (
            "term in the oldest 10 %, failed",
            ListImagesRequest {
                search: term::IN_THE_OLDEST_10TH.to_owned(),
                ..statuses(&[api::ImageStatus::Error])
            },
        ),
    ];
    let ordered = |order_by: &str| ListImagesRequest { order_by: order_by.to_owned(), ..all() };
    let orders = [
        "name",
        "name desc",
        "creator",
        "creator desc",
        "status",
        "status desc",
        "image_name",
        "image_name desc",
        "enabled",
        "enabled desc",
        "pulled",
        "pulled desc",
        "create_time",
        "create_time desc",
        "update_time",
        "status, name",
        "enabled desc, update_time desc",
        "creator, name",
        "pulled, status, image_name desc",
    ];
    let hard = [
        ("hostile term", search(term::HOSTILE)),
        ("two characters, in all", search(term::TWO_IN_ALL)),
        ("two characters, in 20 images", search(term::TWO_IN_20)),
        ("two characters, in none", search(term::TWO_IN_NONE)),
        ("one character, in none", search(term::ONE_IN_NONE)),
    ];
    let by_name = [
        (
            "by name, term in 20 images",
            ListImagesRequest { search: term::IN_20_IMAGES.to_owned(), ..ordered("name") },
        ),
        (
            "by name, term in 10 %",
            ListImagesRequest { search: term::IN_ONE_OF_10.to_owned(), ..ordered("name") },
        ),
        (
            "by name, disabled, pulled and failed",
            ListImagesRequest { order_by: "name".to_owned(), ..default[10].1.clone() },
        ),
    ];
    let of = |class: Class, (name, request): (&str, ListImagesRequest)| Case {
        name: name.to_owned(),
        request,
        class,
    };
    let mut cases: Vec<Case> = Vec::new();
    cases.extend(default.into_iter().chain(terms).map(|case| of(Class::Default, case)));
    cases.extend(orders.into_iter().map(|order| Case {
        name: format!("by {order}"),
        request: ordered(order),
        class: Class::Other,
    }));
    cases.extend(hard.into_iter().chain(by_name).map(|case| of(Class::Other, case)));
    cases
}
