//! Services that an engine calls over the session of a build.

use std::{pin::Pin, sync::Arc};

use bollard::{
    health::{
        HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
        health_check_response::ServingStatus, health_server::Health,
    },
    moby::{
        filesync::v1::{
            CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse,
            GetTokenAuthorityRequest, GetTokenAuthorityResponse, VerifyTokenAuthorityRequest,
            VerifyTokenAuthorityResponse, auth_server::Auth,
        },
        upload::v1::{BytesMessage, upload_server},
    },
};
use futures_util::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::{context::Context, registry_credentials};

/// A service for the build context, as a tar.
#[derive(Debug)]
pub(super) struct Upload(Arc<Context>);

/// A service for registry credentials, which are looked up on demand.
#[derive(Debug)]
pub(super) struct Credentials(registry_credentials::DockerConfig);

/// A health service that reports the session as alive.
#[derive(Debug)]
pub(super) struct Healthy;

impl Upload {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self(context)
    }
}

impl Credentials {
    pub(super) fn new(docker_config: registry_credentials::DockerConfig) -> Self {
        Self(docker_config)
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl upload_server::Upload for Upload {
    type PullStream = Answers<BytesMessage>;

    async fn pull(
        &self,
        _request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let messages = self.0.bytes().map(|bytes| match bytes {
            Ok(bytes) => Ok(BytesMessage { data: bytes.into() }),
            Err(error) => Err(Status::data_loss(format!("cannot read the context: {error}"))),
        });
        Ok(Response::new(messages.boxed()))
    }
}

#[tonic::async_trait]
impl Auth for Credentials {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        let host = request.into_inner().host;
        let found = self.0.credentials_of_host(&host).await;
        let (username, secret) =
            match found.map_err(|error| Status::failed_precondition(error.to_string()))? {
                Some(registry_credentials::Credentials::Password { user, password }) => (user, password),
                Some(registry_credentials::Credentials::IdentityToken(token)) => (String::new(), token),
                None => (String::new(), String::new()),
            };
        Ok(Response::new(CredentialsResponse { username, secret }))
    }

    // Without these methods the engine itself asks the registry's token server, with the credentials.

    async fn fetch_token(
        &self,
        _request: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        Err(Status::unimplemented("FetchToken"))
    }

    async fn get_token_authority(
        &self,
        _request: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("GetTokenAuthority"))
    }

    async fn verify_token_authority(
        &self,
        _request: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("VerifyTokenAuthority"))
    }
}

#[tonic::async_trait]
impl Health for Healthy {
    async fn check(
        &self,
        _request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { status: ServingStatus::Serving.into() }))
    }

    async fn list(
        &self,
        _request: Request<HealthListRequest>,
    ) -> Result<Response<HealthListResponse>, Status> {
        Err(Status::unimplemented("List"))
    }

    type WatchStream = Answers<HealthCheckResponse>;

    async fn watch(
        &self,
        _request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(stream::empty().boxed()))
    }
}
