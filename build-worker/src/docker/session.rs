//! Services that an engine calls over the session of a build, except for that of credentials.

use std::{pin::Pin, sync::Arc};

use bollard::{
    fsutil::types::{Packet, Stat, packet::PacketType},
    health::{
        HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
        health_check_response::ServingStatus, health_server::Health,
    },
    moby::{
        filesync::v1::file_sync_server,
        upload::v1::{BytesMessage, upload_server},
    },
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use ring::digest::{SHA256, digest};
use tonic::{Request, Response, Status, Streaming};

use crate::{context::Context, engine::Dockerfile};

/// Name of the local source that is the Dockerfile.
pub(super) const DOCKERFILE_SOURCE: &str = "dockerfile";

/// A service for the build context, as a tar.
#[derive(Debug)]
pub(super) struct Upload(Arc<Context>);

/// A service for the Dockerfile, as a directory with one file.
///
/// It speaks the protocol of `fsutil`: the sender lists its files, the receiver requests the content of those
/// that it does not have, and both finish.
#[derive(Debug)]
pub(super) struct DockerfileSource {
    /// The file; `None` if it is in the context.
    file: Option<(Stat, Bytes)>,
}

/// A health service that reports the session as alive.
#[derive(Debug)]
pub(super) struct Healthy;

impl Upload {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self(context)
    }
}

impl DockerfileSource {
    pub(super) fn new(dockerfile: &Dockerfile) -> Self {
        let file = match dockerfile {
            Dockerfile::InContext(_) => None,
            Dockerfile::Beside { name, content } => {
                let stat = Stat {
                    path: name.clone(),
                    mode: 0o644,
                    size: i64::try_from(content.len()).unwrap_or(i64::MAX),
                    mod_time: time_of(content),
                    ..Stat::default()
                };
                Some((stat, content.clone()))
            }
        };
        Self { file }
    }

    /// Returns the packets that list the files.
    fn listing(&self) -> Vec<Packet> {
        let stats = self.file.iter().map(|(stat, _)| Some(stat.clone()));
        stats.chain([None]).map(|stat| Packet { stat, ..packet(PacketType::PacketStat) }).collect()
    }

    /// Returns the packets that are the content of the file with this number.
    fn content(&self, id: u32) -> Result<Vec<Packet>, Status> {
        /// Maximum size of a part, in bytes, as in `fsutil`.
        const PART: usize = 32 * 1024;
        let (_, content) =
            self.file.as_ref().filter(|_| id == 0).ok_or_else(|| Status::not_found(format!("file {id}")))?;
        let part = |data: &[u8]| Packet { data: data.to_vec(), ..packet(PacketType::PacketData) };
        // The empty part is the end.
        Ok(content.chunks(PART).chain([&[][..]]).map(part).collect())
    }
}

fn packet(kind: PacketType) -> Packet {
    Packet { r#type: kind.into(), ..Packet::default() }
}

/// Returns the modification time of a file, in nanoseconds, which depends on its content alone.
///
/// Older engines take files for equal that have one size and time, whatever is in them.
fn time_of(content: &[u8]) -> i64 {
    /// Number of seconds that every file system can store.
    const SECONDS: u64 = 1 << 31;
    let hash = digest(&SHA256, content);
    let bits = hash.as_ref().iter().take(8).fold(0, |bits: u64, byte| bits << 8 | u64::from(*byte));
    i64::try_from(bits % (SECONDS * 1_000_000_000)).unwrap_or_default()
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
impl file_sync_server::FileSync for DockerfileSource {
    type DiffCopyStream = Answers<Packet>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        let directory = request.metadata().get("dir-name").map(|name| name.as_bytes());
        if directory != Some(DOCKERFILE_SOURCE.as_bytes()) {
            return Err(Status::not_found("no such directory"));
        }
        let source = Self { file: self.file.clone() };
        let listing = stream::iter(source.listing().into_iter().map(Ok));
        let incoming = Some(request.into_inner());
        let answers = stream::try_unfold((source, incoming), |(source, incoming)| async {
            let Some(mut incoming) = incoming else { return Ok(None) };
            let Some(asked) = incoming.message().await? else { return Ok(None) };
            Ok(match asked.r#type() {
                PacketType::PacketReq => Some((source.content(asked.id)?, (source, Some(incoming)))),
                PacketType::PacketFin => Some((vec![packet(PacketType::PacketFin)], (source, None))),
                PacketType::PacketErr => {
                    let message = String::from_utf8_lossy(&asked.data).into_owned();
                    return Err(Status::aborted(message));
                }
                PacketType::PacketStat | PacketType::PacketData => {
                    Some((Vec::new(), (source, Some(incoming))))
                }
            })
        });
        let answers = answers.map_ok(|packets| stream::iter(packets.into_iter().map(Ok))).try_flatten();
        Ok(Response::new(listing.chain(answers).boxed()))
    }

    type TarStreamStream = Answers<Packet>;

    async fn tar_stream(
        &self,
        _request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::TarStreamStream>, Status> {
        Err(Status::unimplemented("TarStream"))
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
