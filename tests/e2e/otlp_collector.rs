//! A collector of traces and metrics, by OTLP over gRPC.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::any_value::Value,
    resource::v1::Resource,
    trace::v1::Span,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig},
};

/// A collector that keeps what it receives.
#[derive(Debug)]
pub(crate) struct Collector {
    pub(crate) addr: SocketAddr,
    received: Received,
    _gone: DropGuard,
}

#[derive(Clone, Debug, Default)]
struct Received(Arc<Mutex<Kept>>);

/// Received data, each item with the name of the program that sent it.
#[derive(Debug, Default)]
struct Kept {
    spans: Vec<(String, Span)>,
    metrics: BTreeSet<(String, String)>,
}

impl Collector {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts a collector that uses TLS with this certificate and key.
    pub(crate) async fn start_with(identity: Identity) -> anyhow::Result<Self> {
        let server = Server::builder().tls_config(ServerTlsConfig::new().identity(identity))?;
        Self::serve(server, SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts an empty collector at `addr`, for instance in place of one that is gone.
    pub(crate) async fn start_at(addr: SocketAddr) -> anyhow::Result<Self> {
        Self::serve(Server::builder(), addr).await
    }

    async fn serve(mut server: Server, addr: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        let (received, gone) = (Received::default(), CancellationToken::new());
        let serving = server
            .add_service(TraceServiceServer::new(received.clone()))
            .add_service(MetricsServiceServer::new(received.clone()))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), gone.clone().cancelled_owned());
        // The task ends when all of its connections have ended.
        tokio::spawn(async move {
            let _ = serving.await;
        });
        Ok(Self { addr, received, _gone: gone.drop_guard() })
    }

    /// Returns the number of received spans.
    pub(crate) fn spans(&self) -> usize {
        self.received.with(|kept| kept.spans.len())
    }

    /// Returns the spans of a trace, each with the program that sent it.
    pub(crate) fn trace(&self, id: &[u8]) -> Vec<(String, Span)> {
        self.received
            .with(|kept| kept.spans.iter().filter(|(_, span)| span.trace_id == id).cloned().collect())
    }

    /// Returns the names of the metrics, each with the program that sent it.
    pub(crate) fn metrics(&self) -> BTreeSet<(String, String)> {
        self.received.with(|kept| kept.metrics.clone())
    }
}

impl Received {
    fn with<T>(&self, what: impl FnOnce(&mut Kept) -> T) -> T {
        what(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let program = name(of_resource.resource.as_ref());
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.with(|kept| kept.spans.extend(spans.map(|span| (program.clone(), span))));
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Received {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_metrics {
            let program = name(of_resource.resource.as_ref());
            let metrics = of_resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics);
            self.with(|kept| kept.metrics.extend(metrics.map(|metric| (program.clone(), metric.name))));
        }
        Ok(Response::new(Default::default()))
    }
}

fn name(resource: Option<&Resource>) -> String {
    let attributes = resource.into_iter().flat_map(|resource| &resource.attributes);
    let mut names = attributes.filter(|attribute| attribute.key == "service.name");
    match names.next().and_then(|name| name.value.as_ref()).and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(name)) => name.clone(),
        Some(_) | None => String::new(),
    }
}
