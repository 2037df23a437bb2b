//! Limits of calls before anything is known of their callers: calls in progress on a connection, and the time
//! and size of a request's body.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::listener::{ConnectInfo, ConnectionCall};

/// The layer that wraps services in [`LimitedCalls`]. It has to be the outermost one.
#[derive(Copy, Clone, Debug)]
pub struct CallLimitsLayer {
    /// Reports whether the request of a method, by its path, is a stream.
    pub is_request_stream: fn(&str) -> bool,
    /// Reports whether a method, by its path, may use the connections that are reserved.
    pub is_reserved_for: fn(&str) -> bool,
    /// Returns the status of a refused call.
    pub status: fn(CallRefusal) -> Status,
}

/// Reason why a call is refused before anything is known of its caller.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallRefusal {
    /// No connection is left but those for health checks and workers.
    #[error("the service has too many connections; try again later")]
    TooManyConnections,
    /// The connection is not admitted and has many calls in progress.
    #[error("too many calls are in progress on this connection, which has proved no caller yet")]
    TooManyCalls,
    /// The headers exceed their limit.
    #[error("the headers of the call have over 16 KiB, which is the limit")]
    HeadersTooLarge,
    /// The request has not arrived in time.
    #[error("the request was not complete within 10 s")]
    RequestIncomplete,
}

/// A service whose calls are limited.
#[derive(Clone, Debug)]
pub struct LimitedCalls<S> {
    inner: S,
    layer: CallLimitsLayer,
}

/// The bytes of one caller's requests that have arrived, while the requests are incomplete.
pub trait ReceivedBytes: fmt::Debug + Send + Sync {
    /// Counts bytes that have arrived.
    ///
    /// # Errors
    ///
    /// Returns the status of the call if the caller has too many.
    fn add(&self, bytes: u64) -> Result<(), Status>;

    /// Takes back bytes that were counted.
    fn remove(&self, bytes: u64);
}

/// The slot in which authentication leaves the count for a request's caller, among its extensions.
#[derive(Clone, Debug, Default)]
pub struct BodyMeter(Arc<OnceLock<Box<dyn ReceivedBytes>>>);

impl BodyMeter {
    /// Sets the count, unless there is one.
    pub fn set(&self, received: Box<dyn ReceivedBytes>) {
        // The first one stays.
        let _ = self.0.set(received);
    }
}

impl<S> Layer<S> for CallLimitsLayer {
    type Service = LimitedCalls<S>;

    fn layer(&self, inner: S) -> LimitedCalls<S> {
        LimitedCalls { inner, layer: *self }
    }
}

/// Maximum size of the headers of a call, in bytes; a token with many claims takes a few thousand.
const HEADERS: usize = 16 * 1024;

/// Returns the size of headers in bytes, as HTTP/2 counts it.
fn size(headers: &HeaderMap) -> usize {
    const OVERHEAD: usize = 32;
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + OVERHEAD).sum()
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S> Service<Request<Body>> for LimitedCalls<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        /// Maximum number of calls in progress on a connection that is not admitted.
        const CALLS: u32 = 16;
        let status = self.layer.status;
        let refuse = |refusal| -> Answer<S::Error> {
            let refused = status(refusal).into_http();
            Box::pin(async move { Ok(refused) })
        };
        if size(request.headers()) > HEADERS {
            return refuse(CallRefusal::HeadersTooLarge);
        }
        let connection = request.extensions().get::<ConnectInfo>().map(|info| Arc::clone(info.connection()));
        let path = request.uri().path();
        let mut call = None;
        if let Some(connection) = connection {
            if connection.is_reserved() && !(self.layer.is_reserved_for)(path) {
                connection.close();
                return refuse(CallRefusal::TooManyConnections);
            }
            call = connection.begin_call(CALLS);
            if call.is_none() {
                return refuse(CallRefusal::TooManyCalls);
            }
        }
        if !(self.layer.is_request_stream)(path) {
            let meter = BodyMeter::default();
            request.extensions_mut().insert(meter.clone());
            request = request.map(|body| Body::new(RequestBody::new(body, meter, status)));
        }
        let answering = self.inner.call(request);
        Box::pin(
            async move { Ok(answering.await?.map(|body| Body::new(ResponseBody { body, _call: call }))) },
        )
    }
}

/// The body of a request that is one message.
struct RequestBody {
    body: Body,
    meter: BodyMeter,
    /// Number of bytes that have arrived.
    received: u64,
    /// Number of those that were counted for the caller.
    counted: u64,
    late: Pin<Box<Sleep>>,
    status: fn(CallRefusal) -> Status,
}

impl RequestBody {
    /// Maximum time until the whole body has arrived.
    const LIMIT: Duration = Duration::from_secs(10);

    fn new(body: Body, meter: BodyMeter, status: fn(CallRefusal) -> Status) -> Self {
        let late = Box::pin(tokio::time::sleep_until(Instant::now() + Self::LIMIT));
        Self { body, meter, received: 0, counted: 0, late, status }
    }

    fn count(&mut self) -> Result<(), Status> {
        let Some(received) = self.meter.0.get() else { return Ok(()) };
        let new = self.received - self.counted;
        self.counted = self.received;
        received.add(new)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(received) = self.meter.0.get() {
            received.remove(self.counted);
        }
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if let Err(status) = self.count() {
                    return Poll::Ready(Some(Err(status)));
                }
            }
            Poll::Pending if self.late.as_mut().poll(cx).is_ready() => {
                return Poll::Ready(Some(Err((self.status)(CallRefusal::RequestIncomplete))));
            }
            Poll::Ready(Some(Err(_)) | None) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a response, until whose end the call is in progress.
struct ResponseBody {
    body: Body,
    _call: Option<ConnectionCall>,
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
