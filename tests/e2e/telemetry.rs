//! Telemetry of the programs: traces, metrics, the log, and an audit record of every write.

use anyhow::Context as _;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use proto::images as api;
use serde_json::{Value, json};
use tonic::{Request, transport::Identity};

use crate::{
    authority::{Authority, flag},
    client::{grant_of, image},
    eventually::{eventually, eventually_true},
    fake_engine::{FakeEngine, Script},
    otlp_collector::Collector,
    programs::Catalogue,
    stack::LIMIT,
};

/// Environment variables that make a program export soon.
const SOON: [&str; 2] = ["OTEL_BSP_SCHEDULE_DELAY=100", "OTEL_METRIC_EXPORT_INTERVAL=200"];

/// Span name of a `BuildImage` call.
const BUILD_IMAGE: &str = "trailer.images.v1.ImageService/BuildImage";

/// Returns the only span of this name.
fn only<'a>(spans: &'a [(String, Span)], name: &str) -> anyhow::Result<&'a (String, Span)> {
    let mut found = spans.iter().filter(|(_, span)| span.name == name);
    let span = found.next().with_context(|| format!("no span {name:?}"))?;
    anyhow::ensure!(found.next().is_none(), "several spans {name:?}");
    Ok(span)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_goes_from_the_call_to_the_last_step_of_the_build() -> anyhow::Result<()> {
    let authority = Authority::new()?;
    let (issued, ca) = (authority.issue()?, authority.file());
    let identity = Identity::from_pem(std::fs::read(issued.cert)?, std::fs::read(issued.key)?);
    let collector = Collector::start_with(identity).await?;
    let endpoint = format!("https://{}", collector.addr);
    let otlp = ["--otlp-endpoint", endpoint.as_str(), "--otlp-ca", flag(&ca)];
    let engine = FakeEngine::start().await?;
    engine.script(
        Script::new().step("[1/2] FROM scratch").cached().step("[2/2] RUN make").log("made").succeed(),
    );
    let catalogue = Catalogue::create().await?;
    let service = catalogue.replica("image-service", &SOON, &otlp).await?;
    let _worker = catalogue.worker("w1", service.addr, &engine.docker_host(), &SOON, &otlp).await?;
    let alice = catalogue.builder("alice", service.addr);
    let (created, first) = alice.create(image("Traced", "FROM scratch\nRUN make")).await?;
    alice.finished(&first.id).await?;

    let (trace, of_client): (u128, u64) = (fastrand::u128(1..), fastrand::u64(1..));
    let mut request = Request::new(api::BuildImageRequest { id: created.id.clone(), ..Default::default() });
    let traceparent = format!("00-{trace:032x}-{of_client:016x}-01");
    request.metadata_mut().insert("traceparent", traceparent.parse()?);
    let build = alice.images.clone().build_image(request).await?.into_inner().build.context("a build")?;
    alice.finished(&build.id).await?;

    // Each program exports its own spans in its own time, in any order.
    let wanted = [BUILD_IMAGE, "queue", "attempt", "[1/2] FROM scratch", "[2/2] RUN make"];
    let spans = eventually("the trace is complete", async || {
        let spans = collector.trace(&trace.to_be_bytes());
        let is_complete = wanted.iter().all(|wanted| spans.iter().any(|(_, span)| span.name == *wanted));
        Ok(is_complete.then_some(spans))
    })
    .await
    .with_context(|| format!("{:#?}", collector.trace(&trace.to_be_bytes())))?;
    let (of_service, of_worker) = ("image-service", "build-worker");
    let mut parent = of_client.to_be_bytes().to_vec();
    for (name, program, kind) in [
        (BUILD_IMAGE, of_service, SpanKind::Server),
        ("queue", of_service, SpanKind::Producer),
        ("attempt", of_worker, SpanKind::Consumer),
    ] {
        let (program_of_span, span) = only(&spans, name)?;
        assert_eq!((program_of_span.as_str(), span.kind()), (program, kind), "{name}");
        assert_eq!(span.parent_span_id, parent, "{name}");
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{name}");
        parent.clone_from(&span.span_id);
    }
    for name in ["[1/2] FROM scratch", "[2/2] RUN make"] {
        let (program_of_span, span) = only(&spans, name)?;
        assert_eq!((program_of_span.as_str(), &span.parent_span_id), (of_worker, &parent), "{name}");
    }

    // Both programs export their metrics.
    let wanted = [
        (of_service, "rpc.server.call.duration"),
        (of_service, "trailer.queue.depth"),
        (of_service, "trailer.queue.age"),
        (of_service, "trailer.dispatch.duration"),
        (of_service, "trailer.build.duration"),
        (of_service, "trailer.watchers"),
        (of_service, "trailer.index.lag"),
        (of_service, "db.client.operation.duration"),
        (of_worker, "trailer.worker.slots"),
        (of_worker, "trailer.worker.slots.taken"),
    ];
    eventually_true("all metrics are exported", async || {
        let metrics = collector.metrics();
        let is_exported =
            |(program, name): &(&str, &str)| metrics.contains(&((*program).to_owned(), (*name).to_owned()));
        Ok(wanted.iter().all(is_exported))
    })
    .await
    .with_context(|| format!("only {:#?}", collector.metrics()))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_write_is_recorded_with_its_outcome_and_its_trace() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    let service = catalogue.replica("image-service", &["RUST_LOG=off"], &["--log-format", "json"]).await?;
    let (alice, bob) = (catalogue.builder("alice", service.addr), catalogue.builder("bob", service.addr));
    let (created, _) = alice.create(image("Recorded", "FROM scratch")).await?;
    let grant = api::GrantAccessRequest {
        image_id: created.id.clone(),
        grant: Some(grant_of("bob", vec![api::Permission::View.into()])),
        ..Default::default()
    };
    alice.access.clone().grant_access(grant).await?;
    let mut delete = Request::new(api::DeleteImageRequest {
        id: created.id.clone(),
        request_id: "r1".to_owned(),
        ..Default::default()
    });
    let trace = format!("{:032x}", fastrand::u128(1..));
    delete
        .metadata_mut()
        .insert("traceparent", format!("00-{trace}-{:016x}-01", fastrand::u64(1..)).parse()?);
    assert!(bob.images.clone().delete_image(delete).await.is_err());
    let batch = api::BatchImagesRequest {
        action: api::BatchAction::Disable.into(),
        targets: vec![api::BatchTarget { id: created.id.clone(), ..Default::default() }],
        validate_only: true,
        ..Default::default()
    };
    alice.images.clone().batch_images(batch.clone()).await?;
    alice.images.clone().batch_images(api::BatchImagesRequest { validate_only: false, ..batch }).await?;
    alice.get(&created.id).await?;

    let log = catalogue.log("image-service")?;
    let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert!(
        lines.iter().all(|line| line["target"] == "audit"),
        "nothing else is logged with RUST_LOG=off: {log}"
    );
    let record = |line: &Value| {
        let text = |field: &str| line["fields"][field].as_str().unwrap_or_default().to_owned();
        [text("caller"), text("action"), text("target"), text("outcome")]
    };
    let records: Vec<_> = lines.iter().map(record).collect();
    let id = created.id.as_str();
    assert_eq!(
        records,
        [
            ["alice", "CreateImage", id, "OK"],
            ["alice", "GrantAccess", id, "OK"],
            ["bob", "DeleteImage", id, "PERMISSION_DENIED"],
            ["alice", "BatchImages", "1 images", "OK"],
            ["alice", "BatchImages", id, "OK"],
            ["alice", "BatchImages", "1 images", "OK"],
        ]
    );
    let granted = &lines[1]["fields"];
    assert_eq!(
        (&granted["grantee"], &granted["permissions"]),
        (&json!("subject:bob"), &json!("PERMISSION_VIEW"))
    );
    assert_eq!(lines[3]["fields"]["batch_action"], "BATCH_ACTION_DISABLE");
    assert!(lines[0]["fields"].get("grantee").is_none(), "{}", lines[0]);
    for line in &lines {
        let peer = line["fields"]["peer"].as_str().unwrap_or_default();
        assert!(peer.starts_with("127.0.0.1:"), "{line}");
    }
    assert_eq!(lines[2]["fields"]["request_id"], "r1");
    assert_eq!(lines[3]["fields"]["validate_only"], true);
    assert_eq!(lines[2]["fields"]["trace_id"], trace, "the line names the trace of the call");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_keeps_nobody_waiting() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    // Nothing listens there.
    let otlp = ["--otlp-endpoint", "http://127.0.0.1:9"];
    let mut service = catalogue.replica("image-service", &SOON, &otlp).await?;
    let alice = catalogue.builder("alice", service.addr);
    let begun = std::time::Instant::now();
    for i in 0..50 {
        alice.create(image(&format!("Image {i}"), "FROM scratch")).await?;
    }
    assert!(begun.elapsed() < LIMIT);
    // The shutdown does not wait for the collector beyond its limit.
    service.restart().await?;
    alice.list().await?;
    Ok(())
}
