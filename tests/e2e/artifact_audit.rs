//! Artifacts that someone has removed from an engine by hand.

use anyhow::Context as _;
use bollard::{
    Docker,
    query_parameters::{RemoveImageOptions, RemoveImageOptionsBuilder},
};
use image_service::Role;
use proto::{
    dispatch::{ArtifactName, ListArtifactsRequest, ReportArtifactsRequest},
    images::{self as api, BuildState, ImageAction, ImageStatus, ResolveImageRequest},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    answers::{fields, reason},
    client::{Client, image},
    engine_fixture::Real,
    eventually::eventually_true,
    fake_engine::FakeEngine,
    stack::{Service, Worker},
};

async fn resolve(client: &Client, id: &str) -> Result<api::ResolveImageResponse, Status> {
    let request = ResolveImageRequest { id: id.to_owned() };
    Ok(client.images.clone().resolve_image(request).await?.into_inner())
}

/// Waits until an image tells that its artifact is missing, or is not, and returns the image.
async fn until_missing(client: &Client, id: &str, missing: bool) -> anyhow::Result<api::Image> {
    let mut shown = api::Image::default();
    eventually_true("the audit has found out", async || {
        shown = client.get(id).await?;
        Ok(shown.artifact.as_ref().is_some_and(|artifact| artifact.missing == missing))
    })
    .await?;
    Ok(shown)
}

/// Asserts that an image is refused for workspaces because its artifact is missing, and for nothing else.
async fn assert_not_resolved(client: &Client, id: &str) {
    let refused = resolve(client, id).await.expect_err("the artifact is missing");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "NOT_RESOLVABLE"));
    let violations = refused.get_details_precondition_failure().expect("a violation").violations;
    assert_eq!(violations.iter().map(|one| one.r#type.as_str()).collect::<Vec<_>>(), ["ARTIFACT_MISSING"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_artifact_is_missing_until_it_is_back_or_built_again() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let engine = FakeEngine::start().await?;
    let _worker =
        Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &["--collect-every", "200ms"])?;
    let docker = Docker::connect_with_host(&engine.docker_host())?;
    let alice = service.builder("alice");
    let (kept, build) = alice.create(image("Kept", "FROM scratch")).await?;
    alice.finished(&build.id).await?;
    let (lost, build) = alice.create(image("Lost", "FROM scratch\nENV LOST=1")).await?;
    alice.finished(&build.id).await?;
    let before = alice.get(&lost.id).await?;
    assert!(before.allowed_actions.contains(&ImageAction::CreateWorkspace.into()));
    let name = resolve(&alice, &lost.id).await?.reference;
    let engine_id = before.artifact.clone().context("an artifact")?.image_id;

    // One that has another name left gets its own again.
    docker.remove_image(&name, None::<RemoveImageOptions>, None).await?;
    eventually_true("the name is there again", async || Ok(docker.inspect_image(&name).await.is_ok()))
        .await?;
    assert!(!alice.get(&lost.id).await?.artifact.context("an artifact")?.missing);

    let saved = engine.image(&engine_id).context("an image")?;
    let force = || Some(RemoveImageOptionsBuilder::new().force(true).build());
    docker.remove_image(&engine_id, force(), None).await?;
    let shown = until_missing(&alice, &lost.id, true).await?;
    assert_eq!(shown.status(), ImageStatus::BuildFinished);
    assert!(!shown.allowed_actions.contains(&ImageAction::CreateWorkspace.into()), "{shown:?}");
    assert!(shown.revision > before.revision && shown.etag == before.etag, "{shown:?}");
    assert_not_resolved(&alice, &lost.id).await;

    // As `docker load` does, under whichever name.
    engine.load(saved, "restored:1");
    until_missing(&alice, &lost.id, false).await?;
    assert_eq!(resolve(&alice, &lost.id).await?.reference, name);

    docker.remove_image(&engine_id, force(), None).await?;
    until_missing(&alice, &lost.id, true).await?;
    let again = alice.finished(&alice.build(&lost.id).await?.id).await?;
    assert_eq!(again.state(), BuildState::Succeeded, "{again:?}");
    until_missing(&alice, &lost.id, false).await?;
    resolve(&alice, &lost.id).await?;
    assert!(!alice.get(&kept.id).await?.artifact.context("an artifact")?.missing);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_reports_the_current_artifacts_of_its_own_engine() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let engine = FakeEngine::start().await?;
    let worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (built, first) = alice.create(image("Built", "FROM scratch")).await?;
    alice.finished(&first.id).await?;
    let second = alice.build(&built.id).await?;
    alice.finished(&second.id).await?;
    worker.stop().await?;
    let dispatch = |name: &str| service.client(&service.token(name, &[Role::Worker])).dispatch;
    let artifact = |build: &str| ArtifactName { image_id: built.id.clone(), build_id: build.to_owned() };

    let expected = async |worker: &str, after_image_id: &str| -> anyhow::Result<Vec<ArtifactName>> {
        let request = ListArtifactsRequest { after_image_id: after_image_id.to_owned() };
        let artifacts = dispatch(worker).list_artifacts(request).await?.into_inner().artifacts;
        Ok(artifacts.into_iter().filter_map(|artifact| artifact.name).collect())
    };
    assert_eq!(expected("w1", "").await?, [artifact(&second.id)]);
    assert_eq!(expected("w1", &built.id).await?, []);
    assert_eq!(expected("w2", "").await?, []);

    for (worker, build, missing) in
        [("w2", &second.id, false), ("w1", &first.id, false), ("w1", &second.id, true)]
    {
        let request = ReportArtifactsRequest { missing: vec![artifact(build)], ..Default::default() };
        dispatch(worker).report_artifacts(request).await?;
        let shown = alice.get(&built.id).await?.artifact.context("an artifact")?;
        assert_eq!(shown.missing, missing, "{worker} has lost {build}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_of_artifacts_has_bounds() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    let request = ListArtifactsRequest { after_image_id: "x".to_owned() };
    let refused = worker.dispatch.clone().list_artifacts(request).await.expect_err("it is no UUID");
    assert_eq!(fields(&refused), ["after_image_id"]);
    let nil = uuid::Uuid::nil().to_string();
    let known = ArtifactName { image_id: nil.clone(), build_id: nil };
    for (request, field) in [
        (ReportArtifactsRequest { missing: vec![known.clone(); 1_001], present: vec![] }, "missing"),
        (
            ReportArtifactsRequest { missing: vec![], present: vec![known.clone(), ArtifactName::default()] },
            "present[1].image_id",
        ),
    ] {
        let refused = worker.dispatch.clone().report_artifacts(request).await.expect_err("it is invalid");
        assert_eq!(fields(&refused), [field]);
    }
    let nothing_of_ours = ReportArtifactsRequest { missing: vec![known; 1_000], present: vec![] };
    worker.dispatch.clone().report_artifacts(nothing_of_ours).await?;
    Ok(())
}

/// Covers `docker rmi --force` of an image with all of its names.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_removed_from_a_real_engine_is_not_resolved() -> anyhow::Result<()> {
    let real = Real::start_with(&["--collect-every", "1s"]).await?;
    let alice = real.alice();
    let wanted = image(&format!("Removed {}", real.run), &real.dockerfile("ENV REMOVED=1"));
    let (created, build) = alice.create(wanted).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let resolved = resolve(&alice, &created.id).await?;
    let force = RemoveImageOptionsBuilder::new().force(true).build();
    real.docker.remove_image(&resolved.image_id, Some(force), None).await?;
    until_missing(&alice, &created.id, true).await?;
    assert_not_resolved(&alice, &created.id).await;

    let again = alice.finished(&alice.build(&created.id).await?.id).await?;
    assert_eq!(again.state(), BuildState::Succeeded, "{again:?}");
    let resolved = resolve(&alice, &created.id).await?;
    real.docker.inspect_image(&resolved.reference).await?;
    real.clean(&[&created.reference]).await
}
