//! Calls with arbitrary bytes: over HTTP/2 without a gRPC library, or as the messages of one.

use std::net::SocketAddr;

use anyhow::Context as _;
use bytes::{Buf as _, BufMut as _, Bytes};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Code, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use crate::{
    answers::reason,
    stack::{LIMIT, Service},
};

/// A codec that passes messages through as bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

/// Sends a request with this content type, or none, and returns the HTTP status of the response.
pub(crate) async fn http_status(
    addr: SocketAddr,
    method: &str,
    content_type: Option<&str>,
) -> anyhow::Result<http::StatusCode> {
    let stream = TokioIo::new(TcpStream::connect(addr).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut request = http::Request::post(format!("http://{addr}{method}"));
    if let Some(content_type) = content_type {
        request = request.header("content-type", content_type);
    }
    let request = request.body(Full::new(Bytes::from_static(&[0; 5])))?;
    let response = tokio::time::timeout(LIMIT, sender.send_request(request)).await??;
    drop(connection);
    Ok(response.status())
}

pub(crate) async fn call(
    service: &Service,
    method: &str,
    token: &str,
    body: Vec<u8>,
) -> anyhow::Result<(Code, String)> {
    call_within(service, method, token, None, body).await
}

/// Makes a call with a `grpc-timeout`.
pub(crate) async fn call_within(
    service: &Service,
    method: &str,
    token: &str,
    timeout: Option<&str>,
    body: Vec<u8>,
) -> anyhow::Result<(Code, String)> {
    call_at(service.addr, method, token, timeout, body).await
}

/// Makes a call to any server.
pub(crate) async fn call_at(
    addr: SocketAddr,
    method: &str,
    token: &str,
    timeout: Option<&str>,
    body: Vec<u8>,
) -> anyhow::Result<(Code, String)> {
    let stream = TokioIo::new(TcpStream::connect(addr).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
    let connection = tokio::spawn(connection);
    let mut request = http::Request::post(format!("http://{addr}{method}"))
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
        // A watch answers at once and would never end.
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
