//! Services that an engine calls over the session of a build, except for that of credentials.

use std::{pin::Pin, sync::Arc};

use bollard::{
    health::{
        HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
        health_check_response::ServingStatus, health_server::Health,
    },
    moby::upload::v1::{BytesMessage, upload_server},
};
use futures_util::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::context::Context;

/// A service for the build context, as a tar.
#[derive(Debug)]
pub(super) struct Upload(Arc<Context>);

/// A health service that reports the session as alive.
#[derive(Debug)]
pub(super) struct Healthy;

impl Upload {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self(context)
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
