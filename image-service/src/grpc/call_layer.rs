//! Middleware for all calls.
//!
//! It adds a span in the caller's trace, the deadline, the audit record of a write, and metrics.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use opentelemetry::{
    KeyValue,
    metrics::{Histogram, UpDownCounter},
};
use prost::Message;
use prost_types::{FileDescriptorSet, MethodDescriptorProto};
use service_runtime::{listener::ConnectInfo, telemetry};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::{audit::Audit, call_body::CallBody, caller_limits::CallSlot, code_names, status};
use crate::error::Error;

/// The layer that wraps services in [`Calls`].
#[derive(Clone, Debug)]
pub(super) struct CallsLayer {
    known: Arc<HashMap<Arc<str>, Kind>>,
    /// Permits for the calls of health that need no token, and for those of reflection.
    places: [Arc<Semaphore>; 2],
    /// Permits for the refusals that are delayed.
    held_back: Arc<Semaphore>,
    metrics: Metrics,
}

/// The kind of a method, which is streaming if either direction is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Kind {
    Unary,
    Streaming,
}

#[derive(Clone, Debug)]
struct Metrics {
    duration: Histogram<f64>,
    under_way: UpDownCounter<i64>,
}

impl CallsLayer {
    /// Maximum number of concurrent calls of health without a token, which is open to anyone.
    const WITHOUT_TOKEN: u32 = 1_000;
    /// Maximum number of concurrent calls of reflection, whose responses are large.
    const REFLECTIONS: u32 = 64;
    /// Maximum number of refusals delayed at a time. Further ones are sent at once.
    const HELD_BACK: usize = 1_000;
    /// Maximum duration of a unary call, which a database that does not respond could keep waiting for ever.
    const LONGEST: Duration = Duration::from_secs(60);
    /// Maximum duration of a call of reflection.
    const LONGEST_REFLECTION: Duration = Duration::from_secs(30);
    /// Delay before a caller that exceeds its limits gets its refusal.
    ///
    /// Most refused clients retry at once: without a delay some hundred calls keep a processor busy with
    /// refusals.
    const HOLD: Duration = Duration::from_secs(1);

    /// Creates the layer from the descriptor sets of the methods that metrics distinguish.
    pub(super) fn new(described: &[&[u8]]) -> Result<Self, prost::DecodeError> {
        let mut known = HashMap::new();
        for set in described {
            for file in FileDescriptorSet::decode(*set)?.file {
                for service in &file.service {
                    let service_name = format!("{}.{}", file.package(), service.name());
                    let method = |method: &MethodDescriptorProto| {
                        let name = format!("{service_name}/{}", method.name());
                        let streams = method.client_streaming() || method.server_streaming();
                        (Arc::from(name), if streams { Kind::Streaming } else { Kind::Unary })
                    };
                    known.extend(service.method.iter().map(method));
                }
            }
        }
        let meter = opentelemetry::global::meter(crate::PROGRAM);
        let metrics = Metrics {
            duration: meter
                .f64_histogram("rpc.server.call.duration")
                .with_unit("s")
                .with_description("Duration of calls; of streams, until their end")
                .with_boundaries(vec![
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0,
                ])
                .build(),
            under_way: meter
                .i64_up_down_counter("trailer.rpc.under_way")
                .with_unit("{call}")
                .with_description("Calls under way, streams included")
                .build(),
        };
        let places = [Self::WITHOUT_TOKEN, Self::REFLECTIONS];
        let places = places.map(|places| Arc::new(Semaphore::new(places as usize)));
        let held_back = Arc::new(Semaphore::new(Self::HELD_BACK));
        Ok(Self { known: Arc::new(known), places, held_back, metrics })
    }
}

impl<S> Layer<S> for CallsLayer {
    type Service = Calls<S>;

    fn layer(&self, inner: S) -> Calls<S> {
        Calls { inner, layer: self.clone() }
    }
}

/// A service with instrumented calls.
#[derive(Clone, Debug)]
pub(super) struct Calls<S> {
    inner: S,
    layer: CallsLayer,
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S, B> Service<Request<Body>> for Calls<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if !is_grpc(request.headers()) {
            let mut refusal = Response::new(Body::empty());
            *refusal.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return Box::pin(async move { Ok(refusal) });
        }
        let path = request.uri().path().trim_start_matches('/');
        // Calls of unknown methods must not create an unbounded number of metrics.
        let known = self.layer.known.get_key_value(path);
        let method = known.map_or_else(|| Arc::from("_OTHER"), |(method, _)| Arc::clone(method));
        let is_unary = known.is_some_and(|(_, kind)| *kind == Kind::Unary);
        // A health check must not be refused, and it completes at once.
        let is_reflection = path.starts_with("grpc.reflection.");
        let is_open_to_all = path.starts_with("grpc.") && !path.ends_with("/Check");
        let mut call = Call::begin(method, request.headers(), self.layer.metrics.clone());
        if is_open_to_all {
            let (places, limit) = match &self.layer.places {
                [_, reflections] if is_reflection => (reflections, CallsLayer::REFLECTIONS),
                [health, _] => (health, CallsLayer::WITHOUT_TOKEN),
            };
            let Ok(place) = Arc::clone(places).try_acquire_owned() else {
                call.code = Some(Code::ResourceExhausted);
                let refusal = Error::TooManyStreams { limit };
                return Box::pin(async move { Ok(Status::from(refusal).into_http()) });
            };
            call.place = Some(place);
        }
        let connection = request.extensions().get::<ConnectInfo>().map(|info| Arc::clone(info.connection()));
        let peer = connection.as_ref().map(|connection| connection.peer());
        let audit = Audit::for_call(&call.method, peer);
        request.extensions_mut().insert(audit.clone());
        if is_unary {
            request.extensions_mut().insert(call.slot.insert(CallSlot::default()).clone());
        }
        let begun = Instant::now();
        let Ok(timeout) = timeout(request.headers()) else {
            call.code = Some(Code::InvalidArgument);
            let refusal = status::malformed("the `grpc-timeout` must be at most eight digits and a unit");
            return Box::pin(async move { Ok(refusal.into_http()) });
        };
        let most = is_reflection.then_some(CallsLayer::LONGEST_REFLECTION);
        let deadline = timeout.into_iter().chain(most).min().map(|timeout| begun + timeout);
        let longest = is_unary.then(|| begun + CallsLayer::LONGEST);
        let span = call.span.clone();
        let held_back = Arc::clone(&self.layer.held_back);
        // Authentication takes place within this call.
        let answering = span.in_scope(|| self.inner.call(request));
        let answer = async move {
            let audited = audit.begin();
            let is_late = || deadline.is_some_and(|deadline| deadline <= Instant::now());
            let answered = match deadline.into_iter().chain(longest).min() {
                None => answering.await?.map(Body::new),
                Some(_) if is_late() => status::too_late().into_http(),
                Some(end) => match tokio::time::timeout_at(end, answering).await {
                    Ok(answered) => answered?.map(Body::new),
                    Err(_) if is_late() => status::too_late().into_http(),
                    Err(_) => Status::from(Error::Busy).into_http(),
                },
            };
            let code = answered
                .headers()
                .get("grpc-status")
                .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
            audited.conclude(code);
            if code == Code::ResourceExhausted {
                hold_back(&held_back, deadline).await;
            }
            let mut call = call;
            call.end((code != Code::Ok).then_some(code));
            Ok(answered.map(|body| Body::new(CallBody::new(body, call, deadline, connection))))
        };
        Box::pin(answer.instrument(span))
    }
}

/// Reports whether a request says that it is gRPC, in any format of messages.
fn is_grpc(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let format = content_type.and_then(|value| value.trim_start().strip_prefix("application/grpc"));
    format.is_some_and(|format| format.is_empty() || format.starts_with(['+', ';']))
}

/// Delays a refusal, for at most half of the time until the caller's deadline.
async fn hold_back(places: &Semaphore, deadline: Option<Instant>) {
    if let Ok(_place) = places.try_acquire() {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()) / 2);
        tokio::time::sleep(left.map_or(CallsLayer::HOLD, |left| left.min(CallsLayer::HOLD))).await;
    }
}

/// A call, recorded in the metrics when dropped.
#[derive(Debug)]
pub(super) struct Call {
    method: Arc<str>,
    begun: Instant,
    pub(super) span: Span,
    metrics: Metrics,
    /// Status at the end of the call; `None` if the caller left before.
    pub(super) code: Option<Code>,
    place: Option<OwnedSemaphorePermit>,
    /// Slot of a unary call.
    pub(super) slot: Option<CallSlot>,
}

impl Call {
    fn begin(method: Arc<str>, headers: &HeaderMap, metrics: Metrics) -> Self {
        let span = tracing::info_span!(
            "call",
            otel.name = &*method,
            otel.kind = "server",
            enduser.id = Empty,
            trace_id = Empty,
        );
        // For traces only, because the log already has the name.
        span.set_attribute("rpc.system.name", "grpc");
        span.set_attribute("rpc.method", Arc::clone(&method));
        // Without telemetry there is no trace to continue.
        let _ = span.set_parent(telemetry::context_of_call(headers));
        if let Some(trace_id) = span.in_scope(telemetry::trace_id) {
            span.record("trace_id", trace_id);
        }
        metrics.under_way.add(1, &[]);
        Self { method, begun: Instant::now(), span, metrics, code: None, place: None, slot: None }
    }

    /// Records the status of a call that has ended, which no longer counts as in progress.
    ///
    /// This happens before the caller can observe the end of the call.
    pub(super) fn end(&mut self, code: Option<Code>) {
        if code.is_some() {
            self.slot = None;
        }
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let name = code_names::name(code);
        self.span.set_attribute("rpc.response.status_code", name);
        if code_names::is_ours(code) {
            self.span.set_status(opentelemetry::trace::Status::error(name));
        }
        self.metrics.under_way.add(-1, &[]);
        let labels = [
            KeyValue::new("rpc.system.name", "grpc"),
            KeyValue::new("rpc.method", Arc::clone(&self.method)),
            KeyValue::new("rpc.response.status_code", name),
        ];
        self.metrics.duration.record(self.begun.elapsed().as_secs_f64(), &labels);
    }
}

/// Parses the caller's timeout; `None` if there is none.
///
/// # Errors
///
/// Returns an error unless it is at most eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, ()> {
    match headers.get("grpc-timeout") {
        Some(timeout) => timeout.to_str().ok().and_then(parse_timeout).map(Some).ok_or(()),
        None => Ok(None),
    }
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_eight_digits_and_a_unit() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("99999999S", Some(Duration::from_secs(99_999_999))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("0n", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("+1S", None),
            ("1", None),
            ("1s", None),
            ("123456789S", None),
        ] {
            assert_eq!(parse_timeout(text), expected, "{text:?}");
        }
    }
}
