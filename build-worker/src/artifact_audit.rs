//! Audit of the artifacts that the catalogue expects in this worker's engine, from which someone may have
//! removed some.

use std::{collections::BTreeSet, time::Duration};

use proto::dispatch::{ExpectedArtifact, ListArtifactsRequest, ReportArtifactsRequest};
use tokio::time::{sleep, timeout};

use crate::{
    artifact_name::ArtifactName,
    engine::{Engine, EngineError},
    service_client::{ServiceClient, ServiceError},
};

/// Interval between audits, unless images are collected more often; a lost artifact is to be noticed within a
/// minute.
const INTERVAL: Duration = Duration::from_secs(20);
/// Deadline of each response of the service.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Number of artifacts in a full response of the service.
const PAGE: usize = 1_000;

/// The reason why an audit failed.
#[derive(Debug, thiserror::Error)]
enum AuditError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the service does not take part")]
    Service(#[from] ServiceError),
    #[error("the service does not respond")]
    Silent,
}

/// Audits periodically, at least each `interval`; `catalogue` returns an empty ID before the first
/// connection.
pub(crate) async fn run(
    engine: &dyn Engine,
    service: &dyn ServiceClient,
    interval: Duration,
    catalogue: impl Fn() -> String,
) {
    loop {
        sleep(interval.min(INTERVAL)).await;
        let catalogue = catalogue();
        if catalogue.is_empty() {
            continue;
        }
        if let Err(error) = audit(engine, service, &catalogue).await {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, source, "cannot audit the artifacts in the engine");
        }
    }
}

/// Compares the artifacts that the service expects with the names that the engine has, and reports
/// differences.
///
/// The engine is asked after the service: an artifact that the service knows already has its name.
async fn audit(engine: &dyn Engine, service: &dyn ServiceClient, catalogue: &str) -> Result<(), AuditError> {
    let mut after_image_id = String::new();
    loop {
        let request = ListArtifactsRequest { after_image_id };
        let listed = timeout(RESPONSE_TIMEOUT, service.list_artifacts(request)).await;
        let expected = listed.map_err(|_| AuditError::Silent)??.artifacts;
        let Some(last) = expected.last().and_then(|last| last.name.as_ref()) else { return Ok(()) };
        after_image_id = last.image_id.clone();
        let is_last = expected.len() < PAGE;
        let names = engine.names(&ArtifactName::repositories(catalogue)).await?;
        let report = differences(engine, catalogue, expected, &names.into_iter().collect()).await?;
        if !report.missing.is_empty() || !report.present.is_empty() {
            let (missing, present) = (report.missing.len(), report.present.len());
            tracing::warn!(
                missing,
                present,
                "artifacts in the engine differ from what the catalogue expects"
            );
            let reported = timeout(RESPONSE_TIMEOUT, service.report_artifacts(report)).await;
            reported.map_err(|_| AuditError::Silent)??;
        }
        if is_last {
            return Ok(());
        }
    }
}

/// Returns which artifacts the engine has lost, and which it has again. One that has only lost its name gets it back.
async fn differences(
    engine: &dyn Engine,
    catalogue: &str,
    expected: Vec<ExpectedArtifact>,
    held: &BTreeSet<String>,
) -> Result<ReportArtifactsRequest, EngineError> {
    let mut report = ReportArtifactsRequest::default();
    for ExpectedArtifact { name, missing, engine_image_id } in expected {
        let Some(name) = name else { continue };
        let in_engine = ArtifactName {
            catalogue: catalogue.to_owned(),
            image_id: name.image_id.clone(),
            build_id: name.build_id.clone(),
        }
        .to_string();
        let mut is_held = held.contains(&in_engine);
        if !is_held && engine.image(&engine_image_id).await?.is_some_and(|image| image.id == engine_image_id)
        {
            engine.tag(&engine_image_id, &in_engine).await?;
            tracing::info!(name = in_engine, "gave an artifact its name again");
            is_held = true;
        }
        match (is_held, missing) {
            (false, false) => report.missing.push(name),
            (true, true) => report.present.push(name),
            (true, false) | (false, true) => {}
        }
    }
    Ok(report)
}
