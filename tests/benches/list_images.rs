//! `ListImages` with filters, terms and orders, for callers from an admin to one that sees ten images.

use std::{
    fs,
    time::{Duration, Instant},
};

use image_service::Role;
use prost::Message as _;
use proto::images::ListImagesRequest;

use self::cases::{Case, Class, GROWING, cases};
use crate::{
    client::{self, Client},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seed::{self, Catalogue},
    service::{Running, Service},
};

mod cases;

/// Number of calls per list that has a limit, unless they take longer than `TOO_LONG`.
const CALLS: usize = 500;
const TOO_LONG: Duration = Duration::from_secs(1);
/// Number of rounds per list and peer. Each of the two is called for `ROUND` in every round.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(120);
/// Maximum number of pages to fetch in search of an image.
const PAGES: usize = 100;
/// Minimum throughput relative to a peer that answers with the same bytes.
const RATIO: f64 = 0.6;

/// Subjects of the callers.
const CALLERS: [&str; 4] = ["admin", seed::TEN, seed::TEN_THOUSAND, seed::HALF];

/// The first answers to a list.
#[derive(Debug)]
struct First {
    /// The first page, encoded.
    answer: Vec<u8>,
    /// Number of pages fetched until one had an image or the search was given up.
    pages: usize,
}

/// Measurements of one list for one caller.
#[derive(Debug)]
struct Measured {
    class: Class,
    /// Latencies in milliseconds.
    times: Samples,
    pages: usize,
    /// Throughput relative to the peer, if the list is compared with one.
    ratios: Option<Samples>,
}

pub(crate) async fn run(catalogue: &Catalogue, goals: &mut Table) -> anyhow::Result<()> {
    let service = catalogue.service().await?;
    let cases = cases();
    let mut firsts = Vec::new();
    let answers = tempfile::tempdir()?;
    for case in &cases {
        for who in CALLERS {
            let first = first(&caller(&service, who), &case.request).await?;
            if case.class == Class::NoTerm {
                fs::write(answers.path().join(firsts.len().to_string()), &first.answer)?;
            }
            firsts.push(first);
        }
    }
    let answers = answers.path().display().to_string();
    // On Postgres every read makes a round trip, by which it is never stale.
    let bare = match &catalogue.url {
        Some(url) => Running::bare(&[&answers, url]).await?,
        None => Running::bare(&[&answers]).await?,
    };

    let mut all = Table::new(&["p50 / p99 in ms", "admin", "who sees 10", "10,000", "half"]);
    let mut measured = Vec::new();
    let mut number = 0;
    for case in &cases {
        let mut cells = vec![case.name.clone()];
        for who in CALLERS {
            let peer = (case.class == Class::NoTerm).then_some((&bare, number));
            let one = measure(&service, who, case, firsts[number].pages, peer).await?;
            cells.push(one.cell());
            measured.push(one);
            number += 1;
        }
        all.row(&cells);
    }
    let title = format!(
        "ListImages of {}, {}: beside bare tonic where there is no term",
        catalogue.images,
        catalogue.database()
    );
    all.print(&title);
    judge(&measured, catalogue, goals);
    service.end().await
}

/// Compares the worst list of each class with its goal.
fn judge(measured: &[Measured], catalogue: &Catalogue, goals: &mut Table) {
    let what = format!("ListImages of {}, {}", figure(catalogue.images as f64), catalogue.database());
    let ratios: Vec<&Samples> = measured.iter().filter_map(|one| one.ratios.as_ref()).collect();
    let reaching = ratios.iter().filter(|ratios| ratios.median() >= RATIO).count();
    let worst = ratios.iter().min_by(|one, other| one.median().total_cmp(&other.median()));
    if let Some(worst) = worst {
        let medians = Samples::new(ratios.iter().map(|ratios| ratios.median()).collect());
        goals.compare(
            format!("{what}, {}, the worst list", Class::NoTerm.name()),
            format!("{reaching} of {} reach it; the median is {}", ratios.len(), figure(medians.median())),
            match catalogue.url {
                Some(_) => "bare tonic with SELECT 1, same bytes",
                None => "bare tonic, same bytes",
            },
            worst,
            Goal::AtLeast(RATIO),
        );
    }
    for class in Class::WITH_LIMITS {
        for (quantile, limit) in class.limits(catalogue.images) {
            let of_class = measured.iter().filter(|one| one.class == class);
            let values = of_class.map(|one| match *quantile {
                "p50" => one.times.median(),
                _ => one.times.p99(),
            });
            let values = Samples::new(values.collect());
            let reaching = values.count_within(*limit);
            goals.compare(
                format!("{what}, {}, the worst list: {quantile}, ms", class.name()),
                format!(
                    "{reaching} of {} reach it; the median is {}",
                    values.count(),
                    figure(values.median())
                ),
                "",
                &Samples::one(values.quantile(1.0)),
                Goal::AtMost(*limit),
            );
        }
    }
}

/// Prints the latency of lists by number of images.
pub(crate) async fn growth() -> anyhow::Result<()> {
    const IMAGES: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];
    let cases: Vec<Case> = cases().into_iter().filter(|case| GROWING.contains(&case.name.as_str())).collect();
    let mut cells: Vec<Vec<String>> = cases.iter().map(|case| vec![case.name.clone()]).collect();
    for images in IMAGES {
        let catalogue = Catalogue::on_sqlite(images).await?;
        let service = catalogue.service().await?;
        for (case, cells) in cases.iter().zip(&mut cells) {
            for who in ["admin", seed::HALF] {
                cells.push(figure(times(&caller(&service, who), &case.request).await?.median()));
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

impl Measured {
    fn cell(&self) -> String {
        let mut cell = format!("{} / {}", figure(self.times.median()), figure(self.times.p99()));
        if let Some(ratios) = &self.ratios {
            cell = format!("{cell}, {} of bare", figure(ratios.median()));
        }
        if self.pages > 1 {
            cell = format!("{cell}, {} pages", self.pages);
        }
        cell
    }
}

fn caller(service: &Service, who: &str) -> Client {
    service.client(who, roles(who))
}

fn roles(who: &str) -> &'static [Role] {
    if who == "admin" { &[Role::Admin] } else { &[Role::Builder] }
}

async fn first(caller: &Client, request: &ListImagesRequest) -> anyhow::Result<First> {
    let mut images = caller.images.clone();
    let first = images.list_images(request.clone()).await?.into_inner();
    let answer = first.encode_to_vec();
    let (mut page, mut pages) = (first, 1);
    while page.images.is_empty() && !page.next_page_token.is_empty() && pages < PAGES {
        let request = ListImagesRequest { page_token: page.next_page_token, ..request.clone() };
        page = images.list_images(request).await?.into_inner();
        pages += 1;
    }
    Ok(First { answer, pages })
}

/// Measures one list for one caller.
///
/// With a `peer`, it is compared with a bare server, whose answer is stored under the given number.
async fn measure(
    service: &Service,
    who: &str,
    case: &Case,
    pages: usize,
    peer: Option<(&Running, usize)>,
) -> anyhow::Result<Measured> {
    let own = caller(service, who);
    let Some((bare, number)) = peer else {
        let times = times(&own, &case.request).await?;
        return Ok(Measured { class: case.class, times, pages, ratios: None });
    };
    let bare = client::client(bare.addr, &service.token(who, roles(who)));
    let request = ListImagesRequest { page_token: number.to_string(), ..case.request.clone() };
    let (mut all, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let ours = round(&own, &case.request).await?;
        let theirs = round(&bare, &request).await?;
        ratios.push(ours.len() as f64 / theirs.len() as f64);
        all.extend(ours);
    }
    Ok(Measured { class: case.class, times: Samples::new(all), pages, ratios: Some(Samples::new(ratios)) })
}

/// Makes one call after another for [`ROUND`] and returns their latencies, in milliseconds.
async fn round(caller: &Client, request: &ListImagesRequest) -> anyhow::Result<Vec<f64>> {
    call_until(caller, request, |_, lasting| lasting >= ROUND).await
}

async fn times(caller: &Client, request: &ListImagesRequest) -> anyhow::Result<Samples> {
    let times = call_until(caller, request, |calls, lasting| calls == CALLS || lasting >= TOO_LONG).await?;
    Ok(Samples::new(times))
}

async fn call_until(
    caller: &Client,
    request: &ListImagesRequest,
    is_over: impl Fn(usize, Duration) -> bool,
) -> anyhow::Result<Vec<f64>> {
    let mut images = caller.images.clone();
    let begun = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || !is_over(times.len(), begun.elapsed()) {
        let called = Instant::now();
        images.list_images(request.clone()).await?;
        times.push(milliseconds(called.elapsed()));
    }
    Ok(times)
}
