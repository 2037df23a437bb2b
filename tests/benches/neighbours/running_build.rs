//! A build that goes on for as long as it is measured.

use anyhow::Context as _;
use proto::{images::build_event::Event, watch::BuildWatch};
use tokio::{sync::Mutex, time::timeout};
use tonic::Status;

use super::LONGEST;
use crate::{
    client::{self, Caller, Client},
    engine::{FakeEngine, Gate, Script},
};

/// The number of lines that it can print.
const LINES: usize = 4_000;

/// A running build that prints lines when it is told to, and its watcher.
#[derive(Debug)]
pub(super) struct RunningBuild {
    /// One before each line.
    gates: Vec<Gate>,
    watcher: Mutex<Watcher>,
}

#[derive(Debug)]
struct Watcher {
    watch: BuildWatch<Caller>,
    /// The number of lines that were printed.
    printed: usize,
}

impl RunningBuild {
    /// Starts one, and waits until its watcher has seen it print.
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

    /// Lets it print a line, and waits until its watcher has the line.
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
