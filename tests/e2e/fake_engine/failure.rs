//! Errors of Solve, in the form in which `BuildKit` sends them.
//!
//! An error has the code UNKNOWN and a `google.rpc.Status` with details, each an `Any` whose value
//! is JSON: call stacks, the place in the Dockerfile, the failing vertex, and the exit code of a
//! process.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bollard::moby::buildkit::v1::Vertex;
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::vertex;

/// Common start of the type URLs of details.
const TYPES: &str = "github.com/moby/buildkit";

/// The failure of a build, in a vertex or before the first one.
#[derive(Debug)]
pub(super) struct Failure {
    message: String,
    details: Vec<(&'static str, Value)>,
}

impl Failure {
    /// Returns a failure before the first vertex.
    pub(super) fn new(message: &str) -> Failure {
        let frame = json!({
            "Name": "github.com/moby/buildkit/solver/llbsolver.(*Solver).Solve",
            "File": "/go/src/github.com/docker/docker/vendor/github.com/moby/buildkit/solver/llbsolver/solver.go",
            "Line": 378,
        });
        let stack = ("stack.Stack+json", json!({ "frames": [frame] }));
        Failure { message: message.to_owned(), details: vec![stack] }
    }

    /// Returns a failure in this vertex, at the line of the Dockerfile that has its command.
    ///
    /// For a RUN step, the message `exit code: N` becomes the engine's message about a process, and
    /// its exit code is added to the details.
    pub(super) fn in_vertex(message: &str, failed: &Vertex, dockerfile: &str) -> Failure {
        let exit_code = message.strip_prefix("exit code: ").and_then(|code| code.parse::<u32>().ok());
        let process = vertex::command(failed).zip(exit_code);
        let mut failure = match &process {
            Some((command, code)) => Failure::new(&unsuccessful(command, *code)),
            None => Failure::new(message),
        };
        failure.details.push(("errdefs.Source+json", source(failed, dockerfile)));
        failure.details.push(("errdefs.Vertex+json", json!({ "digest": failed.digest })));
        if let Some((_, code)) = process {
            failure.details.push(("gatewayapi.ExitMessage+json", json!({ "Code": code })));
        }
        failure
    }

    /// Returns the message alone, as the failing vertex carries it.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// Returns the error with which Solve fails.
    pub(super) fn into_status(self) -> Status {
        let details = self.details.into_iter().map(|(name, value)| prost_types::Any {
            type_url: format!("{TYPES}/{name}"),
            value: value.to_string().into_bytes(),
        });
        let status = tonic_types::pb::Status {
            code: Code::Unknown.into(),
            message: self.message.clone(),
            details: details.collect(),
        };
        Status::with_details(Code::Unknown, self.message, status.encode_to_vec().into())
    }
}

/// Returns the error of a vertex whose build was cancelled.
pub(super) fn cancelled(running: &Vertex) -> String {
    match vertex::command(running) {
        Some(command) => format!("{}: context canceled", unsuccessful(&command, 137)),
        None => "context canceled".to_owned(),
    }
}

fn unsuccessful(command: &str, code: u32) -> String {
    format!("process {command:?} did not complete successfully: exit code: {code}")
}

/// Returns the Dockerfile and the lines in it that belong to the vertex.
fn source(failed: &Vertex, dockerfile: &str) -> Value {
    let instruction =
        failed.name.split_once("] ").map_or(failed.name.as_str(), |(_, instruction)| instruction);
    let line = dockerfile.lines().position(|line| line.trim() == instruction).map_or(1, |index| index + 1);
    json!({
        "info": { "filename": "Dockerfile", "data": STANDARD.encode(dockerfile) },
        "ranges": [{ "start": { "line": line }, "end": { "line": line } }],
    })
}
