//! Scripts of builds: steps, output, pauses and an end.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tonic::Status;

/// Maximum time that [`Gate::reached`] waits before it fails the test.
const GATE_LIMIT: Duration = Duration::from_secs(30);

/// The course of a build, in order.
///
/// A script without an end succeeds. The default script has a FROM step, a RUN step that prints
/// "hello from the fake engine", and succeeds.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(super) acts: Vec<Act>,
    pub(super) end: End,
    pub(super) ignores_cancel: bool,
    pub(super) announces_backwards: bool,
    pub(super) image_size: u64,
}

/// An event in the course of a build.
#[derive(Clone)]
pub(super) enum Act {
    Step { name: String, cached: bool },
    Log { stream: i64, text: String },
    Logs { count: usize, line: LineOf },
    Pause(Gate),
}

/// A function that returns the text of the line with a given number.
pub(super) type LineOf = Arc<dyn Fn(usize) -> String + Send + Sync>;

/// The end of a build.
#[derive(Clone, Debug)]
pub(super) enum End {
    Succeed,
    Fail(String),
    FailWith(Status),
    Hang,
    Cut,
    InternalError,
}

impl Script {
    /// Returns an empty script, which succeeds.
    pub(crate) fn new() -> Script {
        Script {
            acts: Vec::new(),
            end: End::Succeed,
            ignores_cancel: false,
            announces_backwards: false,
            image_size: 1_982_256,
        }
    }

    /// Ends the step before and starts one with this name, like `[2/3] RUN make`.
    pub(crate) fn step(self, name: &str) -> Script {
        self.act(Act::Step { name: name.to_owned(), cached: false })
    }

    /// Marks the step just added as cached. A cached step prints nothing.
    pub(crate) fn cached(mut self) -> Script {
        let Some(Act::Step { cached, .. }) = self.acts.last_mut() else {
            panic!("cached() goes right behind step()")
        };
        *cached = true;
        self
    }

    /// Prints this text on the current step's standard output.
    pub(crate) fn log(self, text: &str) -> Script {
        self.act(Act::Log { stream: 1, text: text.to_owned() })
    }

    /// Prints this text on the current step's standard error.
    pub(crate) fn log_error(self, text: &str) -> Script {
        self.act(Act::Log { stream: 2, text: text.to_owned() })
    }

    /// Prints `count` log entries in the current step, as fast as the client reads them.
    ///
    /// A message has about 100 of them. They are numbered from 0, and their text includes the line
    /// end.
    pub(crate) fn logs(self, count: usize, line: impl Fn(usize) -> String + Send + Sync + 'static) -> Script {
        let line: LineOf = Arc::new(line);
        self.act(Act::Logs { count, line })
    }

    /// Waits at this point until the gate is open.
    pub(crate) fn pause(self, gate: &Gate) -> Script {
        self.act(Act::Pause(gate.clone()))
    }

    /// Sets the size of the image, in bytes.
    pub(crate) fn image_size(mut self, bytes: u64) -> Script {
        self.image_size = bytes;
        self
    }

    /// Continues after a cancel, which is recorded. A client that disconnects still ends the build.
    pub(crate) fn ignore_cancel(mut self) -> Script {
        self.ignores_cancel = true;
        self
    }

    /// Announces the steps from the last to the first, as engines from 26 on do. Each names its
    /// inputs.
    pub(crate) fn announce_backwards(mut self) -> Script {
        self.announces_backwards = true;
        self
    }

    /// Succeeds. The image is in the table under its tag.
    pub(crate) fn succeed(self) -> Script {
        self.end(End::Succeed)
    }

    /// Fails in the current step, or before the first step if there is none.
    ///
    /// In a RUN step, "exit code: 2" becomes the engine's message with the typed exit code in its
    /// details; every other message is used as it is.
    pub(crate) fn fail(self, message: &str) -> Script {
        self.end(End::Fail(message.to_owned()))
    }

    /// Fails in the current step and answers Solve with exactly this status.
    pub(crate) fn fail_with(self, status: Status) -> Script {
        self.end(End::FailWith(status))
    }

    /// Never ends by itself.
    pub(crate) fn hang(self) -> Script {
        self.end(End::Hang)
    }

    /// Cuts the connection during the build.
    pub(crate) fn drop_connection(self) -> Script {
        self.end(End::Cut)
    }

    /// Answers Solve with INTERNAL and does nothing else.
    pub(crate) fn internal_error(self) -> Script {
        self.end(End::InternalError)
    }

    /// Returns the names of the steps in order.
    pub(super) fn step_names(&self) -> impl Iterator<Item = &str> {
        self.acts.iter().filter_map(|act| match act {
            Act::Step { name, .. } => Some(name.as_str()),
            Act::Log { .. } | Act::Logs { .. } | Act::Pause(_) => None,
        })
    }

    fn act(mut self, act: Act) -> Script {
        let prints = matches!(act, Act::Log { .. } | Act::Logs { .. });
        assert!(!prints || self.step_is_open(), "only a step that runs can print");
        self.acts.push(act);
        self
    }

    fn step_is_open(&self) -> bool {
        let step = self.acts.iter().rev().find_map(|act| match act {
            Act::Step { cached, .. } => Some(!cached),
            Act::Log { .. } | Act::Logs { .. } | Act::Pause(_) => None,
        });
        step == Some(true)
    }

    fn end(mut self, end: End) -> Script {
        self.end = end;
        self
    }
}

impl Default for Script {
    fn default() -> Script {
        Script::new()
            .step("[1/2] FROM scratch")
            .step("[2/2] RUN hello")
            .log("hello from the fake engine\n")
            .succeed()
    }
}

impl fmt::Debug for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Act::Step { name, cached } => write!(f, "step {name:?} cached={cached}"),
            Act::Log { stream, text } => write!(f, "log {stream} {text:?}"),
            Act::Logs { count, .. } => write!(f, "{count} logs"),
            Act::Pause(_) => write!(f, "pause"),
        }
    }
}

/// A point in a script at which it waits for the test. Clones are the same gate.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    open: watch::Sender<bool>,
    arrivals: watch::Sender<usize>,
}

impl Gate {
    /// Returns a closed gate.
    pub(crate) fn new() -> Gate {
        Gate { open: watch::Sender::new(false), arrivals: watch::Sender::new(0) }
    }

    /// Lets every build pass that waits at the gate or reaches it later.
    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// Waits until a build has reached this gate; panics after 30 seconds.
    pub(crate) async fn reached(&self) {
        self.reached_by(1).await;
    }

    /// Waits until this many builds have reached this gate; panics after 30 seconds.
    pub(crate) async fn reached_by(&self, builds: usize) {
        let mut arrivals = self.arrivals.subscribe();
        tokio::time::timeout(GATE_LIMIT, arrivals.wait_for(|count| *count >= builds))
            .await
            .expect("the script comes to its gate within 30 seconds")
            .expect("the gate outlives the wait, for it holds the sender");
    }

    /// Counts a build that has arrived and waits until the gate is open.
    pub(super) async fn pass(&self) {
        self.arrivals.send_modify(|count| *count += 1);
        self.open
            .subscribe()
            .wait_for(|open| *open)
            .await
            .expect("the gate outlives the wait, for it holds the sender");
    }
}
