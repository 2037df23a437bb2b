//! The catalogue of Trailer Images: records and builds, dispatch to workers, and watching.
//!
//! Dependencies point in one direction: `grpc` (parse, call, convert) calls the operations (`catalog`,
//! `preview`, `context_transfer`, `queue`, `worker_session`, `feed`, `build_watch`), which authorise, read
//! from `index`, write through `store` and announce through `signals`. `worker_registry` tracks the connected
//! workers; `background` relays the hints of other replicas and removes old data. `index` holds every image
//! in memory and follows the change log. `writer` lets the writes of `store` share transactions. All of them
//! build on the nouns (`image`, `build`, `change`, `build_context`, `access`, `search`, `request`,
//! `dispatch`, `hint`, `error`, `timestamp`, `turns`), which depend on no framework. Three of the nouns make
//! decisions: `build::transition` is the table of a build's states, `image::actions` is the table of what can
//! be done with an image, and `dispatch::decide` decides what every event writes and sends. `simulation` is
//! the queue over in-memory tables.
//!
//! Invariants:
//! - The row is the queue: no job, state or lease exists in memory only.
//! - Messages are sent after the commit that they depend on.
//! - A revision is allocated in the transaction of its change, so the order of revisions is the order of
//!   commits.
//! - Reads are never stale: a read sees everything that was committed before it began, or fails with
//!   UNAVAILABLE.
//! - Hints wake readers; the rows are authoritative, and a slow poll backs every hint.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use service_runtime::tls::ServerTls;
use tokio::{
    net::TcpListener,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

pub use self::{
    access::Role,
    config::{Cli, Command, Config, TokenArgs},
    data_dir::LockError,
    jwt::{JwksSource, MintError, TokenKeys},
};
use self::{
    background::Retention,
    build_watch::Histories,
    catalog::Catalog,
    context_transfer::Contexts,
    data_dir::DataDirLock,
    dispatch::Policy,
    feed::Feed,
    grpc::{CallerLimits, Callers, Operations, Readiness, Serving},
    image::{Quotas, RepositoryPrefixes},
    index::Index,
    jwt::{Requirements, Verifier},
    queue::{Queue, Times},
    signals::Signals,
    store::Store,
};

mod access;
mod background;
mod build;
mod build_context;
mod build_watch;
mod catalog;
mod change;
mod config;
mod context_transfer;
mod data_dir;
mod dispatch;
mod error;
mod fair_semaphore;
mod feed;
mod grpc;
mod hint;
mod image;
mod index;
mod jwt;
mod preview;
mod queue;
mod request;
mod search;
mod signals;
#[cfg(feature = "simulation")]
pub mod simulation;
mod store;
mod timestamp;
mod turns;
mod worker_registry;
mod worker_session;
mod writer;

/// Name of the program in its logs, metrics and traces.
pub const PROGRAM: &str = "image-service";

/// A service whose port is bound and that does not serve yet, so connections wait in the backlog.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    prefixes: RepositoryPrefixes,
    verifier: Arc<Verifier>,
    store: Store,
    /// Lock of the data directory, released last when the service has ended.
    lock: Option<DataDirLock>,
    tls: Option<ServerTls>,
    listener: TcpListener,
}

/// Prepares the service and binds its port.
///
/// Checks the configuration, loads the keys that verify tokens, locks the data directory if the catalogue is
/// in it, opens the database, and binds the port, in this order.
///
/// # Errors
///
/// Returns the [`ServeError`] of the first step that fails.
pub async fn bind(config: Config) -> Result<Bound, ServeError> {
    config.check().map_err(ServeError::Config)?;
    let prefixes = RepositoryPrefixes::parse(&config.repository_prefixes).map_err(ServeError::Config)?;
    let tls = ServerTls::open(&config.tls).map_err(|error| ServeError::Config(format!("TLS: {error:#}")))?;
    let verifier = Arc::new(verifier(&config).await?);
    // With Postgres the directory holds at most the key pair, which replicas may share.
    let lock = match config.database_url {
        None => Some(DataDirLock::acquire(&config.data_dir)?),
        Some(_) => None,
    };
    let any_of_zero = |limit: u64| (limit > 0).then_some(limit);
    let policy = Policy {
        lease: config.lease,
        stop_timeout: config.stop_timeout,
        offline_after: config.offline_after,
        queue_timeout: config.queue_timeout,
        max_build_time: config.max_build_time,
        max_failures: i32::from(config.max_attempt_failures),
        retry_backoff: config.retry_backoff,
        max_pending: any_of_zero(config.max_pending_builds),
        max_running: any_of_zero(config.max_running_builds),
        max_history_bytes: i64::try_from(config.max_log_bytes).unwrap_or(i64::MAX),
    };
    let quotas = Quotas {
        index_memory: config.index_memory,
        images: any_of_zero(config.max_images),
        bytes: any_of_zero(config.max_image_bytes),
        context_bytes: any_of_zero(config.max_context_bytes),
    };
    let url = config.database_url.as_deref();
    let store = Store::open(&config.data_dir, url, policy).await.map_err(database)?;
    let store = store.with_quotas(quotas).with_min_free_disk(config.min_free_disk);
    let listener = service_runtime::listener::listen(config.listen).map_err(ServeError::Listen)?;
    Ok(Bound { config, prefixes, verifier, store, lock, tls, listener })
}

/// Creates the verifier of tokens. With a JWKS, the key pair of the data directory is neither trusted nor
/// created.
async fn verifier(config: &Config) -> Result<Verifier, ServeError> {
    let verifier = match &config.jwks {
        None => Verifier::of_key_pair(&TokenKeys::open(&config.data_dir).map_err(ServeError::DataDir)?),
        Some(source) => {
            jwt::make_data_dir(&config.data_dir).map_err(ServeError::DataDir)?;
            let requirements = Requirements {
                issuer: config.issuer.clone(),
                audience: config.audience.clone(),
                roles_claim: config.roles_claim.clone(),
                groups_claim: config.groups_claim.clone(),
                pools_claim: config.pools_claim.clone(),
            };
            Verifier::of_jwks(source.clone(), config.jwks_refresh, requirements)
                .await
                .map_err(|error| ServeError::Jwks(source.clone(), error.into()))?
        }
    };
    if !config.anonymous {
        return Ok(verifier);
    }
    tracing::warn!("anyone who can reach this port can create images: --anonymous");
    Ok(verifier.with_anonymous())
}

impl Bound {
    /// Time that streams have to end by themselves after a shutdown was requested and the grace period is
    /// over.
    const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

    /// Returns the address that the service listens on.
    ///
    /// # Errors
    ///
    /// Returns the error of the operating system if it cannot report the address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`.
    ///
    /// Then streams end with UNAVAILABLE, and unary calls have the grace period to finish.
    ///
    /// # Errors
    ///
    /// Returns a [`ServeError`] if the database or the listener fails, or if a task panics that the service
    /// depends on.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let Self { config, prefixes, verifier, store, lock: _lock, tls, listener } = self;
        let signals = Arc::new(Signals::default());
        let times = Times { heartbeat: config.heartbeat, stop_after: config.stop_after };
        let queue =
            Arc::new(Queue::new(Arc::new(store.clone()), Arc::clone(&signals), times, store.catalogue_id()));
        queue.begin().await.map_err(database)?;
        let index = Index::new(store.clone());
        let feed = Feed::new(store.clone(), index.clone(), shutdown.clone());
        let operations = Operations {
            catalog: Catalog::new(
                store.clone(),
                index.clone(),
                Arc::clone(&signals),
                Arc::clone(&queue),
                prefixes,
            ),
            contexts: Contexts::new(store.clone(), config.context_limit, config.retain_contexts),
            feed,
            histories: Histories::new(store.clone(), index.clone(), Arc::clone(&signals), shutdown.clone()),
            queue: Arc::clone(&queue),
            verifier: Arc::clone(&verifier),
            catalogue_id: store.catalogue_id(),
        };

        let retain = Retention { changes: config.retain_changes, contexts: config.retain_contexts };

        let mut tasks = JoinSet::new();
        tasks.spawn({
            let (queue, shutdown) = (Arc::clone(&queue), shutdown.clone());
            async move { queue.decide(shutdown).await }
        });
        tasks.spawn({
            let (queue, shutdown) = (Arc::clone(&queue), shutdown.clone());
            async move { queue.dispatch(shutdown).await }
        });
        tasks.spawn({
            let (queue, shutdown) = (queue, shutdown.clone());
            async move { queue.clock(shutdown).await }
        });
        tasks.spawn(background::relay_hints(store.clone(), Arc::clone(&signals), shutdown.clone()));
        tasks.spawn(background::purge_expired(store.clone(), retain, shutdown.clone()));
        tasks.spawn(index.clone().run(Arc::clone(&signals), shutdown.clone()));
        tasks.spawn(index.clone().probe_revisions(shutdown.clone()));
        tasks.spawn({
            let shutdown = shutdown.clone();
            async move { verifier.keep_fresh(shutdown).await }
        });

        tasks.spawn(background::prune_builds(
            store.clone(),
            Arc::clone(&signals),
            config.retain_builds.into(),
            shutdown.clone(),
        ));
        tasks.spawn(background::record_queue_metrics(store.clone(), shutdown.clone()));
        tasks.spawn(background::probe_storage(store.clone(), shutdown.clone()));
        let limits = CallerLimits {
            call_rate: config.max_call_rate,
            calls: config.max_calls,
            streams: config.max_streams,
        };
        let serving = Serving {
            listener,
            tls: tls.as_ref().map(ServerTls::current),
            callers: Callers::new(limits),
            readiness: Readiness {
                store_answers: background::probe_database(&mut tasks, &store, &shutdown),
                storage_full: store.storage_full(),
                catalogue_ready: index.serves(),
            },
        };
        if let Some(tls) = tls {
            tasks.spawn(tls.keep_fresh(shutdown.clone()));
        }

        let grace = config.drain_grace + Self::CLOSE_TIMEOUT;
        // Boxed, because callers move this future.
        let serving = Box::pin(grpc::serve(operations, serving, shutdown.clone()));
        let served = tokio::select! {
            served = within_grace(serving, &shutdown, grace) => served,
            panicked = first_panic(&mut tasks) => Err(ServeError::Panicked(panicked)),
            () = store.writer_ended() => Err(ServeError::WriterEnded),
        };
        shutdown.cancel();
        let ended = async {
            while tasks.join_next().await.is_some() {}
            store.close().await
        };
        // Tasks that are blocked on an unreachable database are abandoned.
        match tokio::time::timeout(Self::CLOSE_TIMEOUT, ended).await {
            Ok(closed) => closed.map_err(database)?,
            Err(_) => tracing::warn!("a task was still waiting for the database at shutdown"),
        }
        served
    }
}

/// Reason why the service cannot start or has stopped serving.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Flags that are invalid or conflict with each other.
    #[error("{0}")]
    Config(String),
    /// Failure to use the data directory.
    #[error("cannot use the data directory")]
    DataDir(#[source] io::Error),
    /// Data directory that another process serves from.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Failure to load the keys that verify tokens.
    #[error("cannot load the JWKS {0}")]
    Jwks(JwksSource, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// Failure of the database.
    #[error("cannot use the database")]
    Database(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Failure to bind the port.
    #[error("cannot listen")]
    Listen(#[source] io::Error),
    /// Failure of the listener or of a connection.
    #[error("cannot serve")]
    Transport(#[from] tonic::transport::Error),
    /// Failure to read the descriptor set for reflection.
    #[error("cannot describe the services")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Failure to read the methods from the descriptor set.
    #[error("cannot read the descriptors of the methods")]
    Methods(#[from] prost::DecodeError),
    /// Panic of the task that writes to the database.
    #[error("the task that writes to the database has panicked")]
    WriterEnded,
    /// Panic of a task that the service depends on.
    #[error("a task of the service panicked")]
    Panicked(#[source] JoinError),
}

fn database(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ServeError {
    ServeError::Database(error.into())
}

/// Waits until a task panics. Tasks that end normally, as they do on shutdown, are ignored.
async fn first_panic(tasks: &mut JoinSet<()>) -> JoinError {
    loop {
        match tasks.join_next().await {
            Some(Err(panicked)) => return panicked,
            Some(Ok(())) => {}
            None => std::future::pending().await,
        }
    }
}

/// Awaits the server, but for no longer than `grace` once a shutdown was requested.
async fn within_grace(
    serve: impl Future<Output = Result<(), ServeError>>,
    shutdown: &CancellationToken,
    grace: Duration,
) -> Result<(), ServeError> {
    let too_late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        served = serve => served,
        () = too_late => {
            tracing::warn!("connections were still open at the end of the grace period");
            Ok(())
        }
    }
}
