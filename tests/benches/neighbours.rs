//! Latency of one caller beside others that use their full limits, which are those of a deployment.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use image_service::Role;
use proto::images as api;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::Status;

use self::{
    greedy::{Counts, Greed, Greedy, create_large},
    running_build::RunningBuild,
};
use crate::{
    client::{self, Client},
    fake_engine::{FakeEngine, Script},
    load::milliseconds,
    report::{Goal, Samples, Table, figure},
    seed::{self, Catalogue, term},
    service::Service,
};

mod greedy;
mod running_build;

const ROUNDS: usize = 4;
const ROUND: Duration = Duration::from_secs(6);
/// Timeout of a call. A call that times out or fails counts as one of this length.
const LONGEST: Duration = Duration::from_secs(10);
/// Acceptable p99, in milliseconds, even if it is more than `TIMES` the p99 measured alone.
const GOOD: f64 = 5.0;
const TIMES: f64 = 3.0;

/// A call of the measured caller, repeated with a pause for a whole round.
#[derive(Debug)]
enum Call {
    /// A list of 50 images.
    List,
    /// Alternately a disable and an enable of one image.
    Enable { id: String },
    /// A build that prints one line, from the call to its last event.
    Build { id: String },
    /// A log line of a running build, from the engine to a watcher.
    Line(Box<RunningBuild>),
}

/// Measures a caller that lists, beside one that searches and watches.
pub(crate) async fn searches(catalogue: &Catalogue, goals: &mut Table) -> anyhow::Result<()> {
    let service = Service::start_limited(&catalogue.data, catalogue.url.as_deref(), &[]).await?;
    let terms =
        [term::HOSTILE, term::TWO_IN_NONE, term::ONE_IN_NONE, term::IN_THE_OLDEST_10TH, term::IN_NONE];
    let terms: Vec<String> = terms.map(ToOwned::to_owned).into();
    let token = service.token(seed::HALF, &[]);
    let greeds = [
        (token.clone(), Greed::Searches { at_once: 100, terms }),
        (token, Greed::Watches { count: 1_000, changing: Vec::new() }),
    ];
    let what = format!(
        "{} images, beside a caller with 100 searches and 1,000 watches",
        figure(catalogue.images as f64)
    );
    let lister = service.client(seed::TEN_THOUSAND, &[]);
    measure(&service, &lister, &[("list", Call::List)], &greeds, &what, goals).await?;
    service.end().await
}

/// Measures a caller that lists, enables and builds, beside three that preview, watch and search.
pub(crate) async fn crowd(catalogue: &Catalogue, goals: &mut Table) -> anyhow::Result<()> {
    let copy = catalogue.copy().await?;
    let service = Service::start_limited(copy.data.path(), copy.url.as_deref(), &[]).await?;
    let engine = FakeEngine::start().await?;
    engine.script(Script::new().step("[1/1] RUN print").log("a line\n").succeed());
    // One slot is taken by the build that keeps running.
    let _worker = service.worker("w1", &engine.docker_host(), &["--slots", "2"]).await?;

    let watcher = service.client("watcher", &[Role::Builder]);
    let changing = create_large(&watcher, 16).await?;
    let seen = api::ListImagesRequest { page_size: 1_000, ..Default::default() };
    let page = service.client(seed::HALF, &[]).images.list_images(seen).await?.into_inner();
    let images = page.images.into_iter().map(|image| image.id).collect();
    let greeds = [
        (service.token(seed::HALF, &[]), Greed::Previews { at_once: 700, images }),
        (service.token("watcher", &[Role::Builder]), Greed::Watches { count: 300, changing }),
        (
            service.token("searcher", &[Role::Admin]),
            Greed::Searches { at_once: 40, terms: vec![term::HOSTILE.to_owned()] },
        ),
    ];
    let fourth = service.client(seed::TEN_THOUSAND, &[Role::Builder]);
    let (enabled, _) = fourth.create(client::image("Enabled", "FROM scratch")).await?;
    let (built, first) = fourth.create(client::image("Built", "FROM scratch")).await?;
    fourth.finished(&first.id).await?;
    let calls = [
        ("list", Call::List),
        ("enable", Call::Enable { id: enabled.id }),
        ("build", Call::Build { id: built.id }),
        ("line of a running build", Call::Line(Box::new(RunningBuild::start(&engine, &fourth).await?))),
    ];
    let what = format!(
        "{} images, {}, beside 700 previews of 1,000 rows, 300 watches of large configurations and 40 searches",
        figure(catalogue.images as f64),
        catalogue.database()
    );
    measure(&service, &fourth, &calls, &greeds, &what, goals).await?;
    service.end().await
}

/// Measures the calls in alternating rounds, alone and beside the greedy callers.
async fn measure(
    service: &Service,
    caller: &Client,
    calls: &[(&str, Call)],
    greeds: &[(String, Greed)],
    what: &str,
    goals: &mut Table,
) -> anyhow::Result<()> {
    let (mut alone, mut beside) = (vec![Vec::new(); calls.len()], vec![Vec::new(); calls.len()]);
    let mut counts: Vec<Arc<Counts>> = Vec::new();
    for _ in 0..ROUNDS {
        round(caller, calls, &mut alone).await;
        let mut at_work = Vec::new();
        for (token, greed) in greeds {
            let greedy = Greedy::start(service.addr, token, greed.clone())?;
            counts.push(greedy.counts());
            at_work.push(greedy);
        }
        for greedy in &at_work {
            greedy.begun().await?;
        }
        round(caller, calls, &mut beside).await;
    }
    let sum = |count: fn(&Counts) -> u64| counts.iter().map(|counts| count(counts)).sum::<u64>();
    eprintln!(
        "    the others had {} answers, {} refusals and {} errors",
        sum(|counts| counts.answered.load(Relaxed)),
        sum(|counts| counts.refused.load(Relaxed)),
        sum(|counts| counts.failed.load(Relaxed))
    );
    for (((name, _), alone), beside) in calls.iter().zip(alone).zip(beside) {
        let (alone, beside) = (Samples::new(alone), Samples::new(beside));
        let allowed = (alone.p99() * TIMES).max(GOOD);
        goals.compare(
            format!("{what}: {name}, p99 over what is allowed"),
            format!("p50 {} ms, p99 {} ms", figure(beside.median()), figure(beside.p99())),
            format!(
                "alone: p50 {} ms, p99 {} ms, allowed {} ms",
                figure(alone.median()),
                figure(alone.p99()),
                figure(allowed)
            ),
            &Samples::one(beside.p99() / allowed),
            Goal::AtMost(1.0),
        );
    }
    Ok(())
}

/// Runs all calls concurrently for one round and appends the latencies of each to `times`.
async fn round(caller: &Client, calls: &[(&str, Call)], times: &mut [Vec<f64>]) {
    let running = calls.iter().map(|(name, call)| call.repeat(name, caller));
    for (times, took) in times.iter_mut().zip(futures_util::future::join_all(running).await) {
        times.extend(took);
    }
}

impl Call {
    fn pause(&self) -> Duration {
        Duration::from_millis(match self {
            Self::List => 5,
            Self::Enable { .. } => 20,
            Self::Build { .. } | Self::Line(_) => 50,
        })
    }

    /// Repeats the call for one round and returns the latencies, in milliseconds.
    async fn repeat(&self, name: &str, caller: &Client) -> Vec<f64> {
        let begun = Instant::now();
        let mut tick = interval(self.pause());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut times = Vec::new();
        while begun.elapsed() < ROUND {
            tick.tick().await;
            let called = Instant::now();
            let took = match timeout(LONGEST, self.make(caller, times.len())).await {
                Ok(Ok(())) => called.elapsed(),
                Ok(Err(status)) => {
                    eprintln!("    {name} failed: {status}");
                    LONGEST
                }
                Err(_) => LONGEST,
            };
            times.push(milliseconds(took));
        }
        times
    }

    async fn make(&self, caller: &Client, number: usize) -> Result<(), Status> {
        match self {
            Self::List => {
                caller.list().await?;
            }
            Self::Enable { id } if number.is_multiple_of(2) => {
                let request = api::DisableImageRequest { id: id.clone(), ..Default::default() };
                caller.images.clone().disable_image(request).await?;
            }
            Self::Enable { id } => {
                let request = api::EnableImageRequest { id: id.clone(), ..Default::default() };
                caller.images.clone().enable_image(request).await?;
            }
            Self::Build { id } => {
                let build = caller.build(id).await?;
                caller.history(&build.id, 0).await?;
            }
            Self::Line(build) => build.print().await?,
        }
        Ok(())
    }
}
