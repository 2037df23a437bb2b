//! Sessions: byte streams inside gRPC, in which the worker is the server and the engine the client.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bollard::fsutil::types::{Packet, packet::PacketType};
use bollard::moby::buildkit::v1::BytesMessage;
use bollard::moby::filesync::v1::file_sync_client::FileSyncClient;
use bollard::moby::upload::v1::upload_client::UploadClient;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use super::Shared;
use super::connection::Tasks;

/// Maximum number of bytes that a session buffers in each direction.
const BUFFER: usize = 64 << 10;

/// Maximum length of a message from the engine in a session, in bytes, as in `BuildKit`.
const CHUNK: usize = 32 << 10;

/// Maximum time that a build waits for its session, as in `BuildKit`.
const SESSION_WAIT: Duration = Duration::from_secs(5);

/// The answer of a Session call: the bytes from the engine to the worker.
pub(super) type SessionStream = BoxStream<'static, Result<BytesMessage, Status>>;

/// The open sessions by id.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    channels: watch::Sender<BTreeMap<String, Channel>>,
}

/// Opens the session that a Session call announces in its metadata.
///
/// It lives until the worker ends its side of the stream or the connection. As with a real engine,
/// it does not end with its build.
pub(super) fn open(
    request: Request<Streaming<BytesMessage>>,
    shared: &Arc<Shared>,
) -> Result<SessionStream, Status> {
    let header = request.metadata().get("x-docker-expose-session-uuid");
    let id = header.and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    let (engine, worker) = tokio::io::duplex(BUFFER);
    let (outgoing, incoming) = tokio::io::split(worker);

    let session = OpenSession::new(id, connect(engine, shared), Arc::clone(shared))?;
    shared.spawn(receive(request.into_inner(), incoming, session));
    Ok(send(outgoing).boxed())
}

/// Fetches the upload that the session `id` serves for this URL.
pub(super) async fn upload(id: &str, url: &http::Uri, shared: &Shared) -> Result<Vec<u8>, Status> {
    let channel = shared.sessions.channel(id).await?;
    // The request stays open while the upload is read.
    let mut request = Request::new(stream::pending());
    let host = url.host().unwrap_or_default();
    for (key, value) in [("urlpath", url.path()), ("urlhost", host)] {
        let value = value.parse().map_err(|_| Status::unknown("the context's URL fits no metadata"))?;
        request.metadata_mut().insert(key, value);
    }

    let mut parts = UploadClient::new(channel).pull(request).await?.into_inner();
    let mut upload = Vec::new();
    while let Some(part) = parts.message().await? {
        upload.extend(part.data);
    }
    Ok(upload)
}

/// Fetches the only file of a local source that the session `id` serves.
pub(super) async fn local_file(id: &str, source: &str, shared: &Shared) -> Result<Bytes, Status> {
    let channel = shared.sessions.channel(id).await?;
    // The request for the only file, and the end.
    let (ask, asked) = mpsc::channel(2);
    let packet = |kind: PacketType| Packet { r#type: kind.into(), ..Packet::default() };
    let send = |packet| ask.try_send(packet).map_err(|_| Status::unavailable("the session has ended"));
    let mut request = Request::new(ReceiverStream::new(asked));
    let name = source.parse().map_err(|_| Status::unknown("the source's name fits no metadata"))?;
    request.metadata_mut().insert("dir-name", name);

    let mut packets = FileSyncClient::new(channel).diff_copy(request).await?.into_inner();
    let mut content = Vec::new();
    while let Some(received) = packets.message().await? {
        match received.r#type() {
            PacketType::PacketStat if received.stat.is_none() => send(packet(PacketType::PacketReq))?,
            PacketType::PacketData if received.data.is_empty() => send(packet(PacketType::PacketFin))?,
            PacketType::PacketData => content.extend(received.data),
            PacketType::PacketErr => return Err(Status::unknown(String::from_utf8_lossy(&received.data))),
            PacketType::PacketStat | PacketType::PacketReq | PacketType::PacketFin => {}
        }
    }
    Ok(content.into())
}

impl Sessions {
    async fn channel(&self, id: &str) -> Result<Channel, Status> {
        let mut channels = self.channels.subscribe();
        let found = async {
            let channels = channels.wait_for(|channels| channels.contains_key(id)).await.ok()?;
            channels.get(id).cloned()
        };
        let found = tokio::time::timeout(SESSION_WAIT, found).await.ok().flatten();
        found.ok_or_else(|| Status::unknown(format!("no active session for {id}: context deadline exceeded")))
    }
}

/// Returns an HTTP/2 client over the engine's end, which connects on first use.
fn connect(engine: DuplexStream, shared: &Arc<Shared>) -> Channel {
    let mut engine = Some(TokioIo::new(engine));
    let connector = tower::service_fn(move |_| {
        let once = engine.take().ok_or_else(|| io::Error::other("only one connection allowed"));
        std::future::ready(once)
    });
    Endpoint::from_static("http://localhost")
        .executor(Tasks(Arc::clone(shared)))
        .connect_with_connector_lazy(connector)
}

/// Forwards what the worker sends to the engine's client, until the worker ends the stream.
async fn receive(
    mut stream: Streaming<BytesMessage>,
    mut incoming: WriteHalf<DuplexStream>,
    _session: OpenSession,
) {
    while let Ok(Some(part)) = stream.message().await {
        if incoming.write_all(&part.data).await.is_err() {
            break;
        }
    }
    // The client may already have closed its end.
    let _ = incoming.shutdown().await;
}

/// Returns a stream of what the engine's client sends to the worker.
fn send(
    outgoing: ReadHalf<DuplexStream>,
) -> impl stream::Stream<Item = Result<BytesMessage, Status>> + Send + 'static {
    stream::unfold(outgoing, |mut outgoing| async {
        let mut data = vec![0; CHUNK];
        let count = outgoing.read(&mut data).await.ok().filter(|count| *count > 0)?;
        data.truncate(count);
        Some((Ok(BytesMessage { data }), outgoing))
    })
}

/// A session that counts as open until this value is dropped.
struct OpenSession {
    id: String,
    shared: Arc<Shared>,
}

impl OpenSession {
    fn new(id: String, channel: Channel, shared: Arc<Shared>) -> Result<OpenSession, Status> {
        let is_new = shared.sessions.channels.send_if_modified(|channels| {
            let is_new = !channels.contains_key(&id);
            if is_new {
                channels.insert(id.clone(), channel);
            }
            is_new
        });
        if !is_new {
            return Err(Status::unknown(format!("session {id} already exists")));
        }
        shared.state.send_modify(|state| state.sessions += 1);
        Ok(OpenSession { id, shared })
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.shared.sessions.channels.send_modify(|channels| {
            channels.remove(&self.id);
        });
        self.shared.state.send_modify(|state| state.sessions -= 1);
    }
}
