//! Benchmarks for the figures in the design, each beside its limit or a peer measured in the same run.
//!
//! `tests/bench [NAME...]` sets up what they need, runs them and prints the results.
//!
//! Client and server share the machine. The services run as programs in their release build, and so does
//! [`bare`], the server that they are compared with, each in a process of its own. [`seeding`] writes
//! catalogues of up to a million images. Ratios are computed per round, with rounds alternating between the
//! two sides; [`report`] prints their median and range.

mod bare;
mod dispatch;
mod docker_cli;
#[path = "../e2e/eventually.rs"]
mod eventually;
mod fan_out;
mod get_image;
mod list_images;
mod load;
mod log_lines;
mod machine;
mod neighbours;
#[path = "../faults/process.rs"]
mod process;
mod queue;
mod report;
mod restart;
mod seed;
mod service;
mod start;
mod writes;

#[path = "../e2e"]
#[expect(dead_code, unused_imports, reason = "the tests use the rest")]
mod shared {
    pub(crate) mod client;
    pub(crate) mod fake_engine;
}

/// Items that the shared test modules expect in `crate::stack`.
mod stack {
    use std::time::Duration;

    pub(crate) const LIMIT: Duration = Duration::from_secs(20);
}

use std::env;

use anyhow::Context as _;

use self::{
    report::Table,
    seed::Catalogue,
    shared::{client, fake_engine},
};

const HUNDRED_THOUSAND: u64 = 100_000;
const MILLION: u64 = 1_000_000;

/// The allocator of the service, so that the client and the peer have the same one.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let Some((first, rest)) = arguments.split_first()
        && first == bare::ARGUMENT
    {
        return bare::serve(rest).await;
    }
    machine::print();
    let mut goals = Table::of_goals();
    let mut failed = Vec::new();
    for name in wanted(&arguments) {
        eprintln!("==> {name}");
        // A failure does not discard the results of other rows.
        if let Err(error) = measure(name, &mut goals).await {
            eprintln!("!!! {name} failed: {error:?}");
            failed.push(name);
        }
    }
    goals.print("What is to be reached");
    anyhow::ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

const ROWS: [&str; 25] = [
    "get_image sqlite",
    "get_image postgres",
    "list_images sqlite 100k",
    "list_images sqlite 1M",
    "list_images postgres 100k",
    "list_images postgres 1M",
    "list_images growth",
    "start sqlite",
    "start postgres",
    "start hostile sqlite",
    "start hostile postgres",
    "restart beside build sqlite",
    "restart beside build postgres",
    "neighbours searches",
    "neighbours crowd sqlite",
    "neighbours crowd postgres",
    "writes",
    "fan_out throughput",
    "fan_out growth",
    "dispatch latency",
    "lost_worker",
    "queue throughput sqlite",
    "queue throughput postgres",
    "log_lines",
    "docker_cli",
];

/// Word by which arguments select the long rows, which take a quarter of an hour each.
const LONG: &str = "history";
const LONG_ROWS: [&str; 2] = ["queue history sqlite", "queue history postgres"];

/// Returns the rows whose name contains an argument, or all but the long ones if there is none.
fn wanted(arguments: &[String]) -> Vec<&'static str> {
    let is_named = |row: &str| arguments.iter().any(|argument| row.contains(argument.as_str()));
    let is_long = arguments.iter().any(|argument| argument.contains(LONG));
    let usual = ROWS.into_iter().filter(|row| arguments.is_empty() || is_named(row));
    usual.chain(LONG_ROWS.into_iter().filter(|row| is_long && is_named(row))).collect()
}

async fn measure(row: &str, goals: &mut Table) -> anyhow::Result<()> {
    let server = || env::var("TRAILER_TEST_POSTGRES_URL").context("TRAILER_TEST_POSTGRES_URL is not set");
    match row {
        "get_image sqlite" => get_image::run(&Catalogue::on_sqlite(HUNDRED_THOUSAND).await?, goals).await,
        "get_image postgres" => {
            get_image::run(&Catalogue::on_postgres(&server()?, HUNDRED_THOUSAND).await?, goals).await
        }
        "list_images sqlite 100k" => {
            list_images::run(&Catalogue::on_sqlite(HUNDRED_THOUSAND).await?, goals).await
        }
        "list_images sqlite 1M" => list_images::run(&Catalogue::on_sqlite(MILLION).await?, goals).await,
        "list_images postgres 100k" => {
            list_images::run(&Catalogue::on_postgres(&server()?, HUNDRED_THOUSAND).await?, goals).await
        }
        "list_images postgres 1M" => {
            list_images::run(&Catalogue::on_postgres(&server()?, MILLION).await?, goals).await
        }
        "list_images growth" => list_images::growth().await,
        "start sqlite" => start::run(None, goals).await,
        "start postgres" => start::run(Some(&server()?), goals).await,
        "start hostile sqlite" => start::hostile(None, goals).await,
        "start hostile postgres" => start::hostile(Some(&server()?), goals).await,
        "restart beside build sqlite" => restart::run(&Catalogue::on_sqlite(MILLION).await?, goals).await,
        "restart beside build postgres" => {
            restart::run(&Catalogue::on_postgres(&server()?, MILLION).await?, goals).await
        }
        "neighbours searches" => neighbours::searches(&Catalogue::on_sqlite(MILLION).await?, goals).await,
        "neighbours crowd sqlite" => {
            neighbours::crowd(&Catalogue::on_sqlite(HUNDRED_THOUSAND).await?, goals).await
        }
        "neighbours crowd postgres" => {
            neighbours::crowd(&Catalogue::on_postgres(&server()?, HUNDRED_THOUSAND).await?, goals).await
        }
        "writes" => writes::run(goals).await,
        "fan_out throughput" => fan_out::throughput(goals).await,
        "fan_out growth" => fan_out::growth(goals).await,
        "dispatch latency" => dispatch::latency(goals).await,
        "lost_worker" => dispatch::lost_worker(goals).await,
        "queue throughput sqlite" => queue::throughput(None, goals).await,
        "queue throughput postgres" => queue::throughput(Some(&server()?), goals).await,
        "queue history sqlite" => queue::history(None, goals).await,
        "queue history postgres" => queue::history(Some(&server()?), goals).await,
        "log_lines" => log_lines::run(goals).await,
        "docker_cli" => docker_cli::run(&Catalogue::on_sqlite(HUNDRED_THOUSAND).await?, goals).await,
        other => anyhow::bail!("there is no row {other}"),
    }
}
