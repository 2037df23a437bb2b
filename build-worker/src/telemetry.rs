//! Telemetry of a worker: the spans of its attempts and their steps, and the metrics of its slots.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use opentelemetry::{
    Context, KeyValue,
    global::{self, BoxedSpan},
    trace::{Span as _, Status, Tracer},
};
use prost_types::Timestamp;
use proto::dispatch::{Assignment, StepState, report_event::Event};
use service_runtime::telemetry;
use tokio::sync::Semaphore;
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::output::Timed;

/// Returns the span of an attempt, in the trace of the call that requested the build.
pub(crate) fn attempt(assignment: &Assignment) -> Span {
    let attempt = assignment.attempt.clone().unwrap_or_default();
    let span = tracing::info_span!(
        "attempt",
        otel.kind = "consumer",
        trailer.build.id = attempt.build_id,
        trailer.build.attempt = attempt.number,
        trailer.image.id = assignment.image_id,
        trace_id = Empty,
    );
    // Without telemetry there is no trace to continue.
    let _ = span.set_parent(telemetry::context_of(&assignment.traceparent));
    if let Some(trace_id) = span.in_scope(telemetry::trace_id) {
        span.record("trace_id", trace_id);
    }
    span
}

/// The spans of an attempt's steps, exported when the steps end, with the engine's times.
#[derive(Debug)]
pub(crate) struct StepSpans {
    attempt: Context,
    /// Names and start times of the steps under way, by their indexes.
    begun: HashMap<i32, (String, SystemTime)>,
}

impl StepSpans {
    /// Creates spans below that of the current attempt.
    pub(crate) fn new() -> Self {
        Self { attempt: Span::current().context(), begun: HashMap::new() }
    }

    /// Takes in the reported events.
    pub(crate) fn take(&mut self, events: &[Timed]) {
        for (at, event) in events {
            let Event::Step(step) = event else { continue };
            let at = at.as_ref().and_then(time).unwrap_or_else(SystemTime::now);
            match step.state() {
                StepState::Started => {
                    self.begun.insert(step.index, (step.name.clone(), at));
                }
                StepState::Done | StepState::Cached | StepState::Failed => {
                    let begun = self.begun.remove(&step.index).map_or(at, |(_, begun)| begun);
                    let mut span = self.span(step.index, step.name.clone(), begun);
                    span.set_attribute(KeyValue::new(
                        "trailer.step.cached",
                        step.state() == StepState::Cached,
                    ));
                    if step.state() == StepState::Failed {
                        span.set_status(Status::error(step.error.clone()));
                    }
                    span.end_with_timestamp(at);
                }
                StepState::Pending | StepState::Unspecified => {}
            }
        }
    }

    fn span(&self, index: i32, name: String, begun: SystemTime) -> BoxedSpan {
        let tracer = global::tracer(crate::PROGRAM);
        tracer
            .span_builder(name)
            .with_start_time(begun)
            .with_attributes([KeyValue::new("trailer.step", i64::from(index))])
            .start_with_context(&tracer, &self.attempt)
    }
}

impl Drop for StepSpans {
    /// Ends the steps without a reported end, which were stopped or lost.
    fn drop(&mut self) {
        for (index, (name, begun)) in std::mem::take(&mut self.begun) {
            let mut span = self.span(index, name, begun);
            span.set_status(Status::error("it did not end by itself"));
            span.end();
        }
    }
}

fn time(at: &Timestamp) -> Option<SystemTime> {
    let (seconds, nanos) = (u64::try_from(at.seconds).ok()?, u32::try_from(at.nanos).ok()?);
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// Registers the metrics of slots: their number, and how many are taken.
pub(crate) fn slots(all: u16, free: &Arc<Semaphore>) {
    let meter = global::meter(crate::PROGRAM);
    let slots = meter.u64_observable_gauge("trailer.worker.slots").with_unit("{build}");
    let slots = slots.with_description("Maximum number of builds that the worker runs concurrently");
    slots.with_callback(move |gauge| gauge.observe(u64::from(all), &[])).build();
    // A meter keeps its callbacks forever.
    let free = Arc::downgrade(free);
    let taken = meter.u64_observable_gauge("trailer.worker.slots.taken").with_unit("{build}");
    let taken = taken.with_description("Number of builds that the worker runs now");
    taken
        .with_callback(move |gauge| {
            if let Some(free) = free.upgrade() {
                gauge.observe(usize::from(all).saturating_sub(free.available_permits()) as u64, &[]);
            }
        })
        .build();
}
