//! Audit of the artifacts that the catalogue expects in this worker's engine, from which someone may have
//! removed some.

use std::{collections::BTreeSet, time::Duration};

use proto::dispatch::{ArtifactName, ExpectedArtifact, ListArtifactsRequest, ReportArtifactsRequest};
use tokio::time::sleep;

use crate::{
    artifact_name,
    engine::{Engine, EngineError},
    labels::{CATALOGUE_LABEL, WORKER_LABEL},
    service_client::{self, ServiceClient, ServiceError},
};

/// Interval between audits, unless images are collected more often; a lost artifact is to be noticed within a
/// minute.
const INTERVAL: Duration = Duration::from_secs(20);
/// Number of artifacts in a full response of the service, and maximum number of each kind in a report.
const PAGE: usize = 1_000;

/// The reason why an audit failed.
#[derive(Debug, thiserror::Error)]
enum AuditError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the service does not take part")]
    Service(#[from] ServiceError),
}

/// Audits periodically, at least each `interval`; `catalogue` returns an empty ID before the first
/// connection.
pub(crate) async fn run(
    engine: &dyn Engine,
    service: &dyn ServiceClient,
    worker: &str,
    interval: Duration,
    catalogue: impl Fn() -> String,
) {
    loop {
        sleep(interval.min(INTERVAL)).await;
        let catalogue = catalogue();
        if catalogue.is_empty() {
            continue;
        }
        if let Err(error) = audit(engine, service, worker, &catalogue).await {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, source, "cannot audit the artifacts in the engine");
        }
    }
}

/// Compares the artifacts that the service expects with what the engine has, and reports differences.
///
/// The engine is asked after the service: an artifact that the service knows already has its name.
async fn audit(
    engine: &dyn Engine,
    service: &dyn ServiceClient,
    worker: &str,
    catalogue: &str,
) -> Result<(), AuditError> {
    let expected = expected(service).await?;
    let names = engine.names(&artifact_name::ArtifactName::repositories(catalogue)).await?;
    let names: BTreeSet<String> = names.into_iter().collect();
    let is_named = |artifact: &ExpectedArtifact| names.contains(&name_in_engine(catalogue, artifact));
    let (named, nameless): (Vec<_>, Vec<_>) = expected.into_iter().partition(is_named);
    let mut lost = Vec::new();
    let mut found: Vec<_> = named.into_iter().filter(|artifact| artifact.missing).collect();
    if !nameless.is_empty() {
        let images = engine.labelled(&[(WORKER_LABEL, worker), (CATALOGUE_LABEL, catalogue)]).await?;
        let images: BTreeSet<String> = images.into_iter().map(|image| image.id).collect();
        for artifact in nameless {
            if !images.contains(&artifact.engine_image_id) {
                lost.push(artifact);
                continue;
            }
            let name = name_in_engine(catalogue, &artifact);
            engine.tag(&artifact.engine_image_id, &name).await?;
            tracing::info!(name, "gave an artifact its name again");
            found.push(artifact);
        }
    }
    let changed = |artifacts: Vec<ExpectedArtifact>, was_missing: bool| -> Vec<ArtifactName> {
        let changed = artifacts.into_iter().filter(|artifact| artifact.missing == was_missing);
        changed.filter_map(|artifact| artifact.name).collect()
    };
    let (lost, found) = (changed(lost, false), changed(found, true));
    for missing in lost.chunks(PAGE) {
        tracing::warn!(count = missing.len(), "the engine has lost artifacts");
        let request = ReportArtifactsRequest { missing: missing.to_vec(), ..Default::default() };
        service_client::response(service.report_artifacts(request)).await?;
    }
    for present in found.chunks(PAGE) {
        tracing::info!(count = present.len(), "the engine has artifacts again");
        let request = ReportArtifactsRequest { present: present.to_vec(), ..Default::default() };
        service_client::response(service.report_artifacts(request)).await?;
    }
    Ok(())
}

/// Returns the artifacts that the service expects in this worker's engine.
async fn expected(service: &dyn ServiceClient) -> Result<Vec<ExpectedArtifact>, ServiceError> {
    let mut all: Vec<ExpectedArtifact> = Vec::new();
    loop {
        let last = all.last().and_then(|artifact| artifact.name.as_ref());
        let after_image_id = last.map(|name| name.image_id.clone()).unwrap_or_default();
        let request = ListArtifactsRequest { after_image_id };
        let page = service_client::response(service.list_artifacts(request)).await?.artifacts;
        let is_last = page.len() < PAGE;
        all.extend(page);
        if is_last {
            return Ok(all);
        }
    }
}

fn name_in_engine(catalogue: &str, artifact: &ExpectedArtifact) -> String {
    let ArtifactName { image_id, build_id } = artifact.name.clone().unwrap_or_default();
    artifact_name::ArtifactName { catalogue: catalogue.to_owned(), image_id, build_id }.to_string()
}
