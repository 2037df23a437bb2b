//! What a program tells of itself: the log, and by OTLP traces and metrics.
//!
//! Every call begins a span of `tracing`; its trace goes on in what the call has others do, by the W3C `traceparent`.
//! Nothing waits for a collector: what cannot be delivered is dropped after a while, and the log says so.

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

/// Where to tell.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// The OTLP collector for traces and metrics, by gRPC: `http://host:4317` or `https://host:4317`. Without it none are told.
    /// OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER and OTEL_METRIC_EXPORT_INTERVAL are heeded.
    #[arg(long, env = "TRAILER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// The authorities that an https collector is trusted by, a PEM file; those of the system when absent.
    #[arg(long, env = "TRAILER_OTLP_CA", requires = "otlp_endpoint", value_name = "FILE")]
    pub otlp_ca: Option<PathBuf>,

    /// How to log.
    #[arg(long, env = "TRAILER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,
}

/// How to log.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// The telemetry of a process.
#[derive(Debug)]
pub struct Telemetry {
    tracers: SdkTracerProvider,
    meters: Option<SdkMeterProvider>,
}

/// The target of audit records, which the log has whatever `RUST_LOG` says.
pub const AUDIT: &str = "audit";

impl Telemetry {
    /// How long a collector may take for what is told at once, and at the end.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// Begins to log and to tell, for the whole process. `directives` are those of the log unless `RUST_LOG` gives others.
    ///
    /// To be called once, in a runtime of tokio.
    pub fn start(program: &'static str, directives: &str, options: &Options) -> anyhow::Result<Self> {
        tls::install_provider()?;
        let resource = resource(program);
        let channel = options.otlp_endpoint.as_deref().map(|_| channel(options)).transpose()?;
        let mut tracers = SdkTracerProvider::builder().with_resource(resource.clone());
        let mut meters = None;
        match channel {
            // There are ids all the same, for the log and for those who are called.
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
        // A stream enters its span for every message, which is to be cheap.
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

    /// Delivers what is left, in 10 s at most.
    pub async fn end(self) {
        let ended = tokio::task::spawn_blocking(move || {
            // A collector that is away is no news by now.
            let _ = self.tracers.shutdown_with_timeout(Self::PATIENCE);
            let _ = self.meters.map(|meters| meters.shutdown_with_timeout(Self::PATIENCE));
        });
        let _ = tokio::time::timeout(Self::PATIENCE * 2, ended).await;
    }
}

/// What tells: by the names that the environment gives, or else the program's and one of this process.
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

/// Counts and logs panics, wherever they are caught.
fn count_panics(program: &'static str) {
    let panics =
        global::meter(program).u64_counter("trailer.panics").with_description("Panics, all caught").build();
    std::panic::set_hook(Box::new(move |panic| {
        panics.add(1, &[]);
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, message = panic.payload_as_str(), "a panic");
    }));
}

/// A span's `traceparent`, for whoever goes on with its trace; none where no telemetry is started.
pub fn traceparent(span: &Span) -> Option<String> {
    traceparent_of(&span.context())
}

/// A context's `traceparent`.
pub fn traceparent_of(context: &Context) -> Option<String> {
    let mut carrier = Carrier(None);
    TraceContextPropagator::new().inject_context(context, &mut carrier);
    carrier.0
}

/// The context that a `traceparent` names; without a parent where it names none.
pub fn context_of(traceparent: &str) -> Context {
    TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &Carrier(Some(traceparent.to_owned())))
}

/// The context that a call was made in.
pub fn context_of_call(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers))
}

/// The id of the present trace: 32 hexadecimal digits; none where no telemetry is started.
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
