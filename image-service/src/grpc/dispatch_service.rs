//! `trailer.dispatch.v1.DispatchService`, with one task per worker connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use proto::dispatch::{
    self as wire, connect_request::Message as FromWorker, dispatch_service_server::DispatchService,
};
use service_runtime::listener::ConnectInfo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{audit::Audit, authentication::caller, field, status};
use crate::{
    access::Principal,
    catalog::Catalog,
    context_transfer::Contexts,
    dispatch::Report,
    error::{Error, Violations},
    feed::deadline,
    image::ImageId,
    queue::Queue,
    worker_session::{Opened, Session},
};

mod assignment;
mod engine_contents;
mod message;
mod sources;

type Answers = mpsc::Sender<Result<wire::ConnectResponse, Status>>;

/// The implementation of the dispatch service.
#[derive(Debug)]
pub(super) struct Dispatcher {
    queue: Arc<Queue>,
    catalog: Catalog,
    contexts: Contexts,
    sessions: TaskTracker,
    shutdown: CancellationToken,
}

impl Dispatcher {
    /// Number of responses that may wait in a connection, besides the messages of its session.
    const ANSWERS: usize = 16;

    pub(super) fn new(
        queue: Arc<Queue>,
        catalog: Catalog,
        contexts: Contexts,
        sessions: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        Self { queue, catalog, contexts, sessions, shutdown }
    }
}

#[tonic::async_trait]
impl DispatchService for Dispatcher {
    type ConnectStream = BoxStream<'static, Result<wire::ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<wire::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let caller = caller(&request)?;
        let peer = request.extensions().get::<ConnectInfo>().map(|info| info.connection().peer());
        let (answers, stream) = mpsc::channel(Self::ANSWERS);
        let connection = Connection::new(
            Arc::clone(&self.queue),
            caller,
            peer,
            request.into_inner(),
            answers,
            self.shutdown.clone(),
        );
        self.sessions.spawn(connection.run());
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }

    async fn find_unused_images(
        &self,
        request: Request<wire::FindUnusedImagesRequest>,
    ) -> Result<Response<wire::FindUnusedImagesResponse>, Status> {
        let caller = caller(&request)?;
        let contents = engine_contents::parse(request.into_inner())?;
        let unused = self.catalog.unused(&caller, contents).await?;
        Ok(Response::new(engine_contents::unused(unused)))
    }

    async fn list_artifacts(
        &self,
        request: Request<wire::ListArtifactsRequest>,
    ) -> Result<Response<wire::ListArtifactsResponse>, Status> {
        let caller = caller(&request)?;
        let after = match request.into_inner().after_image_id.as_str() {
            "" => ImageId(Uuid::nil()),
            id => ImageId(field::id("after_image_id", id)?),
        };
        let artifacts = self.catalog.expected_artifacts(&caller, after, engine_contents::MAX as u64).await?;
        Ok(Response::new(engine_contents::expected(artifacts)))
    }

    async fn report_artifacts(
        &self,
        request: Request<wire::ReportArtifactsRequest>,
    ) -> Result<Response<wire::ReportArtifactsResponse>, Status> {
        let caller = caller(&request)?;
        let report = engine_contents::report(request.into_inner())?;
        self.catalog.record_artifacts(&caller, report).await?;
        Ok(Response::new(wire::ReportArtifactsResponse {}))
    }

    async fn resolve_sources(
        &self,
        request: Request<wire::ResolveSourcesRequest>,
    ) -> Result<Response<wire::ResolveSourcesResponse>, Status> {
        let caller = caller(&request)?;
        let wire::ResolveSourcesRequest { attempt, references } = request.into_inner();
        let attempt = message::attempt("attempt", attempt)?;
        sources::check(&references)?;
        let resolved = self.catalog.resolve_sources(&caller, attempt, &references).await?;
        Ok(Response::new(sources::resolved(resolved)))
    }

    type FetchContextStream = BoxStream<'static, Result<wire::FetchContextResponse, Status>>;

    async fn fetch_context(
        &self,
        request: Request<wire::FetchContextRequest>,
    ) -> Result<Response<Self::FetchContextStream>, Status> {
        let caller = caller(&request)?;
        let audit = Audit::new(&request);
        let attempt = message::attempt("attempt", request.into_inner().attempt)?;
        audit.is_about(attempt.build);
        let download = self.contexts.download(&caller, attempt).await?;
        let (shutdown, expiry) = (self.shutdown.clone(), deadline(&caller));
        let chunks = stream::try_unfold(download, move |mut download| {
            let shutdown = shutdown.clone();
            async move {
                let chunk = tokio::select! {
                    biased;
                    () = shutdown.cancelled() => return Err(Error::Draining.into()),
                    () = tokio::time::sleep_until(expiry) => return Err(Error::TokenExpired.into()),
                    chunk = download.next() => chunk?,
                };
                Ok(chunk.map(|chunk| (wire::FetchContextResponse { chunk: chunk.into() }, download)))
            }
        });
        Ok(Response::new(chunks.boxed()))
    }
}

/// One connection of one worker; `S` is the stream of the worker's messages.
pub(crate) struct Connection<S> {
    queue: Arc<Queue>,
    caller: Principal,
    peer: Option<SocketAddr>,
    requests: S,
    answers: Answers,
    shutdown: CancellationToken,
}

impl<S: Stream<Item = Result<wire::ConnectRequest, Status>> + Unpin> Connection<S> {
    /// Limit on sending the last status, in case the worker no longer reads.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
    /// Maximum number of a worker's messages that are handled together.
    const MAX_BATCH: usize = 16;

    pub(crate) fn new(
        queue: Arc<Queue>,
        caller: Principal,
        peer: Option<SocketAddr>,
        requests: S,
        answers: Answers,
        shutdown: CancellationToken,
    ) -> Self {
        Self { queue, caller, peer, requests, answers, shutdown }
    }

    /// Serves the worker until either side ends the connection, or until `shutdown`.
    pub(crate) async fn run(mut self) {
        if let Err(status) = self.serve().await {
            tracing::info!(worker = self.caller.subject(), code = ?status.code(), message = status.message(), "a worker's connection ended");
            // The worker may be gone, or may have stopped reading.
            let _ = tokio::time::timeout(Self::CLOSE_TIMEOUT, self.answers.send(Err(status))).await;
        }
    }

    async fn serve(&mut self) -> Result<(), Status> {
        let opened = self.open().await;
        Audit::connected(&self.caller, self.peer, opened.as_ref().map_or_else(Status::code, |_| Code::Ok));
        let opened = opened?;
        tracing::info!(worker = opened.session.worker(), "a worker connected");
        let Opened { mut session, welcome, messages, hang_up } = opened;
        let welcome = message::welcome(welcome, &self.queue);
        let ended = if self.answers.send(Ok(welcome)).await.is_ok() {
            self.exchange_messages(&mut session, messages, hang_up).await
        } else {
            Ok(())
        };
        session.close().await;
        ended
    }

    /// Waits for the worker's hello, and opens its session.
    async fn open(&mut self) -> Result<Opened, Status> {
        // A silent worker must not hold resources for longer than a lease.
        let patience = self.queue.policy().lease;
        let first = tokio::select! {
            biased;
            () = self.shutdown.cancelled() => return Err(Error::Draining.into()),
            first = tokio::time::timeout(patience, self.requests.next()) => first,
        };
        let first = first.map_err(|_| silent())?.transpose().map_err(stream_error)?;
        let Some(FromWorker::Hello(hello)) = first.and_then(|request| request.message) else {
            return Err(Error::Invalid(Violations::one("message", "must begin with `hello`")).into());
        };
        let hello = message::hello(hello)?;
        Ok(Session::open(Arc::clone(&self.queue), &self.caller, hello).await?)
    }

    /// Handles the worker's messages and forwards those for the worker, until either side ends.
    async fn exchange_messages(
        &mut self,
        session: &mut Session,
        mut messages: mpsc::Receiver<crate::dispatch::ToWorker>,
        hang_up: CancellationToken,
    ) -> Result<(), Status> {
        let patience = self.queue.policy().lease;
        let expiry = deadline(&self.caller);
        let answers = self.answers.clone();
        let forward = async {
            while let Some(message) = messages.recv().await {
                if answers.send(Ok(message::to_worker(message))).await.is_err() {
                    return Ok(());
                }
            }
            // Another connection has replaced this one.
            Err(Error::SessionLost.into())
        };
        let mut requests = (&mut self.requests).ready_chunks(Self::MAX_BATCH);
        let receive = async {
            loop {
                let batch = tokio::time::timeout(patience, requests.next()).await.map_err(|_| silent())?;
                match batch {
                    Some(batch) => handle(session, batch).await?,
                    None => return Ok(()),
                }
            }
        };
        tokio::select! {
            biased;
            () = hang_up.cancelled() => Err(Error::SessionLost.into()),
            () = self.shutdown.cancelled() => Err(Error::Draining.into()),
            () = tokio::time::sleep_until(expiry) => Err(Error::TokenExpired.into()),
            forwarded = forward => forwarded,
            received = receive => received,
        }
    }
}

/// Handles the messages of a worker in order; consecutive reports are decided together.
async fn handle(
    session: &mut Session,
    batch: Vec<Result<wire::ConnectRequest, Status>>,
) -> Result<(), Status> {
    let mut reports = Vec::new();
    for request in batch {
        let message = request.map_err(stream_error).and_then(inbound);
        if let Ok(Inbound::Report(report)) = message {
            reports.push(report);
            continue;
        }
        session.report(std::mem::take(&mut reports)).await?;
        if let Inbound::Heartbeat(heartbeat) = message? {
            session.heartbeat(heartbeat.number, heartbeat.draining).await?;
        }
    }
    Ok(session.report(reports).await?)
}

/// A message of a worker after its hello.
enum Inbound {
    Heartbeat(wire::Heartbeat),
    Report(Report),
}

fn inbound(request: wire::ConnectRequest) -> Result<Inbound, Status> {
    match request.message {
        Some(FromWorker::Heartbeat(heartbeat)) => Ok(Inbound::Heartbeat(heartbeat)),
        Some(FromWorker::Report(report)) => Ok(Inbound::Report(message::report(report)?)),
        Some(FromWorker::Hello(_)) => {
            Err(Error::Invalid(Violations::one("message", "must be `hello` only once")).into())
        }
        None => Err(Error::Invalid(Violations::one("message", "must be given")).into()),
    }
}

fn silent() -> Status {
    Error::SessionLost.into()
}

/// Converts a stream error of tonic: the client is at fault if a message cannot be decoded.
///
/// The status of a broken connection is returned unchanged.
pub(super) fn stream_error(found: Status) -> Status {
    if !found.details().is_empty() {
        return found;
    }
    if matches!(found.code(), Code::OutOfRange | Code::ResourceExhausted) {
        status::too_large()
    } else if found.code() == Code::Internal {
        status::undecodable()
    } else {
        found
    }
}
