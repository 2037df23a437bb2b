//! The peer of the service: a tonic server whose handlers only return answers encoded beforehand.

use std::{
    collections::HashMap,
    convert::Infallible,
    fs,
    marker::PhantomData,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    task::{Context, Poll},
};

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes};
use futures_util::{Stream, StreamExt as _, future::BoxFuture};
use prost::Message;
use proto::{codec, images as api};
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, DbBackend, Statement};
use tokio::sync::broadcast;
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{Codec, EncodeBuf, Encoder},
    server::{Grpc, NamedService, ServerStreamingService, UnaryService},
};
use tonic_prost::{ProstCodec, ProstDecoder};

/// Argument that makes this program run as a bare server.
pub(crate) const ARGUMENT: &str = "bare";
/// Name of the file with the answer to `GetImage`.
pub(crate) const IMAGE: &str = "image";

/// Runs a bare server with the arguments `ADDRESS DIRECTORY [URL]`.
///
/// Each file in the directory holds an encoded answer: [`IMAGE`] that of `GetImage`, and any other file that
/// of `ListImages` to a request whose page token is the file's name. With the URL of a Postgres database,
/// both run `SELECT 1` before they answer.
pub(crate) async fn serve(arguments: &[String]) -> anyhow::Result<()> {
    let [listen, directory, rest @ ..] = arguments else {
        anyhow::bail!("an address and a directory are needed");
    };
    let answers = read(Path::new(directory))?;
    let watched = match answers.get(IMAGE) {
        Some(answer) => api::GetImageResponse::decode(answer.clone())?.image.unwrap_or_default(),
        None => api::Image::default(),
    };
    let bare = Bare {
        answers: Arc::new(answers),
        database: match rest {
            [url, ..] => Some(connect(url).await?),
            [] => None,
        },
        watched: Arc::new(watched),
        live: broadcast::Sender::new(4_096),
        revision: Arc::default(),
    };
    let listen: SocketAddr = listen.parse()?;
    Ok(tonic::transport::Server::builder().add_service(bare).serve(listen).await?)
}

fn read(directory: &Path) -> anyhow::Result<HashMap<String, Bytes>> {
    let mut answers = HashMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        answers.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?.into());
    }
    Ok(answers)
}

/// Connects with the options that the service uses.
async fn connect(url: &str) -> anyhow::Result<DatabaseConnection> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(8).test_before_acquire(false).sqlx_logging(false);
    Database::connect(options).await.context("the database")
}

/// A server of `GetImage`, `ListImages`, `WatchImages` and `BatchImages`.
///
/// A batch sends every watcher one change per target.
#[derive(Clone, Debug)]
struct Bare {
    answers: Arc<HashMap<String, Bytes>>,
    database: Option<DatabaseConnection>,
    watched: Arc<api::Image>,
    live: broadcast::Sender<codec::WatchImagesResponse>,
    revision: Arc<AtomicI64>,
}

impl NamedService for Bare {
    const NAME: &'static str = "trailer.images.v1.ImageService";
}

impl tower::Service<http::Request<Body>> for Bare {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let bare = self.clone();
        Box::pin(async move {
            Ok(match request.uri().path().rsplit('/').next() {
                Some("GetImage") => Grpc::new(Raw::default()).unary(Get(bare), request).await,
                Some("ListImages") => Grpc::new(Raw::default()).unary(List(bare), request).await,
                Some("WatchImages") => {
                    Grpc::new(ProstCodec::default()).server_streaming(Watch(bare), request).await
                }
                Some("BatchImages") => Grpc::new(ProstCodec::default()).unary(Batch(bare), request).await,
                _ => Status::unimplemented("not of the comparison").into_http(),
            })
        })
    }
}

/// A codec that decodes messages and writes encoded bytes unchanged.
struct Raw<T>(PhantomData<T>);

struct RawEncoder;

impl<T> Default for Raw<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Default + Send + 'static> Codec for Raw<T> {
    type Encode = Bytes;
    type Decode = T;
    type Encoder = RawEncoder;
    type Decoder = ProstDecoder<T>;

    fn encoder(&mut self) -> RawEncoder {
        RawEncoder
    }

    fn decoder(&mut self) -> ProstDecoder<T> {
        ProstDecoder::default()
    }
}

impl Encoder for RawEncoder {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

struct Get(Bare);

impl UnaryService<api::GetImageRequest> for Get {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, _: Request<api::GetImageRequest>) -> Self::Future {
        let bare = self.0.clone();
        Box::pin(async move { bare.answer(IMAGE).await })
    }
}

struct List(Bare);

impl UnaryService<api::ListImagesRequest> for List {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<api::ListImagesRequest>) -> Self::Future {
        let bare = self.0.clone();
        Box::pin(async move { bare.answer(&request.get_ref().page_token).await })
    }
}

impl Bare {
    /// Returns a stored answer, after a round trip to the database if there is one.
    async fn answer(&self, name: &str) -> Result<Response<Bytes>, Status> {
        if let Some(database) = &self.database {
            let statement = Statement::from_string(DbBackend::Postgres, "SELECT 1");
            let row = database.query_one_raw(statement).await;
            row.map_err(|error| Status::internal(error.to_string()))?;
        }
        let found = self.answers.get(name).cloned();
        found.map(Response::new).ok_or_else(|| Status::not_found("there is no such answer"))
    }
}

struct Watch(Bare);

type Changes = Pin<Box<dyn Stream<Item = Result<codec::WatchImagesResponse, Status>> + Send>>;

impl ServerStreamingService<api::WatchImagesRequest> for Watch {
    type Response = codec::WatchImagesResponse;
    type ResponseStream = Changes;
    type Future = BoxFuture<'static, Result<Response<Changes>, Status>>;

    fn call(&mut self, _: Request<api::WatchImagesRequest>) -> Self::Future {
        let synced = codec::WatchImagesResponse {
            event: Some(codec::Event::Synced(api::Synced {})),
            ..Default::default()
        };
        let live = futures_util::stream::unfold(self.0.live.subscribe(), |mut live| async move {
            let next = live.recv().await.map_err(|error| Status::data_loss(error.to_string()));
            Some((next, live))
        });
        let changes: Changes = futures_util::stream::iter([Ok(synced)]).chain(live).boxed();
        Box::pin(std::future::ready(Ok(Response::new(changes))))
    }
}

struct Batch(Bare);

impl UnaryService<api::BatchImagesRequest> for Batch {
    type Response = api::BatchImagesResponse;
    type Future = std::future::Ready<Result<Response<api::BatchImagesResponse>, Status>>;

    fn call(&mut self, request: Request<api::BatchImagesRequest>) -> Self::Future {
        let mut results = Vec::new();
        for target in request.into_inner().targets {
            let revision = self.0.revision.fetch_add(1, Ordering::Relaxed);
            let image = api::Image { id: target.id, revision, ..api::Image::clone(&self.0.watched) };
            results.push(api::BatchResult {
                result: Some(api::batch_result::Result::Image(api::Image { revision, ..Default::default() })),
                ..Default::default()
            });
            let changed = codec::WatchImagesResponse {
                resume_revision: "1234567.0123456789abcdef.0123456789abcdef".to_owned(),
                event: Some(codec::Event::Changed(image.encode_to_vec().into())),
            };
            // There may be no watcher.
            let _ = self.0.live.send(changed);
        }
        let answer = api::BatchImagesResponse { results };
        std::future::ready(Ok(Response::new(answer)))
    }
}
