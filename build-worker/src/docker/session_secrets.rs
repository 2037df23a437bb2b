//! Secrets and SSH agents of one build, which an engine asks for over its session.

use std::{io, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use bollard::moby::{
    buildkit::secrets::v1::{GetSecretRequest, GetSecretResponse, secrets_server::Secrets},
    sshforward::v1::{BytesMessage, CheckAgentRequest, CheckAgentResponse, ssh_server::Ssh},
};
use futures_util::{Stream, StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};

use crate::secrets::BuildSecrets;

/// A service for the secrets of one build.
#[derive(Debug)]
pub(super) struct SessionSecrets(pub(super) Arc<BuildSecrets>);

/// A connection of a step to an SSH agent.
///
/// Only requests that list keys or sign with them reach the agent, which builds of others use, too.
struct AgentConnection {
    requests: Streaming<BytesMessage>,
    /// Bytes that have arrived and are no whole request yet.
    received: Vec<u8>,
    agent: UnixStream,
}

impl AgentConnection {
    /// Maximum size of a message of the protocol, in bytes, as in OpenSSH.
    const MAX_MESSAGE: usize = 256 * 1024;
    /// Maximum time until the agent responds; it may have to ask its owner.
    const PATIENCE: Duration = Duration::from_secs(60);
    /// Types of requests: for the keys, and for a signature.
    const ALLOWED: [u8; 2] = [11, 13];
    /// Response of an agent that does not do what is requested.
    const FAILURE: [u8; 5] = [0, 0, 0, 1, 5];

    /// Returns the response to the next request; `None` at the end of the connection.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(request) = self.request().await? else { return Ok(None) };
        if request.get(4).is_none_or(|kind| !Self::ALLOWED.contains(kind)) {
            return Ok(Some(Self::FAILURE.to_vec()));
        }
        let responding = async {
            self.agent.write_all(&request).await?;
            let mut response = vec![0; 4];
            self.agent.read_exact(&mut response).await?;
            let end = length(&response)?;
            response.resize(end, 0);
            self.agent.read_exact(&mut response[4..]).await?;
            Ok(Some(response))
        };
        timeout(Self::PATIENCE, responding).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Returns the next request.
    async fn request(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if self.received.len() >= 4 {
                let end = length(&self.received)?;
                if self.received.len() >= end {
                    return Ok(Some(self.received.drain(..end).collect()));
                }
            }
            match self.requests.message().await.map_err(io::Error::other)? {
                Some(message) => self.received.extend(message.data),
                None => return Ok(None),
            }
        }
    }
}

/// Returns the length of a message, with the four bytes that say it.
fn length(message: &[u8]) -> io::Result<usize> {
    let bytes: [u8; 4] =
        message.get(..4).and_then(|bytes| bytes.try_into().ok()).ok_or(io::ErrorKind::InvalidData)?;
    let length = usize::try_from(u32::from_be_bytes(bytes)).map_err(io::Error::other)?;
    if length <= AgentConnection::MAX_MESSAGE {
        Ok(4 + length)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

impl SessionSecrets {
    fn agent(&self, id: &str) -> Result<&PathBuf, Status> {
        /// Id of a mount without one.
        const DEFAULT: &str = "default";
        let id = if id.is_empty() { DEFAULT } else { id };
        let unknown = || Status::not_found(format!("the configuration has no SSH agent with the id {id:?}"));
        self.0.ssh_agents.get(id).ok_or_else(unknown)
    }
}

#[tonic::async_trait]
impl Secrets for SessionSecrets {
    async fn get_secret(
        &self,
        request: Request<GetSecretRequest>,
    ) -> Result<Response<GetSecretResponse>, Status> {
        let id = request.into_inner().id;
        let value = self.0.values.get(&id);
        let unknown = || Status::not_found(format!("the configuration has no secret with the id {id:?}"));
        let data = value.ok_or_else(unknown)?.as_bytes().to_vec();
        Ok(Response::new(GetSecretResponse { data }))
    }
}

#[tonic::async_trait]
impl Ssh for SessionSecrets {
    async fn check_agent(
        &self,
        request: Request<CheckAgentRequest>,
    ) -> Result<Response<CheckAgentResponse>, Status> {
        self.agent(&request.into_inner().id)?;
        Ok(Response::new(CheckAgentResponse {}))
    }

    type ForwardAgentStream = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;

    async fn forward_agent(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let id = request.metadata().get("buildkit.ssh.id").and_then(|id| id.to_str().ok());
        let path = self.agent(id.unwrap_or_default())?;
        let failed = |error: io::Error| Status::unavailable(format!("the SSH agent of the worker: {error}"));
        let agent = UnixStream::connect(path).await.map_err(failed)?;
        let connection = AgentConnection { requests: request.into_inner(), received: Vec::new(), agent };
        let responses = stream::try_unfold(connection, move |mut connection| async move {
            let response = connection.next().await.map_err(failed)?;
            Ok(response.map(|data| (BytesMessage { data }, connection)))
        });
        Ok(Response::new(responses.boxed()))
    }
}
