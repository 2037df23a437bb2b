//! The figures that the design asks for, each beside its limit or its peer in the same run: `tests/bench [NAME...]` sets up what
//! they need and prints them.
//!
//! Client and server share the machine. The services run as programs, in their release build; `bare` is the server that they
//! are compared with, in a process of its own, too. `seeding` writes catalogues of up to a million images. Ratios are of rounds
//! that alternate between the two that are compared; `report` prints their median and their range.

mod bare;
mod dispatching;
mod docker_cli;
mod fan_out;
mod getting;
mod listing;
mod load;
mod log_lines;
mod machine;
#[path = "../faults/process.rs"]
mod process;
mod report;
mod seeding;
mod service;
mod watching;

#[path = "../e2e"]
#[expect(dead_code, unused_imports, reason = "the tests use the rest")]
mod shared {
    pub(crate) mod client;
    pub(crate) mod engine;
}

/// What the tests share with this.
mod stack {
    use std::time::Duration;

    pub(crate) const LIMIT: Duration = Duration::from_secs(20);
}

use std::env;

use anyhow::Context as _;

use self::{
    report::Table,
    seeding::Catalogue,
    shared::{client, engine},
};

const MILLION: u64 = 1_000_000;

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
    for name in ROWS {
        let wanted =
            arguments.is_empty() || arguments.iter().any(|argument| name.contains(argument.as_str()));
        if !wanted {
            continue;
        }
        eprintln!("==> {name}");
        // What the others have measured is told all the same.
        if let Err(error) = measure(name, &mut goals).await {
            eprintln!("!!! {name} failed: {error:?}");
            failed.push(name);
        }
    }
    goals.print("What is to be reached");
    anyhow::ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

const ROWS: [&str; 12] = [
    "get_image",
    "list_images sqlite",
    "list_images postgres",
    "list_images growth",
    "fan_out throughput",
    "fan_out growth",
    "watching",
    "dispatch latency",
    "queue throughput",
    "log_lines",
    "docker_cli",
    "lost_worker",
];

async fn measure(row: &str, goals: &mut Table) -> anyhow::Result<()> {
    let server = env::var("TRAILER_TEST_POSTGRES_URL");
    match row {
        "get_image" => getting::run(&Catalogue::on_sqlite(MILLION).await?, goals).await,
        "list_images sqlite" => {
            let small = Catalogue::on_sqlite(10_000).await?;
            listing::run(&Catalogue::on_sqlite(MILLION).await?, &small, goals).await
        }
        "list_images postgres" => {
            let server = server.context("TRAILER_TEST_POSTGRES_URL is not set")?;
            let small = Catalogue::on_postgres(&server, 10_000).await?;
            listing::run(&Catalogue::on_postgres(&server, MILLION).await?, &small, goals).await
        }
        "list_images growth" => listing::growth().await,
        "fan_out throughput" => fan_out::throughput(goals).await,
        "fan_out growth" => {
            let mut growth = Table::new(&[
                "watchers, 20 changes/s",
                "p50 ms",
                "p99 ms",
                "max ms",
                "lost",
                "MiB before / opened / after",
                "KiB a watcher",
            ]);
            let measured = fan_out::growth(&mut growth, goals).await;
            growth.print("Watchers");
            measured
        }
        "watching" => watching::run(server.ok().as_deref()).await,
        "dispatch latency" => dispatching::latency(goals).await,
        "queue throughput" => {
            let mut growth = Table::new(&["queued", "workers", "jobs a second"]);
            let measured = dispatching::throughput(goals, &mut growth).await;
            growth.print("The queue");
            measured
        }
        "log_lines" => log_lines::run(goals).await,
        "docker_cli" => docker_cli::run(goals).await,
        "lost_worker" => dispatching::lost_worker(goals).await,
        other => anyhow::bail!("there is no row {other}"),
    }
}
