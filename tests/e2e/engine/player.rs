//! Plays a script as the stream of one build.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use bollard::moby::buildkit::v1::{StatusResponse, Vertex};
use bytes::Bytes;
use tokio::sync::mpsc;

use super::script::{Act, End, LineOf, Script};
use super::{Ended, Image, RecordedBuild, Shared, wire};

/// How many log entries travel in one message.
const LOGS_PER_MESSAGE: usize = 100;

/// The client has gone, so nothing more can be sent.
struct Gone;

/// One build in progress.
pub(super) struct Player {
    shared: Arc<Shared>,
    index: usize,
    build: RecordedBuild,
    script: Script,
    lines: mpsc::Sender<io::Result<Bytes>>,
    /// The script's steps in order.
    steps: Vec<Vertex>,
    /// How many of the steps have started. The last of them may still run.
    started: usize,
}

impl Player {
    /// A player for the build that is recorded under `index`.
    pub(super) fn new(
        shared: Arc<Shared>,
        index: usize,
        build: RecordedBuild,
        script: Script,
        lines: mpsc::Sender<io::Result<Bytes>>,
    ) -> Player {
        Player {
            steps: steps(&script, &seed(&shared, index)),
            shared,
            index,
            build,
            script,
            lines,
            started: 0,
        }
    }

    /// Plays to the end, a cancel, or the client's leaving, and records which it was.
    pub(super) async fn play(mut self) {
        let cancel = self.build.cancel.clone();
        let obeys = !self.script.ignores_cancel;
        let client = self.lines.clone();

        let ended = tokio::select! {
            biased;
            () = client.closed() => Ok(Ended::Dropped),
            () = cancel.cancelled(), if obeys => Ok(Ended::Cancelled),
            ended = self.perform() => ended,
        };
        let ended = match ended {
            Ok(Ended::Cancelled) => self.cancelled().await.map(|()| Ended::Cancelled),
            other => other,
        };

        self.record(ended.unwrap_or(Ended::Dropped));
    }

    /// Records how the build ended. The first word stands.
    fn record(&self, ended: Ended) {
        self.shared.state.send_modify(|state| {
            let build = &mut state.builds[self.index];
            if build.ended == Ended::Running {
                build.ended = ended;
            }
        });
    }

    async fn perform(&mut self) -> Result<Ended, Gone> {
        self.load_context().await?;
        if !self.steps.is_empty() {
            self.send(wire::vertexes(&self.steps)).await?;
        }

        for act in self.script.acts.clone() {
            match act {
                Act::Step { cached, .. } => self.next_step(cached).await?,
                Act::Log { stream, text } => self.log(stream, text).await?,
                Act::Logs { count, line } => self.logs(count, &line).await?,
                Act::Pause(gate) => gate.pass().await,
            }
        }

        match self.script.end.clone() {
            End::Succeed => self.succeed().await,
            End::Fail(message) => self.fail(&message).await,
            End::Cut => {
                let cut = io::Error::other("the script cuts the connection");
                let _ = self.lines.send(Err(cut)).await;
                Ok(Ended::Dropped)
            }
            End::Hang => std::future::pending().await,
            End::Silence { built } => {
                if built {
                    self.succeed().await?;
                }
                loop {
                    self.send(wire::vertexes(&[])).await?;
                }
            }
            End::InternalError => Ok(Ended::Failed),
        }
    }

    /// Sends the two steps in which a real engine takes in the context.
    async fn load_context(&mut self) -> Result<(), Gone> {
        for mut vertex in context(&seed(&self.shared, self.index)) {
            self.send(wire::vertexes(std::slice::from_ref(&vertex))).await?;
            wire::start(&mut vertex);
            self.send(wire::vertexes(std::slice::from_ref(&vertex))).await?;
            wire::complete(&mut vertex);
            self.send(wire::vertexes(std::slice::from_ref(&vertex))).await?;
        }
        Ok(())
    }

    async fn next_step(&mut self, cached: bool) -> Result<(), Gone> {
        self.complete_step().await?;
        let step = &mut self.steps[self.started];
        self.started += 1;
        wire::start(step);
        if cached {
            step.cached = true;
            wire::complete(step);
        }
        let line = wire::vertexes(std::slice::from_ref(step));
        self.send(line).await
    }

    /// Ends the step that runs, if one does.
    async fn complete_step(&mut self) -> Result<(), Gone> {
        let Some(step) = self.running_step() else {
            return Ok(());
        };
        wire::complete(step);
        let line = wire::vertexes(std::slice::from_ref(step));
        self.send(line).await
    }

    async fn log(&mut self, stream: i64, text: String) -> Result<(), Gone> {
        let Some(step) = self.running_step() else {
            return Ok(());
        };
        let line = wire::logs(vec![wire::log(step, stream, text)]);
        self.send(line).await
    }

    async fn logs(&mut self, count: usize, line: &LineOf) -> Result<(), Gone> {
        let Some(step) = self.running_step() else {
            return Ok(());
        };
        let step = step.clone();
        for from in (0..count).step_by(LOGS_PER_MESSAGE) {
            let to = count.min(from + LOGS_PER_MESSAGE);
            let logs = (from..to).map(|i| wire::log(&step, 1, line(i))).collect();
            self.send(wire::logs(logs)).await?;
        }
        Ok(())
    }

    /// Exports the image, in the order of a real engine: the export starts, the image's id, the
    /// export's end, the tag.
    async fn succeed(&mut self) -> Result<Ended, Gone> {
        self.complete_step().await?;

        let mut export = wire::vertex("exporting to image", "export", None);
        wire::start(&mut export);
        self.send(wire::vertexes(std::slice::from_ref(&export))).await?;

        let id = wire::digest(&seed(&self.shared, self.index));
        self.keep_image(&id);
        self.send(wire::image_id(&id)).await?;

        wire::complete(&mut export);
        let mut statuses = vec![
            wire::done(&export, "exporting layers"),
            wire::done(&export, &format!("writing image {id}")),
        ];
        if let Some(tag) = &self.build.tag {
            statuses.push(wire::done(&export, &format!("naming to {tag}")));
        }
        let exported = StatusResponse { vertexes: vec![export], statuses, ..StatusResponse::default() };
        self.record(Ended::Succeeded);
        self.send(wire::trace(&exported)).await?;

        if let Some(tag) = &self.build.tag {
            self.send(wire::tagged(&super::images::with_tag(tag))).await?;
        }
        Ok(Ended::Succeeded)
    }

    fn keep_image(&self, id: &str) {
        self.shared.state.send_modify(|state| {
            state.images.insert(Image {
                id: id.to_owned(),
                size: self.script.image_size,
                labels: self.build.labels.clone(),
                created: SystemTime::now(),
            });
            if let Some(tag) = &self.build.tag {
                state.images.tag(id, tag);
            }
        });
    }

    async fn fail(&mut self, message: &str) -> Result<Ended, Gone> {
        let message = match self.running_step().and_then(|step| command(step)) {
            Some(command) if message.starts_with("exit code: ") => {
                format!("executor failed running [/bin/sh -c {command}]: {message}")
            }
            Some(_) | None => message.to_owned(),
        };
        self.fail_step(&message).await?;
        self.record(Ended::Failed);
        self.send(wire::error(&message)).await?;
        Ok(Ended::Failed)
    }

    async fn cancelled(&mut self) -> Result<(), Gone> {
        let message = match self.running_step().and_then(|step| command(step)) {
            Some(command) => format!(
                "executor failed running [/bin/sh -c {command}]: exit code: 137: context canceled: context canceled"
            ),
            None => "context canceled".to_owned(),
        };
        self.fail_step(&message).await?;
        self.record(Ended::Cancelled);
        self.send(wire::error("context canceled")).await
    }

    /// Ends the step that runs, if one does, with an error.
    async fn fail_step(&mut self, message: &str) -> Result<(), Gone> {
        if let Some(step) = self.running_step() {
            message.clone_into(&mut step.error);
        }
        self.complete_step().await
    }

    fn running_step(&mut self) -> Option<&mut Vertex> {
        let last = self.started.checked_sub(1)?;
        let step = &mut self.steps[last];
        step.completed.is_none().then_some(step)
    }

    async fn send(&self, line: Bytes) -> Result<(), Gone> {
        self.lines.send(Ok(line)).await.map_err(|_| Gone)
    }
}

/// The steps before those of the Dockerfile.
fn context(seed: &str) -> [Vertex; 2] {
    let load = wire::vertex("[internal] load remote build context", seed, None);
    let copy = wire::vertex("copy /context /", seed, Some(&load));
    [load, copy]
}

/// The script's steps, none of which has started.
fn steps(script: &Script, seed: &str) -> Vec<Vertex> {
    let [_, context] = context(seed);
    let mut steps: Vec<Vertex> = Vec::new();
    for act in &script.acts {
        if let Act::Step { name, .. } = act {
            let before = steps.last().unwrap_or(&context);
            steps.push(wire::vertex(name, seed, Some(before)));
        }
    }
    steps
}

/// The command of a step like `[2/2] RUN make`.
fn command(step: &Vertex) -> Option<&str> {
    let (_, command) = step.name.split_once("] RUN ")?;
    Some(command)
}

/// What makes digests differ between engines and builds.
fn seed(shared: &Shared, index: usize) -> String {
    format!("{} build {index}", shared.name)
}
