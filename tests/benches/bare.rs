//! What is compared with: a tonic server that does nothing but what is measured, with messages of the same types and sizes.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    str::FromStr as _,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    task::{Context, Poll},
};

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _, future::BoxFuture};
use prost::Message;
use proto::images as api;
use sea_orm::sqlx::{
    self, Row as _, SqlitePool,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteRow},
};
use tokio::sync::broadcast;
use tonic::{
    Request, Response, Status,
    body::Body,
    server::{Grpc, NamedService, ServerStreamingService, UnaryService},
};
use tonic_prost::ProstCodec;
use uuid::Uuid;

/// How this program is told to be such a server.
pub(crate) const ARGUMENT: &str = "bare";

/// What GetImage reads, in the form in which image-service reads it.
const SQL: &str = "SELECT i.*, c.json, g.\"view\", g.modify, g.\"delete\" FROM images i \
                   JOIN configurations c ON c.image = i.id AND c.revision = i.configuration_revision \
                   LEFT JOIN grants g ON g.image = i.id AND g.subject = $1 WHERE i.id = $2 AND NOT i.deleted";

/// `ADDRESS MESSAGE [DATABASE]`: the file `MESSAGE` holds what is answered.
pub(crate) async fn serve(arguments: &[String]) -> anyhow::Result<()> {
    let [listen, message, rest @ ..] = arguments else {
        anyhow::bail!("an address and a file are needed");
    };
    let message = std::fs::read(message)?;
    let database = match rest {
        [database, ..] => Some(connect(database).await?),
        [] => None,
    };
    let bare = Bare {
        database,
        image: Arc::new(api::GetImageResponse::decode(message.as_slice())?),
        live: broadcast::Sender::new(4_096),
        revision: Arc::default(),
    };
    let listen: SocketAddr = listen.parse()?;
    Ok(tonic::transport::Server::builder().add_service(bare).serve(listen).await?)
}

async fn connect(database: &str) -> anyhow::Result<SqlitePool> {
    let options = SqliteConnectOptions::from_str(&format!("sqlite://{database}"))?.foreign_keys(true);
    SqlitePoolOptions::new()
        .max_connections(8)
        .test_before_acquire(false)
        .connect_with(options)
        .await
        .context("the database")
}

/// Answers GetImage after the statement, and WatchImages with as many changes as BatchImages has targets.
#[derive(Clone, Debug)]
struct Bare {
    database: Option<SqlitePool>,
    image: Arc<api::GetImageResponse>,
    live: broadcast::Sender<api::WatchImagesResponse>,
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
                Some("GetImage") => Grpc::new(ProstCodec::default()).unary(Get(bare), request).await,
                Some("WatchImages") => {
                    Grpc::new(ProstCodec::default()).server_streaming(Watch(bare), request).await
                }
                Some("BatchImages") => Grpc::new(ProstCodec::default()).unary(Batch(bare), request).await,
                _ => Status::unimplemented("not of the comparison").into_http(),
            })
        })
    }
}

struct Get(Bare);

impl UnaryService<api::GetImageRequest> for Get {
    type Response = api::GetImageResponse;
    type Future = BoxFuture<'static, Result<Response<api::GetImageResponse>, Status>>;

    fn call(&mut self, request: Request<api::GetImageRequest>) -> Self::Future {
        let Bare { database, image, .. } = self.0.clone();
        Box::pin(async move {
            let id: Uuid = request.into_inner().id.parse().map_err(|_| Status::invalid_argument("id"))?;
            if let Some(database) = database {
                let row: SqliteRow = sqlx::query(SQL)
                    .bind("somebody")
                    .bind(id)
                    .fetch_one(&database)
                    .await
                    .map_err(|error| Status::internal(error.to_string()))?;
                let name: String = row.get("name");
                let json: String = row.get("json");
                std::hint::black_box((name, json));
            }
            Ok(Response::new((*image).clone()))
        })
    }
}

struct Watch(Bare);

type Changes = Pin<Box<dyn Stream<Item = Result<api::WatchImagesResponse, Status>> + Send>>;

impl ServerStreamingService<api::WatchImagesRequest> for Watch {
    type Response = api::WatchImagesResponse;
    type ResponseStream = Changes;
    type Future = BoxFuture<'static, Result<Response<Changes>, Status>>;

    fn call(&mut self, _: Request<api::WatchImagesRequest>) -> Self::Future {
        let synced = api::WatchImagesResponse {
            event: Some(api::watch_images_response::Event::Synced(api::Synced {})),
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
    type Future = BoxFuture<'static, Result<Response<api::BatchImagesResponse>, Status>>;

    fn call(&mut self, request: Request<api::BatchImagesRequest>) -> Self::Future {
        let image = self.0.image.image.clone().unwrap_or_default();
        let mut results = Vec::new();
        for target in request.into_inner().targets {
            let revision = self.0.revision.fetch_add(1, Ordering::Relaxed);
            let image = api::Image { id: target.id, revision, ..image.clone() };
            results.push(api::BatchResult {
                result: Some(api::batch_result::Result::Image(api::Image { revision, ..Default::default() })),
                ..Default::default()
            });
            let changed = api::WatchImagesResponse {
                resume_revision: "1234567.0123456789abcdef.0123456789abcdef".to_owned(),
                event: Some(api::watch_images_response::Event::Changed(Box::new(image))),
            };
            // Nobody may be watching.
            let _ = self.0.live.send(changed);
        }
        let answer = api::BatchImagesResponse { results };
        Box::pin(std::future::ready(Ok(Response::new(answer))))
    }
}
