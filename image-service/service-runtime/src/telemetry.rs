//! Telemetry of a program: its log, and traces and metrics by OTLP.
//!
//! Every call begins a `tracing` span; its trace continues in the work that the call gives to other programs,
//! by the W3C `traceparent`. Nothing waits for a collector: what cannot be delivered is dropped after a
//! while, and the log says so.

use std::{io::IsTerminal, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue, global,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_otlp::{MetricExporter, SpanExporter, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    metrics::SdkMeterProvider,
    propagation::TraceContextPropagator,
    trace::{Sampler, SdkTracerProvider},
};
use tonic::transport::{Channel, Endpoint};
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    EnvFilter, Layer, filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

use uuid::Uuid;

use crate::tls;

/// The options of telemetry.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// OTLP collector of traces and metrics, by gRPC: `http://host:4317` or `https://host:4317`. None are
    /// exported if absent. OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and OTEL_METRIC_EXPORT_INTERVAL are
    /// respected.
    #[arg(long, env = "TRAILER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// PEM file with the certificate authorities to trust for an https collector; the system's if absent.
    #[arg(long, env = "TRAILER_OTLP_CA", requires = "otlp_endpoint", value_name = "FILE")]
    pub otlp_ca: Option<PathBuf>,

    /// Format of the log.
    #[arg(long, env = "TRAILER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,
}

/// The format of the log.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Human-readable lines.
    Human,
    /// One JSON object per line.
    Json,
}

/// The telemetry of a process.
#[derive(Debug)]
pub struct Telemetry {
    tracers: SdkTracerProvider,
    meters: Option<SdkMeterProvider>,
}

/// Target of audit records, which are logged regardless of `RUST_LOG`.
pub const AUDIT: &str = "audit";

impl Telemetry {
    /// Maximum time for the collector to accept an export, the last one included.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// Starts logging and exporting for the whole process.
    ///
    /// `directives` are the log directives, unless `RUST_LOG` gives others. Must be called once, in a Tokio
    /// runtime.
    ///
    /// # Errors
    ///
    /// Returns an error if the options of the collector are invalid, or the process has a logger already.
    pub fn start(program: &'static str, directives: &str, options: &Options) -> anyhow::Result<Self> {
        tls::install_provider()?;
        let resource = resource(program);
        let channel = options.otlp_endpoint.as_deref().map(|_| channel(options)).transpose()?;
        let mut tracers = SdkTracerProvider::builder().with_resource(resource.clone());
        let mut meters = None;
        match channel {
            // There are trace IDs all the same, for the log and for called programs.
            None => tracers = tracers.with_sampler(Sampler::AlwaysOff),
            Some(channel) => {
                let spans = SpanExporter::builder().with_tonic().with_channel(channel.clone()).build()?;
                tracers = tracers.with_batch_exporter(spans);
                let figures = MetricExporter::builder().with_tonic().with_channel(channel).build()?;
                let provider = SdkMeterProvider::builder()
                    .with_resource(resource)
                    .with_periodic_exporter(figures)
                    .build();
                global::set_meter_provider(provider.clone());
                meters = Some(provider);
            }
        }
        let tracers = tracers.build();
        global::set_tracer_provider(tracers.clone());

        let audit = format!("{AUDIT}=info").parse().context("a directive")?;
        let filter = EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| EnvFilter::new(directives))
            .add_directive(audit);
        let log = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
        let log = match options.log_format {
            LogFormat::Human => log.boxed(),
            LogFormat::Json => log.json().with_span_list(false).boxed(),
        };
        let ours = Targets::new().with_target(program.replace('-', "_"), Level::INFO);
        // A stream enters its span for every message, so that must be cheap.
        let spans = tracing_opentelemetry::layer()
            .with_tracer(tracers.tracer(program))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false);
        tracing_subscriber::registry()
            .with(log.with_filter(filter))
            .with(spans.with_filter(ours))
            .try_init()?;
        count_panics(program);
        Ok(Self { tracers, meters })
    }

    /// Exports what is left, within 10 s at most.
    pub async fn end(self) {
        let ended = tokio::task::spawn_blocking(move || {
            // A collector that is unavailable has been logged before.
            let _ = self.tracers.shutdown_with_timeout(Self::PATIENCE);
            let _ = self.meters.map(|meters| meters.shutdown_with_timeout(Self::PATIENCE));
        });
        let _ = tokio::time::timeout(Self::PATIENCE * 2, ended).await;
    }
}

/// Returns the resource that exports: names from the environment, or else the program and a random ID.
fn resource(program: &'static str) -> Resource {
    let given = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let is_given = |key: &str| given.split(',').any(|pair| pair.trim_start().starts_with(&format!("{key}=")));
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() && !is_given("service.name") {
        resource = resource.with_service_name(program);
    }
    if !is_given("service.instance.id") {
        resource = resource.with_attribute(KeyValue::new("service.instance.id", Uuid::new_v4().to_string()));
    }
    resource.build()
}

fn channel(options: &Options) -> anyhow::Result<Channel> {
    let url = options.otlp_endpoint.clone().unwrap_or_default();
    let mut endpoint = Endpoint::from_shared(url.clone())
        .ok()
        .filter(|endpoint| endpoint.uri().scheme().is_some())
        .with_context(|| format!("--otlp-endpoint {url:?} is no URL"))?
        .connect_timeout(Telemetry::PATIENCE)
        .timeout(Telemetry::PATIENCE);
    if endpoint.uri().scheme_str() == Some("https") {
        endpoint =
            endpoint.tls_config(tls::client(options.otlp_ca.as_deref(), None).context("--otlp-ca")?)?;
    }
    Ok(endpoint.connect_lazy())
}

/// Counts and logs all panics, including caught ones.
fn count_panics(program: &'static str) {
    let panics =
        global::meter(program).u64_counter("trailer.panics").with_description("Panics, all caught").build();
    std::panic::set_hook(Box::new(move |panic| {
        panics.add(1, &[]);
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, message = panic.payload_as_str(), "a panic");
    }));
}

/// Returns the `traceparent` of a span, for continuing its trace; `None` if no telemetry is started.
pub fn traceparent(span: &Span) -> Option<String> {
    traceparent_of(&span.context())
}

/// Returns the `traceparent` of a context.
pub fn traceparent_of(context: &Context) -> Option<String> {
    let mut carrier = Carrier(None);
    TraceContextPropagator::new().inject_context(context, &mut carrier);
    carrier.0
}

/// Returns the context that a `traceparent` names, without a parent if it names none.
pub fn context_of(traceparent: &str) -> Context {
    TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &Carrier(Some(traceparent.to_owned())))
}

/// Returns the context in which a call was made.
pub fn context_of_call(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers))
}

/// Returns the ID of the current trace, 32 hexadecimal digits; `None` if no telemetry is started.
pub fn trace_id() -> Option<String> {
    let context = Span::current().context();
    let span = context.span();
    let of_span = span.span_context();
    of_span.is_valid().then(|| of_span.trace_id().to_string())
}

struct Carrier(Option<String>);

impl Injector for Carrier {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT {
            self.0 = Some(value);
        }
    }
}

impl Extractor for Carrier {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.as_deref().filter(|_| key == TRACEPARENT)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

const TRACEPARENT: &str = "traceparent";

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
