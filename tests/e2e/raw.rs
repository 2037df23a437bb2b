//! Calls with bytes of one's choice, over HTTP/2 without a gRPC library.

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::{Code, Status};

use crate::{
    answers::reason,
    stack::{LIMIT, Service},
};

pub(crate) async fn call(
    service: &Service,
    method: &str,
    token: &str,
    body: Vec<u8>,
) -> anyhow::Result<(Code, String)> {
    call_within(service, method, token, None, body).await
}

/// A call with a `grpc-timeout`.
pub(crate) async fn call_within(
    service: &Service,
    method: &str,
    token: &str,
    timeout: Option<&str>,
    body: Vec<u8>,
) -> anyhow::Result<(Code, String)> {
    let stream = TokioIo::new(TcpStream::connect(service.addr).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
    let connection = tokio::spawn(connection);
    let mut request = http::Request::post(format!("http://{}{method}", service.addr))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {token}"));
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", timeout);
    }
    let request = request.body(Full::new(Bytes::from(body)))?;
    let response = tokio::time::timeout(LIMIT, sender.send_request(request)).await??;
    let mut status = Status::from_header_map(response.headers());
    let mut body = response.into_body();
    while status.is_none() {
        // A watch that was begun answers at once, and would go on for ever.
        let frame = tokio::time::timeout(LIMIT, body.frame()).await?;
        match frame.transpose()? {
            Some(frame) if frame.is_data() => status = Some(Status::ok("")),
            Some(frame) => {
                let trailers = frame.into_trailers().ok().context("neither data nor trailers")?;
                status = Status::from_header_map(&trailers);
            }
            None => anyhow::bail!("an answer without a status"),
        }
    }
    connection.abort();
    let status = status.context("an answer without a status")?;
    Ok((status.code(), reason(&status)))
}
