//! The gRPC transport, which parses requests, calls operations and converts results. No other module uses
//! tonic or the generated code.

use std::sync::Arc;

use proto::{
    dispatch::dispatch_service_server::DispatchServiceServer,
    images::{
        access_service_server::AccessServiceServer, build_service_server::BuildServiceServer,
        context_service_server::ContextServiceServer, image_service_server::ImageServiceServer,
        worker_service_server::WorkerServiceServer,
    },
};
use service_runtime::{call_limits::CallLimitsLayer, listener::Incoming, tls::Current};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{codec::CompressionEncoding::Gzip, service::InterceptorLayer};
use tower::{ServiceBuilder, util::MapResponseLayer};
use tower_http::catch_panic::CatchPanicLayer;

use self::{
    authentication::{Api, Authentication},
    call_layer::CallsLayer,
};
pub(crate) use self::{
    caller_limits::{CallerLimits, Callers},
    health::Readiness,
};
use crate::{
    ServeError, build_watch::Histories, catalog::Catalog, context_transfer::Contexts, feed::Feed,
    jwt::Verifier, queue::Queue,
};

mod access_service;
mod audit;
mod authentication;
mod build;
mod build_service;
mod call_body;
mod call_layer;
mod caller_limits;
mod code_names;
mod configuration;
mod context_service;
mod cost;
mod cursor;
mod dispatch_service;
mod field;
mod health;
mod image;
mod image_query;
mod image_service;
mod page;
mod status;
mod transport_errors;
mod worker_service;
mod write_request;

#[cfg(feature = "simulation")]
pub(crate) use self::dispatch_service::Connection;

/// The operations that the transport calls.
#[derive(Debug)]
pub(crate) struct Operations {
    pub(crate) catalog: Catalog,
    pub(crate) contexts: Contexts,
    pub(crate) feed: Feed,
    pub(crate) histories: Histories,
    pub(crate) queue: Arc<Queue>,
    pub(crate) verifier: Arc<Verifier>,
    /// Identifies the database, to which page tokens and resume revisions are bound.
    pub(crate) catalogue_id: uuid::Uuid,
}

/// The listener, and the conditions under which it is served.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<Current>,
    pub(crate) callers: Callers,
    pub(crate) readiness: Readiness,
}

/// Serves on the listener until `shutdown`, and then until every stream has ended.
///
/// # Errors
///
/// Returns a [`ServeError`] if the descriptor sets cannot be decoded, or the listener fails.
pub(crate) async fn serve(
    operations: Operations,
    serving: Serving,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    /// Maximum size of a dispatch message, in bytes. A worker's report has many lines.
    const MAX_REPORT: usize = 4 * 1024 * 1024;
    /// Maximum size of any other request, in bytes. A configuration has at most a quarter of it.
    const MAX_REQUEST: usize = 1024 * 1024;
    /// Maximum size of a message of health checks and reflection, in bytes. Anyone may send them.
    const MAX_WITHOUT_TOKEN: usize = 4 * 1024;
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
    let (catalog, catalogue_id) = (operations.catalog, operations.catalogue_id);
    let images =
        image_service::Images::new(catalog.clone(), operations.feed, Arc::clone(&callers), catalogue_id);
    let builds =
        build_service::Builds::new(catalog.clone(), operations.histories, Arc::clone(&callers), catalogue_id);
    let grants = access_service::Grants::new(catalog.clone(), catalogue_id);
    let workers = worker_service::AllWorkers::new(catalog.clone(), catalogue_id);
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

    service_runtime::listener::server()
        .layer(CallLimitsLayer { is_request_stream, is_reserved_for, status: status::refused })
        .layer(CallsLayer::new(&DESCRIBED)?)
        .layer(CatchPanicLayer::custom(transport_errors::panicked))
        .layer(MapResponseLayer::new(transport_errors::explain))
        .add_service(health.max_decoding_message_size(MAX_WITHOUT_TOKEN).accept_compressed(Gzip))
        .add_service(
            reflection().build_v1()?.max_decoding_message_size(MAX_WITHOUT_TOKEN).accept_compressed(Gzip),
        )
        .add_service(
            reflection()
                .build_v1alpha()?
                .max_decoding_message_size(MAX_WITHOUT_TOKEN)
                .accept_compressed(Gzip),
        )
        .add_service(ServiceBuilder::new().layer(public.clone()).service(
            ImageServiceServer::new(images).max_decoding_message_size(MAX_REQUEST).accept_compressed(Gzip),
        ))
        .add_service(ServiceBuilder::new().layer(public.clone()).service(
            BuildServiceServer::new(builds).max_decoding_message_size(MAX_REQUEST).accept_compressed(Gzip),
        ))
        .add_service(ServiceBuilder::new().layer(public.clone()).service(
            AccessServiceServer::new(grants).max_decoding_message_size(MAX_REQUEST).accept_compressed(Gzip),
        ))
        .add_service(ServiceBuilder::new().layer(public.clone()).service(
            ContextServiceServer::new(uploads).max_decoding_message_size(MAX_REQUEST).accept_compressed(Gzip),
        ))
        .add_service(ServiceBuilder::new().layer(public).service(
            WorkerServiceServer::new(workers).max_decoding_message_size(MAX_REQUEST).accept_compressed(Gzip),
        ))
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

/// Reports whether the request of a method is a stream.
fn is_request_stream(path: &str) -> bool {
    const STREAMS: [&str; 2] =
        ["/trailer.images.v1.ContextService/UploadContext", "/trailer.dispatch.v1.DispatchService/Connect"];
    STREAMS.contains(&path) || path.starts_with("/grpc.reflection.")
}

/// Reports whether a method may use the connections that are reserved: those of health checks and workers.
fn is_reserved_for(path: &str) -> bool {
    path.starts_with("/grpc.health.") || path.starts_with("/trailer.dispatch.")
}
