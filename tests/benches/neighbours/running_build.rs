//! A build that keeps running for the whole measurement.

use anyhow::Context as _;
use proto::{images::build_event::Event, watch::BuildWatch};
use tokio::{sync::Mutex, time::timeout};
use tonic::Status;

use super::LONGEST;
use crate::{
    client::{self, Caller, Client},
    fake_engine::{FakeEngine, Gate, Script},
};

/// Maximum number of lines that the build can print.
const LINES: usize = 4_000;

/// A running build that prints lines on demand, and a watcher of it.
#[derive(Debug)]
pub(super) struct RunningBuild {
    /// One gate per line, which holds the line back until opened.
    gates: Vec<Gate>,
    watcher: Mutex<Watcher>,
}

#[derive(Debug)]
struct Watcher {
    watch: BuildWatch<Caller>,
    /// Number of lines printed so far.
    printed: usize,
}

impl RunningBuild {
    /// Starts a build and waits until its watcher has seen the first line.
    pub(super) async fn start(engine: &FakeEngine, builder: &Client) -> anyhow::Result<Self> {
        let gates: Vec<Gate> = (0..LINES).map(|_| Gate::new()).collect();
        let script = Script::new().step("[1/1] RUN go on");
        let script = (0_usize..)
            .zip(&gates)
            .fold(script, |script, (number, gate)| script.pause(gate).log(&format!("{}\n", line(number))));
        engine.on("RUN go on", script.hang());
        let (_, build) = builder.create(client::image("Running", "FROM scratch\nRUN go on")).await?;
        let watch = BuildWatch::new(builder.builds.clone(), build.id);
        let running = Self { gates, watcher: Mutex::new(Watcher { watch, printed: 0 }) };
        timeout(LONGEST, running.print()).await.context("it does not run")??;
        Ok(running)
    }

    /// Lets the build print a line and waits until the watcher receives it.
    pub(super) async fn print(&self) -> Result<(), Status> {
        let mut watcher = self.watcher.lock().await;
        let gate = self.gates.get(watcher.printed);
        gate.ok_or_else(|| Status::out_of_range("it has printed all of its lines"))?.open();
        let printed = line(watcher.printed);
        watcher.printed += 1;
        while let Some(event) = watcher.watch.next().await? {
            if matches!(event.event, Some(Event::LogLine(line)) if line.text == printed) {
                return Ok(());
            }
        }
        Err(Status::aborted("the build has ended"))
    }
}

fn line(number: usize) -> String {
    format!("line {number}")
}
