//! The transport: parse, call, convert. The only place that knows tonic and the generated code.

use std::{sync::Arc, time::Duration};

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
use tonic::{
    server::NamedService,
    service::InterceptorLayer,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::ServingStatus;
use tower::{ServiceBuilder, util::MapResponseLayer};
use tower_http::catch_panic::CatchPanicLayer;

use self::authentication::{Api, Authentication};
use crate::{
    ServeError, catalog::Catalog, contexts::Contexts, feed::Feed, history::Histories, queue::Queue,
    token::Verifier,
};

mod access_service;
mod authentication;
mod build;
mod build_service;
mod configuration;
mod context_service;
mod cursor;
mod dispatch_service;
mod field;
mod framing;
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

/// Serves on the listener until `shutdown`, and until every stream has ended then.
pub(crate) async fn serve(
    operations: Operations,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    const STREAMS_A_CONNECTION: u32 = 1_024;
    /// A configuration has at most a quarter of it.
    const MAX_REQUEST: usize = 1024 * 1024;
    const KEEPALIVE: Duration = Duration::from_secs(20);

    let sessions = TaskTracker::new();
    let health = health(&shutdown, &sessions).await;
    let public = InterceptorLayer::new(Authentication::new(Arc::clone(&operations.verifier), Api::Public));
    let dispatch =
        InterceptorLayer::new(Authentication::new(Arc::clone(&operations.verifier), Api::Dispatch));
    let images = image_service::Images::new(operations.catalog.clone(), operations.feed, operations.history);
    let builds =
        build_service::Builds::new(operations.catalog.clone(), operations.histories, operations.history);
    let grants = access_service::Grants::new(operations.catalog.clone(), operations.history);
    let workers = worker_service::AllWorkers::new(operations.catalog.clone(), operations.history);
    let uploads = context_service::Uploads::new(operations.contexts.clone(), shutdown.clone());
    let dispatcher = dispatch_service::Dispatcher::new(
        operations.queue,
        operations.catalog,
        operations.contexts,
        sessions.clone(),
        shutdown.clone(),
    );

    // The builder's setting does not reach a listener that it is given. Without it, answers wait for delayed acknowledgements.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .layer(CatchPanicLayer::custom(framing::panicked))
        .layer(MapResponseLayer::new(framing::explain))
        .max_concurrent_streams(STREAMS_A_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(health)
        .add_service(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
                .build_v1()?,
        )
        .add_service(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
                .build_v1alpha()?,
        )
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
        .add_service(ServiceBuilder::new().layer(dispatch).service(DispatchServiceServer::new(dispatcher)))
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
        .await?;
    sessions.close();
    sessions.wait().await;
    Ok(())
}

/// SERVING for the server and each service until shutdown, then NOT_SERVING.
async fn health(
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health> {
    let (reporter, service) = tonic_health::server::health_reporter();
    let names = [
        "",
        ImageServiceServer::<image_service::Images>::NAME,
        BuildServiceServer::<build_service::Builds>::NAME,
        AccessServiceServer::<access_service::Grants>::NAME,
        ContextServiceServer::<context_service::Uploads>::NAME,
        WorkerServiceServer::<worker_service::AllWorkers>::NAME,
        DispatchServiceServer::<dispatch_service::Dispatcher>::NAME,
    ];
    for name in names {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        shutdown.cancelled().await;
        for name in names {
            reporter.set_service_status(name, ServingStatus::NotServing).await;
        }
        for name in names {
            // Ends the watches, once they have told of it.
            let mut reporter = reporter.clone();
            reporter.clear_service_status(name).await;
        }
    });
    service
}
