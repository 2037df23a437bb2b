//! Client of BuildKit's Control API, with a session on the same connection.
//!
//! The engine calls back over the session: it fetches the build context and the Dockerfile, and asks for secrets.
//! It gets no registry credentials, because a build uses nothing that the engine does not have yet.

use std::{io, sync::Arc};

use bollard::{
    health::health_server::HealthServer,
    moby::{
        buildkit::{
            secrets::v1::secrets_server::SecretsServer,
            v1::{BytesMessage, control_client::ControlClient},
        },
        filesync::v1::file_sync_server::FileSyncServer,
        sshforward::v1::ssh_server::SshServer,
        upload::v1::upload_server::UploadServer,
    },
};
use futures_util::{StreamExt, stream};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf},
    sync::Mutex,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Request, Streaming,
    metadata::{AsciiMetadataValue, MetadataMap},
    transport::{Channel, Endpoint, Server},
};

use super::{
    connection::Connections,
    session::{DockerfileSource, Healthy, Upload},
    session_secrets::SessionSecrets,
};
use crate::engine::{BuildOrder, EngineError};

/// A client of an engine's BuildKit, with a session that serves one build or lookup.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) client: ControlClient<Channel>,
    /// Channel of the client, for further services on the same connection.
    pub(super) channel: Channel,
    /// ID of the session; empty if there is none.
    pub(super) session: String,
    _serving: [AbortOnDropHandle<()>; 2],
}

/// Methods that the engine may call over the session.
const EXPOSED: [&str; 6] = [
    "/moby.upload.v1.Upload/Pull",
    "/moby.filesync.v1.FileSync/DiffCopy",
    "/moby.buildkit.secrets.v1.Secrets/GetSecret",
    "/moby.sshforward.v1.SSH/CheckAgent",
    "/moby.sshforward.v1.SSH/ForwardAgent",
    "/grpc.health.v1.Health/Check",
];

impl Control {
    /// Size of the buffer between the session's server and the connection, in bytes per direction.
    const PIPE: usize = 256 * 1024;
    /// Maximum size of a message, in bytes; a progress message holds everything since the previous one.
    const LARGEST_MESSAGE: usize = 64 * 1024 * 1024;
    /// Flow-control window of a stream, in bytes.
    const WINDOW: u32 = 1024 * 1024;
    /// Maximum size of a call's trailers, in bytes.
    ///
    /// An error quotes the whole Dockerfile in the trailers, encoded twice.
    const LARGEST_TRAILERS: u32 = 16 * 1024 * 1024;

    /// Connects to BuildKit and opens a session that serves, for a build, its context, its Dockerfile and its
    /// secrets.
    ///
    /// The engine compares a Dockerfile with what it has kept of sessions with the same key only.
    ///
    /// # Errors
    ///
    /// Returns [`EngineError::Broken`] if the engine cannot be reached or refuses the session.
    pub(super) async fn open(
        connections: &Connections,
        shared_key: &str,
        order: Option<&BuildOrder>,
    ) -> Result<Self, EngineError> {
        let broken = |error: &dyn std::error::Error| EngineError::Broken(error.to_string());
        let stream = connections.grpc().await.map_err(|error| broken(&error))?;
        let stream = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
        let connect = tower::service_fn(move |_| {
            let stream = Arc::clone(&stream);
            async move { stream.lock().await.take().ok_or_else(|| io::Error::other("the connection is over")) }
        });
        let channel = Endpoint::from_static("http://buildkit")
            .initial_stream_window_size(Self::WINDOW)
            .initial_connection_window_size(4 * Self::WINDOW)
            .http2_max_header_list_size(Self::LARGEST_TRAILERS)
            .connect_with_connector(connect)
            .await
            .map_err(|error| broken(&error))?;
        let mut client = ControlClient::new(channel.clone()).max_decoding_message_size(Self::LARGEST_MESSAGE);

        let session = uuid::Uuid::new_v4().simple().to_string();
        let (ours, theirs) = tokio::io::duplex(Self::PIPE);
        let (read, write) = tokio::io::split(theirs);
        let mut request = Request::new(messages(read));
        expose(request.metadata_mut(), &session, shared_key).map_err(|error| broken(&error))?;
        let answers =
            client.session(request).await.map_err(|status| EngineError::Broken(status.to_string()))?;
        let services = Server::builder()
            .initial_stream_window_size(Self::WINDOW)
            .add_optional_service(
                order.map(|order| SecretsServer::new(SessionSecrets(Arc::clone(&order.secrets)))),
            )
            .add_optional_service(
                order.map(|order| SshServer::new(SessionSecrets(Arc::clone(&order.secrets)))),
            )
            .add_optional_service(
                order.map(|order| UploadServer::new(Upload::new(Arc::clone(&order.context)))),
            )
            .add_optional_service(
                order.map(|order| FileSyncServer::new(DockerfileSource::new(&order.dockerfile))),
            )
            .add_service(HealthServer::new(Healthy));
        let serving = async move {
            let connection = stream::once(async { Ok::<_, io::Error>(ours) }).chain(stream::pending());
            if let Err(error) = services.serve_with_incoming(connection).await {
                tracing::debug!(%error, "a session with the Docker Engine ended");
            }
        };
        let serving = AbortOnDropHandle::new(tokio::spawn(serving));
        let pumping = AbortOnDropHandle::new(tokio::spawn(pump(answers.into_inner(), write)));
        Ok(Self { client, channel, session, _serving: [serving, pumping] })
    }
}

/// Adds the metadata by which BuildKit learns the session's ID, key and methods.
fn expose(
    metadata: &mut MetadataMap,
    session: &str,
    shared_key: &str,
) -> Result<(), tonic::metadata::errors::InvalidMetadataValue> {
    metadata.insert("x-docker-expose-session-uuid", session.parse()?);
    metadata.insert("x-docker-expose-session-name", AsciiMetadataValue::from_static("trailer"));
    metadata.insert("x-docker-expose-session-sharedkey", shared_key.parse()?);
    for method in EXPOSED {
        metadata.append("x-docker-expose-session-grpc-method", AsciiMetadataValue::from_static(method));
    }
    Ok(())
}

/// Converts the output of the session's server to messages to the engine.
fn messages(read: ReadHalf<DuplexStream>) -> impl stream::Stream<Item = BytesMessage> + Send + 'static {
    const READ: usize = 64 * 1024;
    stream::unfold(read, |mut read| async move {
        let mut data = vec![0; READ];
        let length = read.read(&mut data).await.ok().filter(|&length| length > 0)?;
        data.truncate(length);
        Some((BytesMessage { data }, read))
    })
}

/// Forwards the engine's messages to the session's server until either side ends.
async fn pump(mut answers: Streaming<BytesMessage>, mut write: WriteHalf<DuplexStream>) {
    while let Some(Ok(message)) = answers.next().await {
        if write.write_all(&message.data).await.is_err() {
            return;
        }
    }
}
