//! Build worker of Trailer Images: takes builds from image-service and runs them on a Docker Engine.
//!
//! `service_client` calls the service, `session` holds the connection, `worker` the attempts of the
//! connection, and `job` is one attempt at a build. `context_download` fetches its `context`, from the
//! service or as a `remote_context` through `egress`, and `build_sources` decides which images it may use, by
//! the service's word and `source_rules`, for what its `dockerfile` names. `engine` is the interface to an
//! engine and `docker` the real one, with `registry_credentials`; `engine_support` lists the supported
//! versions, and `fault` attributes their errors. `output` turns progress into events, and `outbox` keeps
//! them until they are durable, with a `spool` for events that memory cannot hold. `lease` decides when all
//! work has to stop, `job::stop` stops a build and reaps what is left, `step_processes` observes and kills
//! the processes of steps, `stale_tags` removes the tags of a killed worker, and `image_gc` the images that
//! nothing needs any more. `artifact_audit` reports artifacts that someone has removed by hand. `simulation`
//! surrounds the worker with models.
//!
//! Invariants:
//! - A build runs under a tag of its attempt; the image's own tag is set after the service has granted it.
//! - An event leaves the outbox when the service has acknowledged it, not when it was sent.
//! - Unacknowledged events are in memory up to a limit, then on disk up to a limit; then the engine is not
//!   read any further.
//! - The engine uses no image, file or repository for a build that was not decided about, see
//!   `docker::source_policy`.
//! - A remote context comes from public addresses, or from those that the operator allows, and is fetched
//!   anew by each attempt, see `egress` and `remote_context`.
//! - Steps of two trust domains share neither results nor cache mounts, see `step_processes`.
//! - A cancel is confirmed after the engine's response has ended and no process of the build is left.
//! - While anything continues whose stop was requested, nothing starts.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustix::process::{Resource, Rlimit, setrlimit};
use service_runtime::{
    call_limits::{CallLimitsLayer, CallRefusal},
    listener::Incoming,
    tls::ServerTls,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::util::MapResponseLayer;
use tower_http::catch_panic::CatchPanicLayer;

pub use self::config::{Cli, Command, Config};
use self::{
    docker::DockerEngine,
    engine::{Engine, EngineInfo},
    health::Health,
    outbox::Settings,
    registry_credentials::DockerConfig,
    remote_context::RemoteContexts,
    service_client::GrpcServiceClient,
    spool::{DiskSpool, Spool},
    surroundings::{Surroundings, TokioSpawn},
    worker::Worker,
};

mod artifact_audit;
mod artifact_name;
mod base_images;
mod build_files;
mod build_sources;
mod config;
mod context;
mod context_archive;
mod context_download;
mod context_preparation;
mod context_writer;
mod docker;
mod dockerfile;
mod dockerignore;
mod egress;
mod engine;
mod engine_monitor;
mod engine_support;
mod fault;
mod health;
mod image_gc;
mod job;
mod jobs;
mod labels;
mod lease;
mod locks;
mod outbox;
mod output;
mod readiness;
mod reference;
mod registry_credentials;
mod remote_context;
mod secrets;
mod service_client;
mod session;
#[cfg(feature = "simulation")]
pub mod simulation;
mod source_rules;
mod spool;
mod stale_tags;
mod step_processes;
mod steps;
mod surroundings;
mod telemetry;
mod trust_domain;
mod worker;

/// Name of the program in its logs and telemetry.
pub const PROGRAM: &str = "build-worker";

/// A worker that listens for health checks and takes no builds yet.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    engine: DockerEngine,
    spool: Arc<dyn Spool>,
    service: GrpcServiceClient,
    tls: Option<ServerTls>,
    listener: TcpListener,
}

/// The reason why a worker cannot run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// An invalid configuration.
    #[error("{0}")]
    Config(String),
    /// A failure of the listener.
    #[error("cannot listen")]
    Listen(#[from] io::Error),
    /// A failure to serve health checks.
    #[error("cannot serve health checks")]
    Serve(#[from] tonic::transport::Error),
    /// An invalid descriptor set.
    #[error("cannot describe the services")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Keeps the system from writing the memory of this process and its children, which may hold secrets, to disk.
pub fn forbid_core_dumps() {
    // Unlike 0, which the kernel ignores where a program takes the dumps, 1 keeps them from programs, too.
    let limit = Some(1);
    let limit = Rlimit { current: limit, maximum: limit };
    if let Err(error) = setrlimit(Resource::Core, limit) {
        tracing::warn!(%error, "cannot forbid core dumps");
    }
}

/// Checks the configuration and binds the port. The engine and the service may start later.
///
/// # Errors
///
/// Returns [`WorkerError::Config`] if a flag or a file that it names is invalid, and [`WorkerError::Listen`]
/// if the port cannot be bound.
pub fn bind(config: Config) -> Result<Bound, WorkerError> {
    config.check().map_err(WorkerError::Config)?;
    let tls = ServerTls::open(&config.tls).map_err(|error| WorkerError::Config(format!("TLS: {error:#}")))?;
    let service = GrpcServiceClient::new(&config);
    service
        .endpoint()
        .map_err(|error| WorkerError::Config(format!("--server {}: {error:#}", config.server)))?;
    std::fs::read(&config.token_file).map_err(|error| {
        WorkerError::Config(format!("--token-file {}: {error}", config.token_file.display()))
    })?;
    let engine = DockerEngine::new(&config.docker_host, DockerConfig::new(config.docker_config()))
        .map_err(|error| WorkerError::Config(error.to_string()))?;
    let spool_dir = config.spool_dir();
    let spool = DiskSpool::open(spool_dir.clone())
        .map_err(|error| WorkerError::Config(format!("--spool-dir {}: {error}", spool_dir.display())))?;
    let listener = service_runtime::listener::listen(config.listen)?;
    Ok(Bound { config, engine, spool: Arc::new(spool), service, tls, listener })
}

impl Bound {
    const ENGINE_POLL: Duration = Duration::from_secs(1);

    /// Returns the address that serves health checks.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error if it does not know the address of the socket.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Takes builds until `shutdown`, and then finishes or hands back the running ones.
    ///
    /// # Errors
    ///
    /// Returns [`WorkerError::Reflection`] or [`WorkerError::Serve`] if reflection or health checks cannot be
    /// served.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        /// Maximum size of a message of health checks and reflection, in bytes. Anyone may send them.
        const MAX_REQUEST: usize = 4 * 1024;
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", ServingStatus::NotServing).await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let reflection_alpha = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let worker_ended = CancellationToken::new();
        let serving = service_runtime::listener::server()
            .layer(CallLimitsLayer {
                is_request_stream: |path| path.starts_with("/grpc.reflection."),
                is_reserved_for: |path| path.starts_with("/grpc.health."),
                status: refused_call,
            })
            .layer(MapResponseLayer::new(map_decode_error))
            .layer(CatchPanicLayer::new())
            .add_service(health.max_decoding_message_size(MAX_REQUEST))
            .add_service(reflection.build_v1()?.max_decoding_message_size(MAX_REQUEST))
            .add_service(reflection_alpha.build_v1alpha()?.max_decoding_message_size(MAX_REQUEST))
            .serve_with_incoming_shutdown(
                Incoming::new(self.listener, self.tls.as_ref().map(ServerTls::current)),
                worker_ended.clone().cancelled_owned(),
            );
        let keeping_fresh = async {
            match self.tls {
                Some(tls) => tls.keep_fresh(worker_ended.clone()).await,
                None => worker_ended.cancelled().await,
            }
        };
        let working = async {
            let working = async {
                work(self.config, self.engine, self.spool, self.service, &reporter, shutdown).await;
                worker_ended.cancel();
            };
            tokio::join!(working, keeping_fresh);
        };
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => served?,
            // Clients that watch the health of a worker have nothing more to see once it has ended.
            () = working => {}
        }
        Ok(())
    }
}

async fn work(
    config: Config,
    engine: DockerEngine,
    spool: Arc<dyn Spool>,
    service: GrpcServiceClient,
    reporter: &HealthReporter,
    shutdown: CancellationToken,
) {
    let info = tokio::select! {
        () = shutdown.cancelled() => return,
        info = engine_info(&engine) => info,
    };
    tracing::info!(
        engine_version = info.version,
        has_containerd_store = info.has_containerd_store,
        "the Docker Engine responds"
    );
    if let Some(warning) = config.exceptions().warning() {
        tracing::warn!("{warning}");
    }
    let is_local = engine.is_local();
    let engine: Arc<dyn Engine> = Arc::new(engine);
    let health = Health {
        engine: Arc::clone(&engine),
        spool: config.spool_dir(),
        images: config.image_dir.clone(),
        is_local,
        min_free: config.min_free_disk,
        reporter: reporter.clone(),
    };
    let surroundings = Surroundings {
        is_local,
        engine,
        outbox: Settings::new(spool, config.spool_limit),
        remotes: RemoteContexts::open(config.spool_dir(), config.egress_rules()).await,
        service: Arc::new(service),
        spawn: Arc::new(TokioSpawn),
    };
    let worker = Worker::new(config, info, surroundings);
    let draining = async {
        shutdown.run_until_cancelled(health.watch(&worker.readiness)).await;
        reporter.set_service_status("", ServingStatus::NotServing).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = worker.run(shutdown.clone()) => {}
        () = draining => {}
    }
}

/// Maps the error of a request that cannot be decoded to `INVALID_ARGUMENT`; tonic reports it as the
/// server's.
fn map_decode_error<B>(response: http::Response<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match Status::from_header_map(response.headers()) {
        Some(found) if matches!(found.code(), Code::Internal | Code::OutOfRange) => {
            Status::invalid_argument("the request is not a message of the method's request type").into_http()
        }
        Some(_) | None => response.map(Body::new),
    }
}

/// Returns the status of a call that is refused before it is handled.
fn refused_call(refusal: CallRefusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        CallRefusal::TooManyConnections => Status::unavailable(message),
        CallRefusal::TooManyCalls => Status::resource_exhausted(message),
        CallRefusal::HeadersTooLarge => Status::invalid_argument(message),
        CallRefusal::RequestIncomplete => Status::deadline_exceeded(message),
    }
}

/// Waits until the engine responds, and returns its description.
async fn engine_info(engine: &dyn Engine) -> EngineInfo {
    let mut is_first = true;
    loop {
        match engine.info().await {
            Ok(info) => return info,
            Err(error) if is_first => {
                tracing::warn!(%error, "the Docker Engine does not respond; waiting for it")
            }
            Err(_) => {}
        }
        is_first = false;
        tokio::time::sleep(Bound::ENGINE_POLL).await;
    }
}
