//! What the service and a worker say to each other, free of the wire.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    build::{Build, BuildId, Failure, Happening, Workspace},
    image::{Capability, Configuration, ImageId, Reference},
    timestamp::Timestamp,
};

/// The version of the dispatch protocol that this service speaks.
pub(crate) const PROTOCOL_VERSION: i32 = 1;

/// One attempt at one build: what every report is fenced by.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Attempt {
    pub(crate) build: BuildId,
    pub(crate) number: i32,
}

/// A worker introduces itself.
#[derive(Clone, Debug)]
pub(crate) struct Hello {
    pub(crate) name: String,
    /// Names the worker's process: a connection of the same process may supersede the one before at once.
    pub(crate) instance: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) slots: i32,
    pub(crate) engine_version: String,
    pub(crate) capabilities: BTreeSet<Capability>,
    pub(crate) holds: Vec<Attempt>,
    pub(crate) protocol_version: i32,
    /// Why it gets no builds at all; empty when it takes some.
    pub(crate) unsupported_reason: String,
    pub(crate) withheld: Vec<WithheldAbility>,
    /// What an operator has to know of its engine; empty when there is nothing.
    pub(crate) engine_warning: String,
}

/// An ability that a worker withholds because its engine has a known flaw. Serialised, it is what the store keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WithheldAbility {
    pub(crate) ability: String,
    pub(crate) flaw: String,
    /// The first version of the engine without the flaw; empty when there is none yet.
    pub(crate) fixed_in: String,
}

/// The answer to [`Hello`].
#[derive(Clone, Debug)]
pub(crate) struct Welcome {
    pub(crate) session: String,
    pub(crate) keep: Vec<KeptAttempt>,
    pub(crate) drop: Vec<Attempt>,
}

/// An attempt that goes on after a reconnect.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptAttempt {
    pub(crate) attempt: Attempt,
    pub(crate) acknowledged: i64,
    pub(crate) publish_granted: bool,
    pub(crate) cancel_requested: bool,
}

/// What the service tells a worker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ToWorker {
    HeartbeatAck(i64),
    Assignment {
        attempt: Attempt,
        image: ImageId,
        reference: Reference,
        configuration: Arc<Configuration>,
        /// What to commit, if the attempt is at a snapshot.
        workspace: Option<Workspace>,
        /// The W3C `traceparent` that the work goes on with.
        trace: Option<String>,
    },
    ReportAck {
        attempt: Attempt,
        sequence: i64,
    },
    PublishGrant(Attempt),
    Cancel(Attempt),
    /// Stop the work, forget the attempt: it is fenced.
    Drop(Attempt),
}

impl ToWorker {
    /// The same message; an assignment has its work go on with this `traceparent`, where there is one.
    pub(crate) fn in_trace(mut self, traceparent: Option<String>) -> Self {
        if let Self::Assignment { trace, .. } = &mut self
            && traceparent.is_some()
        {
            *trace = traceparent;
        }
        self
    }
}

/// What happened in an attempt, numbered within it from 1.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) attempt: Attempt,
    pub(crate) first_sequence: i64,
    pub(crate) events: Vec<Reported>,
}

#[derive(Clone, Debug)]
pub(crate) struct Reported {
    pub(crate) time: Timestamp,
    pub(crate) event: WorkerEvent,
}

#[derive(Clone, Debug)]
pub(crate) enum WorkerEvent {
    Started,
    /// A step changed, or something was printed or left out.
    Happened(Happening),
    Built,
    Succeeded {
        image_id: String,
        size_bytes: i64,
        repo_digest: Option<String>,
        config_digest: Option<String>,
    },
    Failed(Failure),
    HandedBack {
        reason: String,
    },
    Stopped {
        confirmed: bool,
    },
}

impl Attempt {
    pub(crate) fn of(build: &Build) -> Self {
        Self { build: build.id, number: build.attempt }
    }
}
