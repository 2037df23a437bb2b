//! `BuildKit`'s Control API: Solve, Status, Session and `ListWorkers`.

use std::sync::Arc;
use std::time::Duration;

use bollard::moby::buildkit::v1::control_server::Control;
use bollard::moby::buildkit::v1::types::{BuildkitVersion, WorkerRecord};
use bollard::moby::buildkit::v1::{
    BuildHistoryEvent, BuildHistoryRequest, BytesMessage, DiskUsageRequest, DiskUsageResponse, InfoRequest,
    InfoResponse, ListWorkersRequest, ListWorkersResponse, PruneRequest, SolveRequest, SolveResponse,
    StatusRequest, StatusResponse, UpdateBuildHistoryRequest, UpdateBuildHistoryResponse, UsageRecord,
};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::builds::{self, Call};
use super::connection::Connection;
use super::progress::Progress;
use super::session::SessionStream;
use super::{Shared, session, vertex};

/// Maximum time that a Status stream waits for the Solve of its ref, as in `BuildKit`.
const JOB_WAIT: Duration = Duration::from_secs(6);

type Answer<T> = Result<Response<T>, Status>;

/// The Control service of one connection.
pub(super) struct Controller {
    shared: Arc<Shared>,
    connection: Connection,
}

impl Controller {
    pub(super) fn new(shared: Arc<Shared>, connection: Connection) -> Controller {
        Controller { shared, connection }
    }

    /// Registers the progress of a new build under its ref.
    fn register(&self, reference: &str) -> Result<Progress, Status> {
        let progress = Progress::new();
        let is_new = self.shared.state.send_if_modified(|state| {
            let runs = state.progress.get(reference).is_some_and(|progress| !progress.has_ended());
            if !runs {
                state.progress.insert(reference.to_owned(), progress.clone());
            }
            !runs
        });
        if is_new { Ok(progress) } else { Err(Status::unknown(format!("job ID {reference} exists"))) }
    }

    fn unimplemented<T>(&self, method: &str) -> Answer<T> {
        self.shared.record_unexpected(format!("Control.{method}"));
        Err(unknown_method(method))
    }
}

#[tonic::async_trait]
impl Control for Controller {
    type PruneStream = BoxStream<'static, Result<UsageRecord, Status>>;
    type StatusStream = BoxStream<'static, Result<StatusResponse, Status>>;
    type SessionStream = SessionStream;
    type ListenBuildHistoryStream = BoxStream<'static, Result<BuildHistoryEvent, Status>>;

    /// Runs a build and answers when it has ended.
    ///
    /// If the client drops the call, this future is dropped, which cancels the build.
    async fn solve(&self, request: Request<SolveRequest>) -> Answer<SolveResponse> {
        let request = request.into_inner();
        let progress = self.register(&request.r#ref)?;
        let cancel = CancellationToken::new();
        let guard = CancelOnDrop {
            shared: Arc::clone(&self.shared),
            connection: self.connection.clone(),
            cancel: Some(cancel.clone()),
        };
        let call = Call { connection: self.connection.clone(), cancel, progress };
        let (answer, outcome) = oneshot::channel();
        self.shared.spawn(builds::run(request, call, answer, Arc::clone(&self.shared)));

        let outcome = outcome.await.unwrap_or_else(|_| Err(Status::unavailable("the engine stops")));
        guard.disarm();
        outcome.map(Response::new)
    }

    /// Streams the progress of a build that runs or starts soon.
    async fn status(&self, request: Request<StatusRequest>) -> Answer<Self::StatusStream> {
        let reference = request.into_inner().r#ref;
        let mut state = self.shared.state.subscribe();
        let stream = stream::once(async move {
            let found = async {
                let state = state.wait_for(|state| state.progress.contains_key(&reference)).await.ok()?;
                state.progress.get(&reference).map(Progress::reader)
            };
            match tokio::time::timeout(JOB_WAIT, found).await.ok().flatten() {
                Some(reader) => reader.into_stream().boxed(),
                None => {
                    let unknown = Status::not_found(format!("no such job {reference}"));
                    stream::iter([Err(unknown)]).boxed()
                }
            }
        });
        Ok(Response::new(stream.flatten().boxed()))
    }

    async fn session(&self, request: Request<Streaming<BytesMessage>>) -> Answer<Self::SessionStream> {
        session::open(request, &self.shared).map(Response::new)
    }

    async fn list_workers(&self, _: Request<ListWorkersRequest>) -> Answer<ListWorkersResponse> {
        let mut worker = WorkerRecord {
            id: vertex::digest(&self.shared.name).trim_start_matches("sha256:")[..25].to_owned(),
            buildkit_version: Some(buildkit_version()),
            ..WorkerRecord::default()
        };
        let gateway = "org.mobyproject.buildkit.worker.moby.host-gateway-ip";
        worker.labels.insert(gateway.to_owned(), "172.17.0.1".to_owned());
        worker.platforms.resize_with(1, Default::default);
        "amd64".clone_into(&mut worker.platforms[0].architecture);
        "linux".clone_into(&mut worker.platforms[0].os);
        Ok(Response::new(ListWorkersResponse { record: vec![worker] }))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Answer<InfoResponse> {
        if !self.shared.release.takes_grpc_on_its_socket() {
            return Err(unknown_method("Info"));
        }
        Ok(Response::new(InfoResponse { buildkit_version: Some(buildkit_version()) }))
    }

    async fn disk_usage(&self, _: Request<DiskUsageRequest>) -> Answer<DiskUsageResponse> {
        self.unimplemented("DiskUsage")
    }

    async fn prune(&self, _: Request<PruneRequest>) -> Answer<Self::PruneStream> {
        self.unimplemented("Prune")
    }

    async fn listen_build_history(
        &self,
        _: Request<BuildHistoryRequest>,
    ) -> Answer<Self::ListenBuildHistoryStream> {
        self.unimplemented("ListenBuildHistory")
    }

    async fn update_build_history(
        &self,
        _: Request<UpdateBuildHistoryRequest>,
    ) -> Answer<UpdateBuildHistoryResponse> {
        self.unimplemented("UpdateBuildHistory")
    }
}

/// A guard that cancels a build if its Solve call is dropped while the connection lives.
struct CancelOnDrop {
    shared: Arc<Shared>,
    connection: Connection,
    cancel: Option<CancellationToken>,
}

impl CancelOnDrop {
    fn disarm(mut self) {
        self.cancel = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = self.cancel.take()
            && !self.connection.is_gone()
        {
            // Cancelled inside the change, which wakes the tests that wait for it.
            self.shared.state.send_modify(|_| cancel.cancel());
        }
    }
}

fn unknown_method(method: &str) -> Status {
    Status::unimplemented(format!("unknown method {method} for service moby.buildkit.v1.Control"))
}

fn buildkit_version() -> BuildkitVersion {
    BuildkitVersion {
        package: "github.com/moby/buildkit".to_owned(),
        version: "v0.13.2".to_owned(),
        revision: String::new(),
    }
}
