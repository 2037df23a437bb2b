//! Connections from the worker to image-service.

use std::{fmt::Debug, path::PathBuf, time::Duration};

use futures_util::{StreamExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use proto::dispatch::{
    Attempt, ConnectRequest, ConnectResponse, FetchContextRequest, FetchContextResponse,
    FindUnusedImagesRequest, FindUnusedImagesResponse, ListArtifactsRequest, ListArtifactsResponse,
    ReportArtifactsRequest, ReportArtifactsResponse, ResolveSourcesRequest, ResolveSourcesResponse,
    dispatch_service_client::DispatchServiceClient,
};
use service_runtime::tls;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::config::Config;

/// A way to connect to the service.
///
/// Its calls have no deadline of their own; the caller sets one.
pub(crate) trait ServiceClient: Debug + Send + Sync {
    /// Calls `Connect`: sends the messages from `requests` and returns the service's responses.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Refused`] if the service refuses the call or the connection breaks, and
    /// another [`ServiceError`] if no connection can be opened.
    fn connect(
        &self,
        requests: mpsc::Receiver<ConnectRequest>,
    ) -> BoxFuture<'_, Result<Responses, ServiceError>>;

    /// Calls `ResolveSources`.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Refused`] if the service refuses the call or the connection breaks, and
    /// another [`ServiceError`] if no connection can be opened.
    fn resolve_sources(
        &self,
        request: ResolveSourcesRequest,
    ) -> BoxFuture<'_, Result<ResolveSourcesResponse, ServiceError>>;

    /// Calls `FindUnusedImages`.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Refused`] if the service refuses the call or the connection breaks, and
    /// another [`ServiceError`] if no connection can be opened.
    fn find_unused_images(
        &self,
        request: FindUnusedImagesRequest,
    ) -> BoxFuture<'_, Result<FindUnusedImagesResponse, ServiceError>>;

    /// Calls `ListArtifacts`.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Refused`] if the service refuses the call or the connection breaks, and
    /// another [`ServiceError`] if no connection can be opened.
    fn list_artifacts(
        &self,
        request: ListArtifactsRequest,
    ) -> BoxFuture<'_, Result<ListArtifactsResponse, ServiceError>>;

    /// Calls `ReportArtifacts`.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Refused`] if the service refuses the call or the connection breaks, and
    /// another [`ServiceError`] if no connection can be opened.
    fn report_artifacts(
        &self,
        request: ReportArtifactsRequest,
    ) -> BoxFuture<'_, Result<ReportArtifactsResponse, ServiceError>>;

    /// Calls `FetchContext` and returns the parts of the archive.
    ///
    /// # Errors
    ///
    /// Returns [`ServiceError::Refused`] if the service refuses the call or the connection breaks, and
    /// another [`ServiceError`] if no connection can be opened.
    fn fetch_context(&self, attempt: Attempt) -> BoxFuture<'_, Result<Chunks, ServiceError>>;
}

/// The parts of an archive.
pub(crate) type Chunks = BoxStream<'static, Result<FetchContextResponse, ServiceError>>;

/// The responses of the service over one connection.
pub(crate) type Responses = BoxStream<'static, Result<ConnectResponse, ServiceError>>;

/// The reason why a connection failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServiceError {
    #[error("cannot use the TLS files")]
    Endpoint(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot connect")]
    Connect(#[source] tonic::transport::Error),
    #[error("cannot read the token file")]
    Token(#[source] std::io::Error),
    #[error("the token file contains no token")]
    NoToken,
    #[error("{} ({:?})", .0.message(), .0.code())]
    Refused(Box<Status>),
    #[error("the service does not respond")]
    Silent,
}

/// Waits for the response of a call that nothing else is waiting for.
///
/// # Errors
///
/// Returns the error of the call, and [`ServiceError::Silent`] if there is no response for 10 s.
pub(crate) async fn response<T>(call: BoxFuture<'_, Result<T, ServiceError>>) -> Result<T, ServiceError> {
    const TIMEOUT: Duration = Duration::from_secs(10);
    tokio::time::timeout(TIMEOUT, call).await.unwrap_or(Err(ServiceError::Silent))
}

/// A [`ServiceClient`] over gRPC.
#[derive(Debug)]
pub(crate) struct GrpcServiceClient {
    server: String,
    /// File with the token; read again for every connection, like the files below.
    token_file: PathBuf,
    server_ca: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

impl GrpcServiceClient {
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// Interval of keepalive pings while a response is awaited, and deadline of each.
    const KEEPALIVE: Duration = Duration::from_secs(10);

    pub(crate) fn new(config: &Config) -> Self {
        Self {
            server: config.server.clone(),
            token_file: config.token_file.clone(),
            server_ca: config.server_ca.clone(),
            identity: config.tls.tls_cert.clone().zip(config.tls.tls_key.clone()),
        }
    }

    /// Returns the endpoint, with the TLS files as they are now.
    ///
    /// # Errors
    ///
    /// Returns an error if the address is not a URL or a TLS file cannot be used.
    pub(crate) fn endpoint(&self) -> anyhow::Result<Endpoint> {
        let endpoint = Endpoint::from_shared(self.server.clone())?
            .connect_timeout(Self::CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Self::KEEPALIVE)
            .keep_alive_timeout(Self::KEEPALIVE)
            .tcp_nodelay(true);
        if endpoint.uri().scheme_str() != Some("https") {
            return Ok(endpoint);
        }
        let identity = self.identity.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        Ok(endpoint.tls_config(tls::client(self.server_ca.as_deref(), identity)?)?)
    }

    async fn open_session(
        &self,
        requests: mpsc::Receiver<ConnectRequest>,
    ) -> Result<Responses, ServiceError> {
        let (mut client, call) = self.call(ReceiverStream::new(requests)).await?;
        let responses = client.connect(call).await.map_err(refused)?;
        Ok(responses.into_inner().map_err(refused).boxed())
    }

    async fn fetch(&self, attempt: Attempt) -> Result<Chunks, ServiceError> {
        let (mut client, call) = self.call(FetchContextRequest { attempt: Some(attempt) }).await?;
        let chunks = client.fetch_context(call).await.map_err(refused)?;
        Ok(chunks.into_inner().map_err(refused).boxed())
    }

    /// Opens a connection and creates an authenticated request for it.
    async fn call<T>(
        &self,
        message: T,
    ) -> Result<(DispatchServiceClient<Channel>, Request<T>), ServiceError> {
        let token = tokio::fs::read_to_string(&self.token_file).await.map_err(ServiceError::Token)?;
        let mut bearer: MetadataValue<_> =
            format!("Bearer {}", token.trim()).parse().map_err(|_| ServiceError::NoToken)?;
        bearer.set_sensitive(true);
        let endpoint = self.endpoint().map_err(|error| ServiceError::Endpoint(error.into()))?;
        let channel = endpoint.connect().await.map_err(ServiceError::Connect)?;
        let mut call = Request::new(message);
        call.metadata_mut().insert("authorization", bearer);
        Ok((DispatchServiceClient::new(channel), call))
    }
}

impl ServiceClient for GrpcServiceClient {
    fn connect(
        &self,
        requests: mpsc::Receiver<ConnectRequest>,
    ) -> BoxFuture<'_, Result<Responses, ServiceError>> {
        Box::pin(self.open_session(requests))
    }

    fn find_unused_images(
        &self,
        request: FindUnusedImagesRequest,
    ) -> BoxFuture<'_, Result<FindUnusedImagesResponse, ServiceError>> {
        Box::pin(async move {
            let (mut client, call) = self.call(request).await?;
            Ok(client.find_unused_images(call).await.map_err(refused)?.into_inner())
        })
    }

    fn list_artifacts(
        &self,
        request: ListArtifactsRequest,
    ) -> BoxFuture<'_, Result<ListArtifactsResponse, ServiceError>> {
        Box::pin(async move {
            let (mut client, call) = self.call(request).await?;
            Ok(client.list_artifacts(call).await.map_err(refused)?.into_inner())
        })
    }

    fn report_artifacts(
        &self,
        request: ReportArtifactsRequest,
    ) -> BoxFuture<'_, Result<ReportArtifactsResponse, ServiceError>> {
        Box::pin(async move {
            let (mut client, call) = self.call(request).await?;
            Ok(client.report_artifacts(call).await.map_err(refused)?.into_inner())
        })
    }

    fn resolve_sources(
        &self,
        request: ResolveSourcesRequest,
    ) -> BoxFuture<'_, Result<ResolveSourcesResponse, ServiceError>> {
        Box::pin(async move {
            let (mut client, call) = self.call(request).await?;
            Ok(client.resolve_sources(call).await.map_err(refused)?.into_inner())
        })
    }

    fn fetch_context(&self, attempt: Attempt) -> BoxFuture<'_, Result<Chunks, ServiceError>> {
        Box::pin(self.fetch(attempt))
    }
}

fn refused(status: Status) -> ServiceError {
    ServiceError::Refused(Box::new(status))
}
