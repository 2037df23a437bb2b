//! The service's side of dispatch over in-memory tables, for simulations.
//!
//! Everything between a worker's connection and the store is the real code. The behaviour of the database,
//! including its clock, is up to the [`Surroundings`].

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{
    future::BoxFuture,
    stream::{BoxStream, Stream, StreamExt},
};
use proto::dispatch::{ConnectRequest, ConnectResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uuid::Uuid;

use self::store::MemoryStore;
pub(crate) use self::tables::Tables;
use crate::{
    access::{Identity, Principal, Role},
    build::{Build, BuildId, Event as BuildEvent, Job, Kind, RecordedEvent, State},
    dispatch::{Decision, Event, Policy, ToWorker},
    error::Violations,
    grpc::Connection,
    image::{Configuration, ConfigurationDraft, Dockerfile, ImageId, Reference, Source},
    queue::{Queue, Times},
    signals::Signals,
    timestamp::Timestamp,
};

mod store;
mod tables;
#[cfg(test)]
mod tests;

/// The environment of a store.
pub trait Surroundings: Debug + Send + Sync {
    /// Returns the time of the database's clock, in microseconds since the Unix epoch.
    fn now_micros(&self) -> i64;

    /// Returns the delays of the next operation: until its commit, and from then until its response.
    fn delays(&self) -> (Duration, Duration);

    /// Returns the outcome of the next operation. Called when it is about to be committed.
    fn commit_outcome(&self) -> CommitOutcome;

    /// Observes the change of a build. Called at the moment of its commit.
    fn committed(&self, change: &Change);
}

/// The outcome of an operation.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    /// Committed and answered.
    Done,
    /// Not committed, and answered by an error.
    Lost,
    /// Committed, and answered by an error.
    Ambiguous,
}

/// A change of a build.
#[derive(Clone, Debug)]
pub struct Change {
    /// Id of the build.
    pub build: Uuid,
    /// Transitions of the build, each as `Event in State`.
    pub transitions: Vec<String>,
    /// Attempt and worker of a report, and whether the worker was ordered to drop the attempt.
    pub report: Option<(i32, String, bool)>,
    /// Attempt that a worker has come back without.
    pub abandoned: Option<i32>,
    /// Row after the change; `None` if it is gone.
    pub after: Option<Row>,
}

/// The content of a row of the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// `Queued`, `Claimed`, `Running`, `Publishing`, `Succeeded`, `Failed` or `Cancelled`.
    pub state: String,
    /// True if the state is one of the last three.
    pub is_final: bool,
    /// True if a worker holds the build.
    pub is_held: bool,
    /// Number of the latest attempt.
    pub attempt: i32,
    /// Number of attempts that failed because of the infrastructure.
    pub failures: i32,
    /// Earliest time of the next claim, in microseconds of the database's clock.
    pub not_before: Option<i64>,
    /// Worker of the attempt.
    pub worker: Option<String>,
    /// Time at which a cancellation was requested, in microseconds of the database's clock.
    pub cancel_requested_at: Option<i64>,
    /// True if the work is known to have stopped.
    pub stop_confirmed: bool,
    /// Sequence number of the last durable report of the attempt.
    pub report_sequence: i64,
    /// Fault of the failure: `User`, `Timeout` or `Infrastructure`.
    pub fault: Option<String>,
    /// Sequence numbers of the build's history.
    pub sequences: Vec<i64>,
    /// Lines that the attempts have printed, each with the number of its attempt.
    pub lines: Vec<(i32, String)>,
    /// Id of the image that was recorded.
    pub artifact: Option<String>,
}

/// An in-memory database that replicas share.
#[derive(Clone, Debug)]
pub struct Database {
    tables: Arc<Mutex<Tables>>,
    policy: Policy,
}

/// One process of the service.
#[derive(Debug)]
pub struct Replica {
    queue: Arc<Queue>,
    store: MemoryStore,
    signals: Arc<Signals>,
    shutdown: CancellationToken,
}

/// A build that a client requests.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// Subject of the client.
    pub requester: &'static str,
    /// Only worker that may take the build; empty for any.
    pub worker: &'static str,
    /// Worker that made the image last, as if it had been built before; empty for none.
    pub preferred_worker: &'static str,
    /// Labels that a worker must have to take the build.
    pub labels: BTreeMap<String, String>,
    /// Time limit of an attempt.
    pub time_limit: Option<Duration>,
    /// True if the image is to be pushed.
    pub push: bool,
}

impl Database {
    /// Time without contact after which a worker counts as offline.
    pub const OFFLINE_AFTER: Duration = Duration::from_secs(3);
    /// Maximum pause between two attempts at a build.
    pub const MAX_BACKOFF: Duration = Build::MAX_BACKOFF;
    /// Maximum wait for a slot of the preferred worker.
    pub const MAX_CACHE_WAIT: Duration = Build::MAX_CACHE_WAIT;

    /// Creates an empty database. `queue_timeout` is the maximum time of a build in the queue.
    pub fn new(queue_timeout: Duration) -> Self {
        // A third of the usual times, so that as much happens in a third of the steps. The lease is the
        // shortest that is allowed.
        let policy = Policy {
            lease: Duration::from_secs(13),
            stop_timeout: Duration::from_secs(4),
            offline_after: Self::OFFLINE_AFTER,
            queue_timeout,
            max_build_time: Duration::from_secs(3600),
            max_failures: 3,
            retry_backoff: Duration::from_millis(400),
            max_pending: None,
            max_running: None,
            max_history_bytes: 1 << 30,
        };
        let tables = Tables::new(policy);
        Self { tables: Arc::new(Mutex::new(tables)), policy }
    }
}

impl Replica {
    /// Creates a process that has not started to work.
    pub fn new(database: &Database, surroundings: Arc<dyn Surroundings>) -> Self {
        let store =
            MemoryStore { tables: Arc::clone(&database.tables), surroundings, policy: database.policy };
        let signals = Arc::new(Signals::default());
        let times = Times { heartbeat: Duration::from_secs(1), stop_after: Duration::from_secs(8) };
        let queue = Arc::new(Queue::new(Arc::new(store.clone()), Arc::clone(&signals), times, Uuid::nil()));
        Self { queue, store, signals, shutdown: CancellationToken::new() }
    }

    /// Works until shutdown: takes over the queue, assigns builds, and ends what is overdue.
    pub fn work(&self) -> BoxFuture<'static, ()> {
        const AGAIN: Duration = Duration::from_millis(500);
        let (queue, shutdown) = (Arc::clone(&self.queue), self.shutdown.clone());
        Box::pin(async move {
            while queue.begin().await.is_err() {
                tokio::time::sleep(AGAIN).await;
            }
            tokio::join!(
                queue.decide(shutdown.clone()),
                queue.dispatch(shutdown.clone()),
                queue.clock(shutdown)
            );
        })
    }

    /// Shuts the process down: its connections end, and new ones are rejected.
    pub fn shut_down(&self) {
        self.shutdown.cancel();
    }

    /// Opens the connection of a worker. Returns the task that serves it, and the responses of the service.
    ///
    /// # Errors
    ///
    /// The stream of responses ends with a [`Status`] if the service ends the connection.
    pub fn connection(
        &self,
        worker: &str,
        requests: impl Stream<Item = Result<ConnectRequest, Status>> + Send + Unpin + 'static,
    ) -> (BoxFuture<'static, ()>, BoxStream<'static, Result<ConnectResponse, Status>>) {
        let never = Timestamp::from_micros(i64::MAX);
        let caller = Principal::new(worker.to_owned(), vec![Role::Worker], never);
        let (answers, stream) = mpsc::channel(16);
        let connection =
            Connection::new(Arc::clone(&self.queue), caller, None, requests, answers, self.shutdown.clone());
        (Box::pin(connection.run()), ReceiverStream::new(stream).boxed())
    }

    /// Requests a build of a new image as a client. Returns whether the request was answered.
    pub async fn enqueue(&self, id: Uuid, request: &BuildRequest) -> bool {
        let store = &self.store;
        let written = store.run(|tables, now| {
            if tables.build(BuildId(id)).is_some() {
                return Ok(None);
            }
            let configuration = request.configuration();
            let Ok(reference) = Reference::new(&format!("trailer/{id}"), "") else {
                return Ok(None);
            };
            let requester = Identity::new(request.requester.to_owned(), Vec::new());
            let job = Job {
                kind: Kind::Build,
                creator: request.requester.to_owned(),
                configuration_revision: 1,
                reference,
                requirements: configuration.requirements(),
                preferred_worker: (!request.preferred_worker.is_empty())
                    .then(|| request.preferred_worker.to_owned()),
                workspace: None,
            };
            let mut build = Build::queued(ImageId(id), 1, requester, job, now);
            build.id = BuildId(id);
            let committed = tables.enqueue(build, configuration);
            store.surroundings.committed(&change(tables, BuildId(id), &[], None));
            Ok(Some(committed))
        });
        match written.await {
            Ok(committed) => {
                if let Some(committed) = committed {
                    self.signals.announce(&committed);
                }
                true
            }
            Err(_) => false,
        }
    }

    /// Cancels a build as a client. Returns whether the request was answered, be it by a refusal.
    pub async fn cancel(&self, id: Uuid) -> bool {
        let event = Event::Cancel { by: "alice".to_owned() };
        !matches!(self.queue.handle(BuildId(id), event).await, Err(crate::error::Error::Busy))
    }

    /// Deletes the image of a build as a client. Returns whether the request was answered.
    pub async fn delete(&self, id: Uuid) -> bool {
        let store = &self.store;
        let deleted = store
            .run(|tables, now| {
                Ok(store.change(tables, BuildId(id), None, |tables| tables.delete(BuildId(id), now)))
            })
            .await;
        match deleted {
            Ok((decision, committed)) => {
                if let Ok(Some(decision)) = decision {
                    self.queue.deliver(decision.messages);
                }
                self.signals.announce(&committed);
                true
            }
            Err(_) => false,
        }
    }

    /// Drains a worker as an operator, or reverts that. Returns whether the request was answered.
    pub async fn drain_worker(&self, worker: &str, drained: bool) -> bool {
        let written = self.store.run(|tables, _| Ok(tables.drain_worker(worker, drained).is_ok())).await;
        self.signals.slot_freed();
        written.is_ok()
    }
}

/// Returns all possible transitions of a build, in the notation of [`Change::transitions`].
pub fn transitions() -> Vec<String> {
    let states = [State::Queued, State::Claimed, State::Running, State::Publishing];
    let leads = |state, event| {
        [false, true].into_iter().any(|cancelling| {
            crate::build::transition(Kind::Build, state, event, cancelling, false).is_some()
        })
    };
    BuildEvent::ALL
        .into_iter()
        .flat_map(|event| states.map(|state| (state, event)))
        .filter(|&(state, event)| leads(state, event))
        .map(notation)
        .collect()
}

fn notation((state, event): (State, BuildEvent)) -> String {
    format!("{event:?} in {state:?}")
}

impl BuildRequest {
    fn configuration(&self) -> Configuration {
        let dockerfile = Dockerfile { text: "FROM scratch".to_owned(), ..Dockerfile::default() };
        let mut draft = ConfigurationDraft::from_source(Source::Dockerfile(dockerfile));
        draft.worker = self.worker.to_owned();
        draft.worker_labels = self.labels.clone();
        draft.push = self.push;
        draft.build_timeout_ms =
            self.time_limit.map(|limit| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX));
        Configuration::parse(draft, "", &mut Violations::default())
    }
}

fn change(
    tables: &Tables,
    id: BuildId,
    transitions: &[(State, BuildEvent)],
    event: Option<(&Event, &Decision)>,
) -> Change {
    let (mut report, mut abandoned) = (None, None);
    match event {
        Some((Event::Report { worker, report: sent }, decision)) => {
            let drops = |(_, message): &(String, ToWorker)| *message == ToWorker::Drop(sent.attempt);
            report = Some((sent.attempt.number, worker.clone(), decision.messages.iter().any(drops)));
        }
        Some((Event::Abandoned { attempt }, _)) => abandoned = Some(*attempt),
        Some((Event::Claim { .. } | Event::Cancel { .. } | Event::Waited { .. } | Event::Tick { .. }, _))
        | None => {}
    }
    Change {
        build: id.0,
        transitions: transitions.iter().copied().map(notation).collect(),
        report,
        abandoned,
        after: tables.build(id).map(|build| row(tables, build)),
    }
}

fn row(tables: &Tables, build: &Build) -> Row {
    let history = tables.history(build.id);
    Row {
        state: format!("{:?}", build.state),
        is_final: build.state.is_final(),
        is_held: build.state.is_held(),
        attempt: build.attempt,
        failures: build.failures,
        not_before: build.not_before.map(Timestamp::micros),
        worker: build.worker.clone(),
        cancel_requested_at: build.cancel_requested_at.map(Timestamp::micros),
        stop_confirmed: build.stop_confirmed,
        report_sequence: build.report_sequence,
        fault: build.error.as_ref().map(|error| format!("{:?}", error.fault)),
        sequences: history.iter().map(|record| record.sequence).collect(),
        lines: history
            .iter()
            .filter_map(|record| match &record.event {
                RecordedEvent::Line { text, .. } => Some((record.attempt, text.clone())),
                RecordedEvent::State { .. } | RecordedEvent::Step { .. } | RecordedEvent::Gap { .. } => None,
            })
            .collect(),
        artifact: tables.artifact(build.id).map(|artifact| artifact.image_id.clone()),
    }
}
