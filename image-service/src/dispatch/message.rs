//! The messages between the service and a worker, independent of the wire format.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    access::{Identity, Pools},
    build::{Build, BuildId, DistantBase, Failure, RecordedEvent, TrustDomain, Workspace},
    image::{Capability, Configuration, ImageId, Reference},
    timestamp::Timestamp,
};

/// Version of the dispatch protocol that this service speaks.
pub(crate) const PROTOCOL_VERSION: i32 = 1;

/// One attempt at one build, by which every report is fenced.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Attempt {
    pub(crate) build: BuildId,
    pub(crate) number: i32,
}

/// The introduction of a worker.
#[derive(Clone, Debug)]
pub(crate) struct Hello {
    pub(crate) name: String,
    /// Identifier of the worker's process. A new connection of the same process may replace the previous one
    /// at once.
    pub(crate) instance: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) slots: i32,
    pub(crate) engine_version: String,
    pub(crate) capabilities: BTreeSet<Capability>,
    /// Pools of the worker's token; the worker itself does not send them.
    pub(crate) pools: Pools,
    pub(crate) holds: Vec<Attempt>,
    pub(crate) protocol_version: i32,
    /// Reason why the worker gets no builds at all; empty if it takes some.
    pub(crate) unsupported_reason: String,
    pub(crate) withheld: Vec<WithheldAbility>,
    /// Warning to operators about the worker's engine; empty if there is none.
    pub(crate) engine_warning: String,
}

/// An ability that a worker withholds because its engine has a known flaw. The store keeps the serialised
/// form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WithheldAbility {
    pub(crate) ability: String,
    pub(crate) flaw: String,
    /// First version of the engine without the flaw; empty if there is none yet.
    pub(crate) fixed_in: String,
}

/// The response to a [`Hello`].
#[derive(Clone, Debug)]
pub(crate) struct Welcome {
    pub(crate) session: String,
    pub(crate) keep: Vec<KeptAttempt>,
    pub(crate) drop: Vec<Attempt>,
}

/// An attempt that continues after a reconnect.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptAttempt {
    pub(crate) attempt: Attempt,
    pub(crate) acknowledged: i64,
    pub(crate) publish_granted: bool,
    pub(crate) cancel_requested: bool,
}

/// A message from the service to a worker.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum ToWorker {
    HeartbeatAck(i64),
    Assignment {
        attempt: Attempt,
        image: ImageId,
        reference: Reference,
        trust_domain: TrustDomain,
        /// Subject who created the image.
        creator: String,
        requester: Box<Identity>,
        configuration: Arc<Configuration>,
        /// Maximum time that the attempt may run.
        timeout: Duration,
        /// Workspace to commit, if the build is a snapshot.
        workspace: Option<Workspace>,
        /// W3C `traceparent` under which the work continues.
        trace: Option<String>,
    },
    ReportAck {
        attempt: Attempt,
        sequence: i64,
    },
    PublishGrant(Attempt),
    Cancel(Attempt),
    /// Order to stop the work and forget the attempt, because it is fenced.
    Drop(Attempt),
}

impl ToWorker {
    /// Returns the message; an assignment continues the trace of `traceparent`, if there is one.
    pub(crate) fn in_trace(mut self, traceparent: Option<String>) -> Self {
        if let Self::Assignment { trace, .. } = &mut self
            && traceparent.is_some()
        {
            *trace = traceparent;
        }
        self
    }
}

/// Consecutive events of an attempt, numbered within the attempt from 1.
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
    /// Change of a step, or output that was printed or left out.
    Happened(RecordedEvent),
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
        /// Base image that only another worker holds, if that is the reason.
        base: Option<DistantBase>,
    },
    Stopped {
        confirmed: bool,
    },
}

impl Attempt {
    pub(crate) fn from_build(build: &Build) -> Self {
        Self { build: build.id, number: build.attempt }
    }
}
