//! Floods of connections and of requests that never end: they close themselves, and others are served meanwhile.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{io::AsyncReadExt as _, net::TcpStream, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

use crate::{
    raw,
    stack::{LIMIT, Service},
};

const CHECK: &str = "/grpc.health.v1.Health/Check";
const CREATE: &str = "/trailer.images.v1.ImageService/CreateImage";

/// Makes calls on one connection whose requests announce a message and stop within it; returns how each has ended, and when.
async fn unfinished(
    addr: SocketAddr,
    method: &'static str,
    token: &str,
    calls: usize,
    length: usize,
) -> anyhow::Result<JoinSet<anyhow::Result<(Code, Duration)>>> {
    let stream = TokioIo::new(TcpStream::connect(addr).await?);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
    let connection = std::sync::Arc::new(AbortOnDropHandle::new(tokio::spawn(connection)));
    let begun = Instant::now();
    let announced = u32::try_from(length)?;
    let part = Bytes::from([&[0][..], &announced.to_be_bytes(), &vec![0; length - 1]].concat());
    let mut ended = JoinSet::new();
    for _ in 0..calls {
        let (mut sender, connection) = (sender.clone(), std::sync::Arc::clone(&connection));
        let body =
            stream::iter([Ok::<_, std::io::Error>(Frame::data(part.clone()))]).chain(stream::pending());
        let mut request = http::Request::post(format!("http://{addr}{method}"));
        request = request.header("content-type", "application/grpc").header("te", "trailers");
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(StreamBody::new(body))?;
        ended.spawn(async move {
            let response = tokio::time::timeout(LIMIT, sender.send_request(request)).await??;
            let (parts, body) = response.into_parts();
            let trailers = tokio::time::timeout(LIMIT, body.collect()).await??.trailers().cloned();
            let code = parts.headers.get("grpc-status").cloned();
            let code = code.or_else(|| trailers.and_then(|trailers| trailers.get("grpc-status").cloned()));
            drop(connection);
            Ok((Code::from_bytes(code.context("a status")?.as_bytes()), begun.elapsed()))
        });
    }
    Ok(ended)
}

/// Checks that the service serves others at once, on new connections.
async fn others_are_served(service: &Service) -> anyhow::Result<()> {
    let begun = Instant::now();
    service.builder("bob").list().await?;
    let (code, _) = raw::call_at(service.addr, CHECK, "", None, vec![0; 5]).await?;
    anyhow::ensure!(
        code == Code::Ok && begun.elapsed() < Duration::from_secs(2),
        "{code:?} after {:?}",
        begun.elapsed()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_make_room_for_others() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let mut silent = Vec::new();
    for _ in 0..700 {
        silent.push(TcpStream::connect(service.addr).await?);
    }
    others_are_served(&service).await?;
    // The oldest ones were closed.
    for connection in &mut silent[..100] {
        let closed = tokio::time::timeout(Duration::from_secs(5), connection.read(&mut [0; 64])).await;
        let closed = closed.context("it is still open")?;
        anyhow::ensure!(closed.is_err() || closed.is_ok_and(|read| read == 0));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_message_of_a_stranger_is_not_waited_for() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let mut ended = unfinished(service.addr, CHECK, "", 1_024, 4_000).await?;
    others_are_served(&service).await?;
    let mut late = 0;
    while let Some(ended) = ended.join_next().await {
        let (code, after) = ended??;
        if code == Code::ResourceExhausted {
            anyhow::ensure!(after < Duration::from_secs(8), "refused after {after:?}");
        } else {
            assert_eq!(code, Code::DeadlineExceeded, "after {after:?}");
            late += 1;
        }
    }
    assert_eq!(late, 16, "so many calls may a connection without a caller have");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_has_so_many_bytes_of_unfinished_requests() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let token = service.token("alice", &[image_service::Role::Builder]);
    let mut ended = unfinished(service.addr, CREATE, &token, 400, 1024 * 1024).await?;
    others_are_served(&service).await?;
    let mut codes = Vec::new();
    while let Some(ended) = ended.join_next().await {
        codes.push(ended??.0);
    }
    let late = codes.iter().filter(|code| **code == Code::DeadlineExceeded).count();
    let refused = codes.iter().filter(|code| **code == Code::ResourceExhausted).count();
    assert_eq!(late + refused, 400, "{codes:?}");
    assert!((20..=32).contains(&late), "{late} calls were within the limit");
    // Nothing of it still counts.
    service.builder("alice").create(crate::client::image("A", "FROM scratch")).await?;
    Ok(())
}
