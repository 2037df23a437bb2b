//! Telemetry of the queue: how long builds wait, how long they take, and the span of a trace between the two
//! services.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::{
    Context, KeyValue, global,
    metrics::Histogram,
    trace::{Span as _, SpanKind, TraceContextExt, Tracer},
};
use service_runtime::telemetry;

use crate::{
    build::{Build, Fault, Kind, State},
    timestamp::Timestamp,
};

/// The instruments of the queue.
#[derive(Debug)]
pub(super) struct QueueMetrics {
    waited: Histogram<f64>,
    took: Histogram<f64>,
}

impl QueueMetrics {
    pub(super) fn new() -> Self {
        let meter = global::meter(crate::PROGRAM);
        let seconds = vec![
            0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0,
            7_200.0,
        ];
        Self {
            waited: meter
                .f64_histogram("trailer.dispatch.duration")
                .with_unit("s")
                .with_description("Time that builds spent in the queue until a worker claimed them")
                .with_boundaries(seconds.clone())
                .build(),
            took: meter
                .f64_histogram("trailer.build.duration")
                .with_unit("s")
                .with_description("Duration of the last attempt of builds, by outcome")
                .with_boundaries(seconds)
                .build(),
        }
    }

    /// Records the wait of a claimed build, and returns the `traceparent` under which its worker continues.
    ///
    /// The first wait of a build is a span of its trace.
    pub(super) fn claimed(&self, build: &Build) -> Option<String> {
        // The row does not say when a build was requeued.
        let claimed_at = build.claimed_at.filter(|_| build.attempt == 1)?;
        self.waited.record(
            seconds(build.queued_at, claimed_at),
            &[KeyValue::new("trailer.build.kind", kind(build.kind))],
        );
        let parent = telemetry::context_of(build.trace.as_deref()?);
        let tracer = global::tracer(crate::PROGRAM);
        let mut span = tracer
            .span_builder("queue")
            .with_kind(SpanKind::Producer)
            .with_start_time(time(build.queued_at))
            .with_attributes([
                KeyValue::new("trailer.build.id", build.id.to_string()),
                KeyValue::new("trailer.build.attempt", i64::from(build.attempt)),
                KeyValue::new("trailer.worker", build.worker.clone().unwrap_or_default()),
            ])
            .start_with_context(&tracer, &parent);
        span.end_with_timestamp(time(claimed_at));
        telemetry::traceparent_of(&Context::new().with_span(span))
    }

    /// Records the duration of a final build.
    pub(super) fn ended(&self, build: &Build) {
        let (Some(started_at), Some(finished_at)) = (build.started_at, build.finished_at) else {
            return;
        };
        let outcome = match (build.state, build.error.as_ref().map(|failure| failure.fault)) {
            (State::Succeeded, _) => "succeeded",
            (State::Cancelled, _) => "cancelled",
            (_, Some(Fault::User)) => "user_error",
            (_, Some(Fault::Timeout)) => "timeout",
            (_, Some(Fault::Infrastructure) | None) => "infrastructure_error",
        };
        let labels = [
            KeyValue::new("trailer.build.kind", kind(build.kind)),
            KeyValue::new("trailer.build.outcome", outcome),
        ];
        self.took.record(seconds(started_at, finished_at), &labels);
    }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Build => "build",
        Kind::Pull => "pull",
        Kind::Snapshot => "snapshot",
    }
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    between(from.micros(), to.micros()).as_secs_f64()
}

fn time(at: Timestamp) -> SystemTime {
    UNIX_EPOCH + between(0, at.micros())
}

fn between(from: i64, to: i64) -> Duration {
    Duration::from_micros(u64::try_from(to.saturating_sub(from)).unwrap_or(0))
}
