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
#[expect(dead_code, reason = "the tests use the rest")]
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
    let is_wanted = |name: &str| {
        let wanted =
            arguments.is_empty() || arguments.iter().any(|argument| name.contains(argument.as_str()));
        if wanted {
            eprintln!("==> {name}");
        }
        wanted
    };
    machine::print();
    let mut goals = Table::of_goals();
    if is_wanted("get_image") {
        getting::run(&Catalogue::on_sqlite(MILLION).await?, &mut goals).await?;
    }
    if is_wanted("list_images sqlite") {
        let small = Catalogue::on_sqlite(10_000).await?;
        listing::run(&Catalogue::on_sqlite(MILLION).await?, &small, &mut goals).await?;
    }
    if is_wanted("list_images postgres") {
        let server = env::var("TRAILER_TEST_POSTGRES_URL").context("TRAILER_TEST_POSTGRES_URL is not set")?;
        let small = Catalogue::on_postgres(&server, 10_000).await?;
        listing::run(&Catalogue::on_postgres(&server, MILLION).await?, &small, &mut goals).await?;
    }
    if is_wanted("list_images growth") {
        listing::growth().await?;
    }
    if is_wanted("fan_out throughput") {
        fan_out::throughput(&mut goals).await?;
    }
    if is_wanted("fan_out growth") {
        let mut growth = Table::new(&[
            "watchers, 20 changes/s",
            "p50 ms",
            "p99 ms",
            "max ms",
            "lost",
            "MiB before / opened / after",
            "KiB a watcher",
        ]);
        fan_out::growth(&mut growth, &mut goals).await?;
        growth.print("Watchers");
    }
    if is_wanted("watching") {
        watching::run(env::var("TRAILER_TEST_POSTGRES_URL").ok().as_deref()).await?;
    }
    if is_wanted("dispatch latency") {
        dispatching::latency(&mut goals).await?;
    }
    if is_wanted("queue throughput") {
        let mut growth = Table::new(&["queued", "workers", "jobs a second"]);
        dispatching::throughput(&mut goals, &mut growth).await?;
        growth.print("The queue");
    }
    if is_wanted("log_lines") {
        log_lines::run(&mut goals).await?;
    }
    if is_wanted("docker_cli") {
        docker_cli::run(&mut goals).await?;
    }
    if is_wanted("lost_worker") {
        dispatching::lost_worker(&mut goals).await?;
    }
    goals.print("What is to be reached");
    Ok(())
}
