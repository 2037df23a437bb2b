//! The catalogue of Trailer Images: records and builds, dispatch to workers, and watching.
//!
//! The way down is one way: `grpc` (parse, call, convert) calls the operations (`catalog`, `preview`, `contexts`, `queue`,
//! `session`, `feed`, `history`), which authorise, read from `index`, write through `store` and announce through `signals`; `workers` knows who
//! is connected, and `upkeep` hears other replicas and forgets what is old. `index` holds every image in memory and follows the
//! change log. `writer` lets the writes of `store` share transactions. All rest on the nouns (`image`, `build`, `change`, `context`,
//! `access`, `search`, `request`, `dispatch`, `hint`, `error`, `timestamp`, `turns`), which know no framework. Three of the nouns decide: `build::transition` is the table of a build's states, `image::actions` that of
//! what can be done with an image, and `dispatch::decide` says what every event writes and sends. `simulation` is the queue over
//! tables in memory.
//!
//! Invariants:
//! - The row is the queue: no job, state or lease lives in memory only.
//! - Messages go out after the commit that they rest on.
//! - A revision is taken in the transaction of its change, so the order of revisions is the order of commits.
//! - A read is never stale: it sees everything that was committed before it began, or ends UNAVAILABLE.
//! - Hints wake readers, rows are the truth, and a slow poll lies under every hint.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use edge::tls::ServerTls;
use tokio::{
    net::TcpListener,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

pub use self::{
    access::Role,
    config::{Cli, Command, Config, TokenArgs},
    data_dir::LockError,
    token::{JwksSource, MintError, TokenKeys},
};
use self::{
    catalog::Catalog,
    contexts::Contexts,
    data_dir::DataDirLock,
    dispatch::Policy,
    feed::Feed,
    grpc::{CallerLimits, Callers, Operations, Readiness, Serving},
    history::Histories,
    image::{Quotas, RepositoryPrefixes},
    index::Index,
    queue::{Queue, Times},
    signals::Signals,
    store::Store,
    token::{Requirements, Verifier},
    upkeep::Retention,
};

mod access;
mod build;
mod catalog;
mod change;
mod config;
mod context;
mod contexts;
mod data_dir;
mod dispatch;
mod error;
mod feed;
mod grpc;
mod hint;
mod history;
mod image;
mod index;
mod preview;
mod queue;
mod request;
mod search;
mod session;
mod signals;
#[cfg(feature = "simulation")]
pub mod simulation;
mod store;
mod timestamp;
mod token;
mod turns;
mod upkeep;
mod workers;
mod writer;

/// How the program names itself in what it tells.
pub const PROGRAM: &str = "image-service";

/// A service that listens and does not serve yet: connections wait.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    prefixes: RepositoryPrefixes,
    verifier: Arc<Verifier>,
    store: Store,
    /// Dropped when the service has ended, as the last of all.
    lock: Option<DataDirLock>,
    tls: Option<ServerTls>,
    listener: TcpListener,
}

/// Checks the configuration, gets the keys that tokens are verified with, locks the data directory if the catalogue is in it,
/// opens the database, and binds the port, in this order.
pub async fn bind(config: Config) -> Result<Bound, ServeError> {
    config.check().map_err(ServeError::Config)?;
    let prefixes = RepositoryPrefixes::parse(&config.repository_prefixes).map_err(ServeError::Config)?;
    let tls = ServerTls::open(&config.tls).map_err(|error| ServeError::Config(format!("TLS: {error:#}")))?;
    let verifier = Arc::new(verifier(&config).await?);
    // With Postgres the directory holds the key pair at most, which replicas may share.
    let lock = match config.database_url {
        None => Some(DataDirLock::acquire(&config.data_dir)?),
        Some(_) => None,
    };
    let any_of_zero = |limit: u64| (limit > 0).then_some(limit);
    let policy = Policy {
        lease: config.lease,
        stop_deadline: config.stop_within,
        offline_after: config.offline_after,
        queue_timeout: config.queue_timeout,
        max_failures: i32::from(config.max_attempt_failures),
        retry_backoff: config.retry_backoff,
        max_pending: any_of_zero(config.max_pending_builds),
    };
    let quotas = Quotas {
        index_memory: config.index_memory,
        images: any_of_zero(config.max_images),
        bytes: any_of_zero(config.max_image_bytes),
    };
    let url = config.database_url.as_deref();
    let store = Store::open(&config.data_dir, url, policy).await.map_err(database)?.with_quotas(quotas);
    let listener = TcpListener::bind(config.listen).await.map_err(ServeError::Listen)?;
    Ok(Bound { config, prefixes, verifier, store, lock, tls, listener })
}

/// With a JWKS the data directory's key pair is neither trusted nor made.
async fn verifier(config: &Config) -> Result<Verifier, ServeError> {
    let verifier = match &config.jwks {
        None => Verifier::of_key_pair(&TokenKeys::open(&config.data_dir).map_err(ServeError::DataDir)?),
        Some(source) => {
            token::make_data_dir(&config.data_dir).map_err(ServeError::DataDir)?;
            let requirements = Requirements {
                issuer: config.issuer.clone(),
                audience: config.audience.clone(),
                roles_claim: config.roles_claim.clone(),
            };
            Verifier::of_jwks(source.clone(), config.jwks_refresh, requirements)
                .await
                .map_err(|error| ServeError::Jwks(source.clone(), error.into()))?
        }
    };
    if !config.anonymous {
        return Ok(verifier);
    }
    tracing::warn!("whoever reaches the port of this machine can create images: --anonymous");
    Ok(verifier.with_anonymous())
}

impl Bound {
    /// How long the streams may take to end by themselves once a shutdown has been asked for and the grace is over.
    const LAST_WORDS: Duration = Duration::from_secs(1);

    /// The address that it listens on.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`: then streams end with UNAVAILABLE and unary calls finish, within the grace.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let Self { config, prefixes, verifier, store, lock: _lock, tls, listener } = self;
        let signals = Arc::new(Signals::default());
        let times = Times { heartbeat: config.heartbeat, stop_after: config.stop_after };
        let queue =
            Arc::new(Queue::new(Arc::new(store.clone()), Arc::clone(&signals), times, store.history()));
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
            history: store.history(),
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
        tasks.spawn(upkeep::hear(store.clone(), Arc::clone(&signals), shutdown.clone()));
        tasks.spawn(upkeep::forget(store.clone(), retain, shutdown.clone()));
        tasks.spawn(index.clone().run(Arc::clone(&signals), shutdown.clone()));
        tasks.spawn({
            let shutdown = shutdown.clone();
            async move { verifier.keep_fresh(shutdown).await }
        });

        tasks.spawn(upkeep::trim(
            store.clone(),
            Arc::clone(&signals),
            config.retain_builds.into(),
            shutdown.clone(),
        ));
        tasks.spawn(upkeep::measure(store.clone(), shutdown.clone()));
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
                store_answers: upkeep::ask(&mut tasks, &store, &shutdown),
                catalogue_ready: index.serves(),
            },
        };
        if let Some(tls) = tls {
            tasks.spawn(tls.keep_fresh(shutdown.clone()));
        }

        let grace = config.drain_grace + Self::LAST_WORDS;
        // On the heap: whoever runs this moves it.
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
        // What waits for a database that is away waits no longer.
        match tokio::time::timeout(Self::LAST_WORDS, ended).await {
            Ok(closed) => closed.map_err(database)?,
            Err(_) => tracing::warn!("something still waited for the database at the end"),
        }
        served
    }
}

/// Why the service cannot serve, or serves no more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Flags that are wrong, or do not fit each other.
    #[error("{0}")]
    Config(String),
    /// The data directory.
    #[error("cannot use the data directory")]
    DataDir(#[source] io::Error),
    /// Another process serves from the data directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The keys that tokens are verified with.
    #[error("cannot load the JWKS {0}")]
    Jwks(JwksSource, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The database.
    #[error("cannot use the database")]
    Database(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The port.
    #[error("cannot listen")]
    Listen(#[source] io::Error),
    /// The listener or a connection.
    #[error("cannot serve")]
    Transport(#[from] tonic::transport::Error),
    /// The descriptor set.
    #[error("cannot describe the services")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The methods in the descriptor set.
    #[error("cannot tell the methods apart")]
    Methods(#[from] prost::DecodeError),
    /// The task that writes to the database.
    #[error("the task that writes to the database has panicked")]
    WriterEnded,
    /// A task without which the service is of no use.
    #[error("a task of the service panicked")]
    Panicked(#[source] JoinError),
}

fn database(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ServeError {
    ServeError::Database(error.into())
}

/// Waits until a task panics. They end by themselves on shutdown, which is no news.
async fn first_panic(tasks: &mut JoinSet<()>) -> JoinError {
    loop {
        match tasks.join_next().await {
            Some(Err(panicked)) => return panicked,
            Some(Ok(())) => {}
            None => std::future::pending().await,
        }
    }
}

/// Awaits the server; once shutdown was asked for, no longer than the grace.
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
            tracing::warn!("connections were still open when the grace was over");
            Ok(())
        }
    }
}
