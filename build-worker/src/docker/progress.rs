//! What BuildKit says of a build, as steps and output.

use bollard::{
    moby::buildkit::v1::{StatusResponse, Vertex, VertexLog},
    models::{BuildInfo, BuildInfoAux},
};
use prost_types::Timestamp;
use proto::dispatch::StepState;

use crate::engine::{Progress, Told};

/// What a line of the engine's answer tells, if anything.
pub(super) fn told(info: BuildInfo) -> Option<Told> {
    match info.aux? {
        BuildInfoAux::BuildKit(status) => Some(Told::Progress(progress(status))),
        BuildInfoAux::Default(image) => image.id.map(Told::ImageId),
    }
}

fn progress(status: StatusResponse) -> Vec<Progress> {
    // One message may hold a step's beginning, its output and its end: they are told in this order.
    let vertexes = status.vertexes;
    let begun = vertexes
        .iter()
        .filter(|vertex| !vertex.cached)
        .cloned()
        .map(|vertex| step(Vertex { completed: None, error: String::new(), ..vertex }));
    let outputs = status.logs.into_iter().map(output);
    let ended = vertexes.iter().filter(|vertex| vertex.cached || vertex.completed.is_some());
    begun.chain(outputs).chain(ended.cloned().map(step)).collect()
}

fn step(vertex: Vertex) -> Progress {
    let (state, at) = if !vertex.error.is_empty() {
        (StepState::Failed, vertex.completed)
    } else if vertex.cached {
        (StepState::Cached, vertex.completed)
    } else if vertex.completed.is_some() {
        (StepState::Done, vertex.completed)
    } else if vertex.started.is_some() {
        (StepState::Started, vertex.started)
    } else {
        (StepState::Pending, None)
    };
    Progress::Step {
        id: vertex.digest,
        name: vertex.name,
        state,
        error: vertex.error,
        at: at.map(|at| Timestamp { seconds: at.seconds, nanos: at.nanos }),
    }
}

fn output(log: VertexLog) -> Progress {
    const STDERR: i64 = 2;
    Progress::Output {
        step: log.vertex,
        stderr: log.stream == STDERR,
        bytes: log.msg,
        at: log.timestamp.map(|at| Timestamp { seconds: at.seconds, nanos: at.nanos }),
    }
}
