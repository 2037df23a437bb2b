//! Simulation of a worker: the real code among models of an engine, a spool and a network.

use std::{
    fmt::Debug,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use proto::dispatch::{
    Attempt, ConnectRequest, ConnectResponse, FindUnusedImagesRequest, FindUnusedImagesResponse,
    ListArtifactsRequest, ListArtifactsResponse, ReportArtifactsRequest, ReportArtifactsResponse,
    ResolveSourcesRequest, ResolveSourcesResponse, Source,
};
use service_runtime::{
    telemetry::{LogFormat, Options},
    tls::ServerFiles,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub use self::model_engine::{EngineObserver, ModelEngine, Outcome, Plan, build_name, image_id};
use crate::{
    config::Config,
    outbox::{Limits, Settings},
    remote_context::RemoteContexts,
    service_client::{Chunks, Responses, ServiceClient, ServiceError},
    spool::{Spool, SpoolFile},
    surroundings::{Spawn, Surroundings as Parts},
    worker::Worker,
};

mod model_engine;

/// The environment of a worker.
pub trait Surroundings: Debug + Send + Sync {
    /// Runs a task of the worker's process.
    fn spawn(&self, task: BoxFuture<'static, ()>);

    /// Connects to the service: sends the messages from `requests` and returns the answers.
    ///
    /// # Errors
    ///
    /// Returns the status with which the call fails, such as `UNAVAILABLE` if the service cannot be reached.
    fn connect(&self, requests: mpsc::Receiver<ConnectRequest>) -> BoxFuture<'_, Result<Answers, Status>>;

    /// Reports whether the next write to the spool is torn: half of it is written, and it fails.
    fn is_write_torn(&self) -> bool;
}

/// The messages of the service over one connection.
pub type Answers = BoxStream<'static, Result<ConnectResponse, Status>>;

/// The process of a worker.
///
/// It keeps few of a build's reports in memory, so that its spool is used.
#[derive(Debug)]
pub struct Process(Worker);

impl Process {
    /// Creates a process that has not started to work.
    pub fn new(
        name: &str,
        slots: u16,
        labels: Vec<(String, String)>,
        engine: &ModelEngine,
        surroundings: Arc<dyn Surroundings>,
    ) -> Self {
        let config = Config {
            server: String::new(),
            token_file: PathBuf::new(),
            name: name.to_owned(),
            slots,
            labels,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            docker_host: String::new(),
            docker_config: None,
            allow_source: vec!["*".to_owned()],
            allow_local: Vec::new(),
            allow_add: Vec::new(),
            allow_frontend: Vec::new(),
            allow_remote: Vec::new(),
            cgroup_parent: String::new(),
            compression: None,
            allow_old_engine: false,
            engine_has_fix: Vec::new(),
            image_dir: None,
            log_limit: 1024 * 1024,
            spool_dir: None,
            spool_limit: 0,
            collect_every: Duration::from_secs(3_600),
            keep_bases: Duration::from_secs(3_600),
            drain_grace: Duration::from_secs(10),
            server_ca: None,
            allow_plaintext: false,
            tls: ServerFiles::default(),
            min_free_disk: 0,
            secrets_dir: None,
            telemetry: Options { otlp_endpoint: None, otlp_ca: None, log_format: LogFormat::Human },
        };
        let surroundings = SharedSurroundings(surroundings);
        let mut outbox = Settings::new(Arc::new(surroundings.clone()), 0);
        outbox.limits = Limits { window: 256, batch: 128, newest: 256, spool: 4_096 };
        let parts = Parts {
            engine: Arc::new(engine.clone()),
            is_local: false,
            outbox,
            remotes: RemoteContexts::none(),
            service: Arc::new(surroundings.clone()),
            spawn: Arc::new(surroundings),
        };
        let info = ModelEngine::info();
        Self(Worker::new(config, info, parts))
    }

    /// Works until `shutdown`, and then drains.
    pub async fn work(self, shutdown: CancellationToken) {
        self.0.run(shutdown).await;
    }
}

#[derive(Clone, Debug)]
struct SharedSurroundings(Arc<dyn Surroundings>);

impl Spawn for SharedSurroundings {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.0.spawn(task);
    }
}

impl ServiceClient for SharedSurroundings {
    fn connect(
        &self,
        requests: mpsc::Receiver<ConnectRequest>,
    ) -> BoxFuture<'_, Result<Responses, ServiceError>> {
        let refused = |status| ServiceError::Refused(Box::new(status));
        async move {
            let answers = self.0.connect(requests).await.map_err(refused)?;
            Ok(answers.map_err(refused).boxed())
        }
        .boxed()
    }

    fn find_unused_images(
        &self,
        _request: FindUnusedImagesRequest,
    ) -> BoxFuture<'_, Result<FindUnusedImagesResponse, ServiceError>> {
        async { Ok(FindUnusedImagesResponse::default()) }.boxed()
    }

    fn list_artifacts(
        &self,
        _request: ListArtifactsRequest,
    ) -> BoxFuture<'_, Result<ListArtifactsResponse, ServiceError>> {
        async { Ok(ListArtifactsResponse::default()) }.boxed()
    }

    fn report_artifacts(
        &self,
        _request: ReportArtifactsRequest,
    ) -> BoxFuture<'_, Result<ReportArtifactsResponse, ServiceError>> {
        async { Ok(ReportArtifactsResponse {}) }.boxed()
    }

    fn resolve_sources(
        &self,
        request: ResolveSourcesRequest,
    ) -> BoxFuture<'_, Result<ResolveSourcesResponse, ServiceError>> {
        // Builds of simulations name no images.
        let sources = vec![Source::default(); request.references.len()];
        async { Ok(ResolveSourcesResponse { sources }) }.boxed()
    }

    fn fetch_context(&self, _attempt: Attempt) -> BoxFuture<'_, Result<Chunks, ServiceError>> {
        let refused = Status::unimplemented("builds of simulations have small contexts");
        async move { Err(ServiceError::Refused(Box::new(refused))) }.boxed()
    }
}

impl Spool for SharedSurroundings {
    fn create(&self) -> BoxFuture<'_, io::Result<Box<dyn SpoolFile>>> {
        let file = ModelFile { surroundings: self.clone(), content: Mutex::default() };
        async move { Ok(Box::new(file) as Box<dyn SpoolFile>) }.boxed()
    }
}

#[derive(Debug)]
struct ModelFile {
    surroundings: SharedSurroundings,
    content: Mutex<Vec<u8>>,
}

impl SpoolFile for ModelFile {
    fn write(&self, offset: u64, bytes: Vec<u8>) -> BoxFuture<'_, io::Result<()>> {
        async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let is_torn = self.surroundings.0.is_write_torn();
            let offset = usize::try_from(offset).map_err(io::Error::other)?;
            let whole = if is_torn { &bytes[..bytes.len() / 2] } else { &bytes };
            let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
            let end = offset + whole.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[offset..end].copy_from_slice(whole);
            if is_torn { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
        .boxed()
    }

    fn read(&self, offset: u64, length: usize) -> BoxFuture<'_, io::Result<Vec<u8>>> {
        async move {
            let offset = usize::try_from(offset).map_err(io::Error::other)?;
            let content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
            content
                .get(offset..offset + length)
                .map(<[u8]>::to_vec)
                .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        }
        .boxed()
    }
}
