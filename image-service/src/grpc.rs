//! The transport: parse, call, convert. The only place that knows tonic and the generated code.

use std::sync::Arc;

use edge::{listener::Incoming, tls::Current};
use proto::{
    dispatch::dispatch_service_server::DispatchServiceServer,
    images::{
        access_service_server::AccessServiceServer, build_service_server::BuildServiceServer,
        context_service_server::ContextServiceServer, image_service_server::ImageServiceServer,
        worker_service_server::WorkerServiceServer,
    },
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::InterceptorLayer;
use tower::{ServiceBuilder, util::MapResponseLayer};
use tower_http::catch_panic::CatchPanicLayer;

use self::{
    authentication::{Api, Authentication},
    calls::CallsLayer,
};
pub(crate) use self::{
    callers::{CallerLimits, Callers},
    health::Readiness,
};
use crate::{
    ServeError, catalog::Catalog, contexts::Contexts, feed::Feed, history::Histories, queue::Queue,
    token::Verifier,
};

mod access_service;
mod audit;
mod authentication;
mod build;
mod build_service;
mod callers;
mod calls;
mod code;
mod configuration;
mod context_service;
mod cost;
mod cursor;
mod dispatch_service;
mod field;
mod framing;
mod health;
mod image;
mod image_service;
mod listing;
mod page;
mod status;
mod worker_service;
mod write;

#[cfg(feature = "simulation")]
pub(crate) use self::dispatch_service::Connection;

/// What the transport calls.
#[derive(Debug)]
pub(crate) struct Operations {
    pub(crate) catalog: Catalog,
    pub(crate) contexts: Contexts,
    pub(crate) feed: Feed,
    pub(crate) histories: Histories,
    pub(crate) queue: Arc<Queue>,
    pub(crate) verifier: Arc<Verifier>,
    /// Names the history of the database, for what callers may resume.
    pub(crate) history: uuid::Uuid,
}

/// Where and how it is served.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<Current>,
    pub(crate) callers: Callers,
    pub(crate) readiness: Readiness,
}

/// Serves on the listener until `shutdown`, and until every stream has ended then.
pub(crate) async fn serve(
    operations: Operations,
    serving: Serving,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    /// A report of a worker has many lines.
    const MAX_REPORT: usize = 4 * 1024 * 1024;
    /// A configuration has at most a quarter of it.
    const MAX_REQUEST: usize = 1024 * 1024;
    const DESCRIBED: [&[u8]; 3] = [
        proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_types::pb::FILE_DESCRIPTOR_SET,
    ];

    let Serving { listener, tls, callers, readiness } = serving;
    let sessions = TaskTracker::new();
    let health = health::service(readiness, &shutdown, &sessions).await;
    let callers = Arc::new(callers);
    let authentication = |api| {
        let (verifier, callers) = (Arc::clone(&operations.verifier), Arc::clone(&callers));
        InterceptorLayer::new(Authentication::new(verifier, callers, api))
    };
    let (public, dispatch) = (authentication(Api::Public), authentication(Api::Dispatch));
    let (catalog, history) = (operations.catalog, operations.history);
    let images = image_service::Images::new(catalog.clone(), operations.feed, Arc::clone(&callers), history);
    let builds =
        build_service::Builds::new(catalog.clone(), operations.histories, Arc::clone(&callers), history);
    let grants = access_service::Grants::new(catalog.clone(), history);
    let workers = worker_service::AllWorkers::new(catalog.clone(), history);
    let uploads =
        context_service::Uploads::new(operations.contexts.clone(), Arc::clone(&callers), shutdown.clone());
    let dispatcher = dispatch_service::Dispatcher::new(
        operations.queue,
        catalog,
        operations.contexts,
        sessions.clone(),
        shutdown.clone(),
    );
    let reflection = || {
        DESCRIBED.into_iter().fold(tonic_reflection::server::Builder::configure(), |builder, set| {
            builder.register_encoded_file_descriptor_set(set)
        })
    };

    edge::listener::server()
        .layer(CallsLayer::new(&DESCRIBED)?)
        .layer(CatchPanicLayer::custom(framing::panicked))
        .layer(MapResponseLayer::new(framing::explain))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(
            ServiceBuilder::new()
                .layer(public.clone())
                .service(ImageServiceServer::new(images).max_decoding_message_size(MAX_REQUEST)),
        )
        .add_service(
            ServiceBuilder::new()
                .layer(public.clone())
                .service(BuildServiceServer::new(builds).max_decoding_message_size(MAX_REQUEST)),
        )
        .add_service(
            ServiceBuilder::new()
                .layer(public.clone())
                .service(AccessServiceServer::new(grants).max_decoding_message_size(MAX_REQUEST)),
        )
        .add_service(
            ServiceBuilder::new()
                .layer(public.clone())
                .service(ContextServiceServer::new(uploads).max_decoding_message_size(MAX_REQUEST)),
        )
        .add_service(
            ServiceBuilder::new()
                .layer(public)
                .service(WorkerServiceServer::new(workers).max_decoding_message_size(MAX_REQUEST)),
        )
        .add_service(
            ServiceBuilder::new()
                .layer(dispatch)
                .service(DispatchServiceServer::new(dispatcher).max_decoding_message_size(MAX_REPORT)),
        )
        .serve_with_incoming_shutdown(Incoming::new(listener, tls), shutdown.cancelled_owned())
        .await?;
    sessions.close();
    sessions.wait().await;
    Ok(())
}
