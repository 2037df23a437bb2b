//! How a worker reaches image-service.

use std::{fmt::Debug, path::PathBuf, time::Duration};

use edge::tls;
use futures_util::{StreamExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use proto::dispatch::{
    Attempt, ConnectRequest, ConnectResponse, FetchContextRequest, FetchContextResponse, FindUnneededRequest,
    dispatch_service_client::DispatchServiceClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use crate::config::Config;

/// Connects to the service. It may take as long as it likes: whoever dials waits no longer than it wants to.
pub(crate) trait Dial: Debug + Send + Sync {
    /// Calls `Connect`: what is sent into `requests` goes to the service, and what it says comes back.
    fn dial(&self, requests: mpsc::Receiver<ConnectRequest>) -> BoxFuture<'_, Result<Responses, DialError>>;

    /// Calls `FindUnneeded`.
    fn find_unneeded(&self, request: FindUnneededRequest) -> BoxFuture<'_, Result<Vec<String>, DialError>>;

    /// Calls `FetchContext`.
    fn fetch_context(&self, attempt: Attempt) -> BoxFuture<'_, Result<Chunks, DialError>>;
}

/// The parts of an archive.
pub(crate) type Chunks = BoxStream<'static, Result<FetchContextResponse, DialError>>;

/// What the service says over one connection.
pub(crate) type Responses = BoxStream<'static, Result<ConnectResponse, DialError>>;

/// Why there is no connection, or not any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("the files of TLS are of no use")]
    Endpoint(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot connect")]
    Connect(#[source] tonic::transport::Error),
    #[error("cannot read the token file")]
    Token(#[source] std::io::Error),
    #[error("the token file holds no token")]
    NoToken,
    #[error("{} ({:?})", .0.message(), .0.code())]
    Refused(Box<Status>),
}

/// Connects by gRPC.
#[derive(Debug)]
pub(crate) struct GrpcDial {
    server: String,
    /// These are read again at every connection.
    token_file: PathBuf,
    server_ca: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

impl GrpcDial {
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// How often a connection on which something is awaited is asked whether it lives, and how long that may take.
    const KEEPALIVE: Duration = Duration::from_secs(10);

    pub(crate) fn of(config: &Config) -> Self {
        Self {
            server: config.server.clone(),
            token_file: config.token_file.clone(),
            server_ca: config.server_ca.clone(),
            identity: config.tls.tls_cert.clone().zip(config.tls.tls_key.clone()),
        }
    }

    /// How to connect, with the files of TLS as they are now.
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

    async fn connect(&self, requests: mpsc::Receiver<ConnectRequest>) -> Result<Responses, DialError> {
        let (mut client, call) = self.call(ReceiverStream::new(requests)).await?;
        let responses = client.connect(call).await.map_err(refused)?;
        Ok(responses.into_inner().map_err(refused).boxed())
    }

    async fn fetch(&self, attempt: Attempt) -> Result<Chunks, DialError> {
        let (mut client, call) = self.call(FetchContextRequest { attempt: Some(attempt) }).await?;
        let chunks = client.fetch_context(call).await.map_err(refused)?;
        Ok(chunks.into_inner().map_err(refused).boxed())
    }

    /// A new connection, and a call for it that says who calls.
    async fn call<T>(&self, message: T) -> Result<(DispatchServiceClient<Channel>, Request<T>), DialError> {
        let token = tokio::fs::read_to_string(&self.token_file).await.map_err(DialError::Token)?;
        let mut bearer: MetadataValue<_> =
            format!("Bearer {}", token.trim()).parse().map_err(|_| DialError::NoToken)?;
        bearer.set_sensitive(true);
        let endpoint = self.endpoint().map_err(|error| DialError::Endpoint(error.into()))?;
        let channel = endpoint.connect().await.map_err(DialError::Connect)?;
        let mut call = Request::new(message);
        call.metadata_mut().insert("authorization", bearer);
        Ok((DispatchServiceClient::new(channel), call))
    }
}

impl Dial for GrpcDial {
    fn dial(&self, requests: mpsc::Receiver<ConnectRequest>) -> BoxFuture<'_, Result<Responses, DialError>> {
        Box::pin(self.connect(requests))
    }

    fn find_unneeded(&self, request: FindUnneededRequest) -> BoxFuture<'_, Result<Vec<String>, DialError>> {
        Box::pin(async move {
            let (mut client, call) = self.call(request).await?;
            Ok(client.find_unneeded(call).await.map_err(refused)?.into_inner().engine_image_ids)
        })
    }

    fn fetch_context(&self, attempt: Attempt) -> BoxFuture<'_, Result<Chunks, DialError>> {
        Box::pin(self.fetch(attempt))
    }
}

fn refused(status: Status) -> DialError {
    DialError::Refused(Box::new(status))
}
