//! The build worker of Trailer Images: takes builds from image-service and runs them on a Docker Engine.
//!
//! `dial` reaches the service, `session` holds the connection, `worker` what is held over it, `job` is one attempt at one
//! build; `fetching` gets its `context`; `engine` is what it needs of an engine and `docker` the real one, with credentials
//! from `registries`; `engine_support` says which are built on, and `fault` whose fault an error of theirs is; `output` turns its progress into events, `outbox` keeps them until they are durable, with a `spool` for
//! what is too much for memory, `lease` says when all work has to stop, `step_processes` sees whether it has, `orphans` ends what a
//! killed engine has left behind, and `leftovers` removes what a killed worker has, `collecting` the images that nothing needs
//! any more. `simulation` puts models around all of it.
//!
//! Invariants:
//! - A build runs under a tag of its attempt; the image's own tag is set after the service has granted it.
//! - An event leaves the outbox when the service has acknowledged it, not when it was sent.
//! - What the service has not acknowledged is in memory up to a bound, then on disk up to a bound; then the engine is read
//!   no further.
//! - A cancel is confirmed after the engine's answer has ended and no process of the build is left.
//! - While something goes on that was to stop, nothing is begun.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use edge::{listener::Incoming, tls::ServerTls};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::util::MapResponseLayer;
use tower_http::catch_panic::CatchPanicLayer;

pub use self::config::{Cli, Command, Config};
use self::{
    dial::GrpcDial,
    docker::DockerEngine,
    engine::{Engine, EngineInfo},
    health::Health,
    outbox::Settings,
    registries::Registries,
    spool::{DiskSpool, Spool},
    worker::{Surroundings, TokioSpawn, Worker},
};

mod collecting;
mod config;
mod context;
mod dial;
mod docker;
mod engine;
mod engine_support;
mod engine_watch;
mod fault;
mod fetching;
mod health;
mod job;
mod jobs;
mod labels;
mod lease;
mod leftovers;
mod orphans;
mod outbox;
mod output;
mod readiness;
mod reference;
mod registries;
mod session;
#[cfg(feature = "simulation")]
pub mod simulation;
mod spool;
mod step_processes;
mod steps;
mod telling;
mod worker;

/// How the program names itself in what it tells.
pub const PROGRAM: &str = "build-worker";

/// A worker that listens for health checks and takes no builds yet.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    engine: DockerEngine,
    spool: Arc<dyn Spool>,
    dial: GrpcDial,
    tls: Option<ServerTls>,
    listener: TcpListener,
}

/// Why a worker cannot run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The configuration.
    #[error("{0}")]
    Config(String),
    /// The listener.
    #[error("cannot listen")]
    Listen(#[from] io::Error),
    /// Serving health checks.
    #[error("cannot serve health checks")]
    Serve(#[from] tonic::transport::Error),
    /// The descriptor set.
    #[error("cannot describe the services")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Checks the configuration and binds the port. The engine and the service may come later.
pub async fn bind(config: Config) -> Result<Bound, WorkerError> {
    config.check().map_err(WorkerError::Config)?;
    let tls = ServerTls::open(&config.tls).map_err(|error| WorkerError::Config(format!("TLS: {error:#}")))?;
    let dial = GrpcDial::of(&config);
    dial.endpoint().map_err(|error| WorkerError::Config(format!("--server {}: {error:#}", config.server)))?;
    std::fs::read(&config.token_file).map_err(|error| {
        WorkerError::Config(format!("--token-file {}: {error}", config.token_file.display()))
    })?;
    let engine = DockerEngine::new(&config.docker_host, Registries::of(config.docker_config()))
        .map_err(|error| WorkerError::Config(error.to_string()))?;
    let spool_dir = config.spool_dir();
    let spool = DiskSpool::open(spool_dir.clone())
        .map_err(|error| WorkerError::Config(format!("--spool-dir {}: {error}", spool_dir.display())))?;
    let listener = TcpListener::bind(config.listen).await?;
    Ok(Bound { config, engine, spool: Arc::new(spool), dial, tls, listener })
}

impl Bound {
    const ENGINE_POLL: Duration = Duration::from_secs(1);

    /// The address that answers health checks.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Takes builds until `shutdown`, and then finishes or hands back what runs.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WorkerError> {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", ServingStatus::NotServing).await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let reflection_alpha = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        let worker_ended = CancellationToken::new();
        let serving = edge::listener::server()
            .layer(MapResponseLayer::new(blame))
            .layer(CatchPanicLayer::new())
            .add_service(health)
            .add_service(reflection.build_v1()?)
            .add_service(reflection_alpha.build_v1alpha()?)
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
                work(self.config, self.engine, self.spool, self.dial, &reporter, shutdown).await;
                worker_ended.cancel();
            };
            tokio::join!(working, keeping_fresh);
        };
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => served?,
            // Whoever watches the health of a worker that has ended has nothing more to see.
            () = working => {}
        }
        Ok(())
    }
}

async fn work(
    config: Config,
    engine: DockerEngine,
    spool: Arc<dyn Spool>,
    dial: GrpcDial,
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
        "the Docker Engine answers"
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
        dial: Arc::new(dial),
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

/// Blames the caller for bytes that are no message, for which tonic blames itself.
fn blame<B>(response: http::Response<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match Status::from_header_map(response.headers()) {
        Some(found) if matches!(found.code(), Code::Internal | Code::OutOfRange) => {
            Status::invalid_argument(format!("the request is no such message: {}", found.message()))
                .into_http()
        }
        Some(_) | None => response.map(Body::new),
    }
}

/// Waits until the engine answers.
async fn engine_info(engine: &dyn Engine) -> EngineInfo {
    let mut is_first = true;
    loop {
        match engine.info().await {
            Ok(info) => return info,
            Err(error) if is_first => {
                tracing::warn!(%error, "the Docker Engine does not answer; waiting for it")
            }
            Err(_) => {}
        }
        is_first = false;
        tokio::time::sleep(Bound::ENGINE_POLL).await;
    }
}
