//! Playback of a script as one build.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bollard::moby::buildkit::v1::{SolveResponse, StatusResponse, Vertex};
use tonic::Status;

use super::builds::Call;
use super::failure::{self, Failure};
use super::script::{Act, End, LineOf, Script};
use super::{Ended, Image, RecordedBuild, Shared, images, vertex};

/// Number of log entries per message.
const LOGS_PER_MESSAGE: usize = 100;

/// Time that a step takes to stop after a cancel.
///
/// A client that closes its connection within this time has dropped the build instead.
const STOP_TIME: Duration = Duration::from_millis(20);

/// One build in progress.
pub(super) struct Player {
    shared: Arc<Shared>,
    index: usize,
    build: RecordedBuild,
    script: Script,
    call: Call,
    /// Steps of the script, in order.
    steps: Vec<Vertex>,
    /// Number of steps that have started. The last of them may still run.
    started: usize,
}

impl Player {
    /// Returns a player for the build that is recorded under `index`.
    pub(super) fn new(
        shared: Arc<Shared>,
        index: usize,
        build: RecordedBuild,
        script: Script,
        call: Call,
    ) -> Player {
        Player {
            steps: vertex::steps(script.step_names(), &seed(&shared, index)),
            shared,
            index,
            build,
            script,
            call,
            started: 0,
        }
    }

    /// Plays until the script ends, a cancel, or the client leaves, and records which it was.
    ///
    /// Returns the result of Solve.
    pub(super) async fn play(mut self) -> Result<SolveResponse, Status> {
        let call = self.call.clone();
        let obeys = !self.script.ignores_cancel;
        let is_gone = tokio::select! {
            biased;
            () = call.connection.gone() => true,
            () = call.cancel.cancelled(), if obeys => {
                tokio::time::timeout(STOP_TIME, call.connection.gone()).await.is_ok()
            }
            outcome = self.perform() => return outcome,
        };

        if is_gone {
            self.record(Ended::Dropped);
        } else {
            self.record(Ended::Cancelled);
            let message = self.running_step().map(|step| failure::cancelled(step));
            self.fail_step(&message.unwrap_or_default()).await;
        }
        Err(Status::cancelled("context canceled"))
    }

    /// Records the outcome of the build. The first one stands.
    fn record(&self, ended: Ended) {
        self.shared.state.send_modify(|state| {
            let build = &mut state.builds[self.index];
            if build.ended == Ended::Running {
                build.ended = ended;
            }
        });
    }

    async fn perform(&mut self) -> Result<SolveResponse, Status> {
        self.load_context().await;
        self.announce_steps().await;
        for act in self.script.acts.clone() {
            match act {
                Act::Step { cached, .. } => self.next_step(cached).await,
                Act::Log { stream, text } => self.log(stream, text).await,
                Act::Logs { count, line } => self.logs(count, &line).await,
                Act::Pause(gate) => gate.pass().await,
            }
        }

        match self.script.end.clone() {
            End::Succeed => Ok(self.succeed().await),
            End::Fail(message) => Err(self.fail(&message).await),
            End::FailWith(status) => {
                self.record(Ended::Failed);
                self.fail_step(status.message()).await;
                Err(status)
            }
            End::Cut => {
                self.call.progress.drained().await;
                self.record(Ended::Dropped);
                self.call.connection.cut();
                std::future::pending().await
            }
            End::Hang | End::InternalError => std::future::pending().await,
        }
    }

    /// Publishes the two vertexes in which a real engine loads the context.
    async fn load_context(&mut self) {
        for mut vertex in vertex::context(&seed(&self.shared, self.index)) {
            self.publish(&vertex).await;
            vertex::start(&mut vertex);
            self.publish(&vertex).await;
            vertex::complete(&mut vertex);
            self.publish(&vertex).await;
        }
    }

    async fn announce_steps(&mut self) {
        let mut steps = self.steps.clone();
        if self.script.announces_backwards {
            steps.reverse();
        }
        if !steps.is_empty() {
            self.call.progress.publish(vertex::progress(&steps)).await;
        }
    }

    async fn next_step(&mut self, cached: bool) {
        self.complete_step().await;
        let step = &mut self.steps[self.started];
        self.started += 1;
        vertex::start(step);
        if cached {
            step.cached = true;
            vertex::complete(step);
        }
        let step = step.clone();
        self.publish(&step).await;
    }

    /// Ends the running step, if there is one.
    async fn complete_step(&mut self) {
        if let Some(step) = self.running_step() {
            vertex::complete(step);
            let step = step.clone();
            self.publish(&step).await;
        }
    }

    async fn log(&mut self, stream: i64, text: String) {
        if let Some(step) = self.running_step() {
            let log = vertex::log(step, stream, text);
            self.call.progress.publish(vertex::output(vec![log])).await;
        }
    }

    async fn logs(&mut self, count: usize, line: &LineOf) {
        let Some(step) = self.running_step() else {
            return;
        };
        let step = step.clone();
        for from in (0..count).step_by(LOGS_PER_MESSAGE) {
            let to = count.min(from + LOGS_PER_MESSAGE);
            let logs = (from..to).map(|i| vertex::log(&step, 1, line(i))).collect();
            self.call.progress.publish(vertex::output(logs)).await;
        }
    }

    /// Exports the image, in the order of a real engine.
    ///
    /// The export starts, the image and its tags appear in the table, and the export ends.
    async fn succeed(&mut self) -> SolveResponse {
        self.complete_step().await;

        let seed = seed(&self.shared, self.index);
        let mut export = vertex::announce("exporting to image", &seed, None);
        vertex::start(&mut export);
        self.publish(&export).await;

        let id = vertex::digest(&seed);
        let names: Vec<String> =
            self.build.tag.iter().flat_map(|tag| tag.split(',')).map(images::full).collect();
        self.keep_image(&id, &names);

        vertex::complete(&mut export);
        let mut statuses = vec![
            vertex::done(&export, "exporting layers"),
            vertex::done(&export, &format!("writing image {id}")),
        ];
        statuses.extend(names.iter().map(|name| vertex::done(&export, &format!("naming to {name}"))));
        let exported = StatusResponse { vertexes: vec![export], statuses, ..StatusResponse::default() };
        self.record(Ended::Succeeded);
        self.call.progress.publish(exported).await;

        let mut response = SolveResponse::default();
        for (key, value) in [
            ("containerimage.config.digest", id.clone()),
            ("containerimage.digest", id),
            ("image.name", names.join(",")),
        ] {
            if !value.is_empty() {
                response.exporter_response.insert(key.to_owned(), value);
            }
        }
        response
    }

    fn keep_image(&self, id: &str, names: &[String]) {
        self.shared.state.send_modify(|state| {
            state.images.insert(Image {
                id: id.to_owned(),
                size: self.script.image_size,
                labels: self.build.labels.clone(),
                created: SystemTime::now(),
            });
            for name in names {
                state.images.tag(id, name);
            }
        });
    }

    async fn fail(&mut self, message: &str) -> Status {
        let dockerfile = self.build.dockerfile.clone();
        let failure = match self.running_step() {
            Some(step) => Failure::in_vertex(message, step, &dockerfile),
            None => Failure::new(message),
        };
        self.record(Ended::Failed);
        self.fail_step(failure.message()).await;
        failure.into_status()
    }

    /// Ends the running step, if there is one, with an error.
    async fn fail_step(&mut self, message: &str) {
        if let Some(step) = self.running_step() {
            message.clone_into(&mut step.error);
        }
        self.complete_step().await;
    }

    fn running_step(&mut self) -> Option<&mut Vertex> {
        let last = self.started.checked_sub(1)?;
        let step = &mut self.steps[last];
        step.completed.is_none().then_some(step)
    }

    async fn publish(&self, vertex: &Vertex) {
        self.call.progress.publish(vertex::progress(std::slice::from_ref(vertex))).await;
    }
}

/// Returns the seed that makes digests differ between engines and builds.
fn seed(shared: &Shared, index: usize) -> String {
    format!("{} build {index}", shared.name)
}
