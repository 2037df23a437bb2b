//! Previews, and writes to images that the caller does not see, which are answered while nobody can write.

use std::time::Duration;

use image_service::Role;
use proto::images as api;
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Status};

use crate::{
    answers::refused,
    client::{grant_of, image, revoked_from},
    stack::{LIMIT, Service, number},
};

fn target(id: &str) -> api::BatchTarget {
    api::BatchTarget { id: id.to_owned(), ..Default::default() }
}

/// Previews every kind of write.
async fn preview_everything(service: &Service, [id, cancellable]: [&str; 2]) -> Result<(), Status> {
    let validate_only = true;
    let (alice, admin) = (service.builder("alice"), service.client(&service.token("root", &[Role::Admin])));
    let (mut images, mut access) = (alice.images, alice.access);
    let id = || id.to_owned();
    let cancellable = cancellable.to_owned();

    let image_a = Some(image("A", "FROM scratch"));
    let create = api::CreateImageRequest { image: image_a, request_id: "once".to_owned(), validate_only };
    let created = images.create_image(create).await?.into_inner();
    assert_eq!(created.build.map(|build| build.queue_position), Some(2));
    let renamed = Some(api::Image { id: id(), name: "B".to_owned(), ..Default::default() });
    let update = api::UpdateImageRequest { image: renamed, validate_only, ..Default::default() };
    images.update_image(update).await?;
    images.build_image(api::BuildImageRequest { id: id(), validate_only, ..Default::default() }).await?;
    let cancel = api::CancelBuildRequest { id: cancellable.clone(), validate_only, ..Default::default() };
    images.cancel_build(cancel).await?;
    images.enable_image(api::EnableImageRequest { id: id(), validate_only, ..Default::default() }).await?;
    images.disable_image(api::DisableImageRequest { id: id(), validate_only, ..Default::default() }).await?;
    images.delete_image(api::DeleteImageRequest { id: id(), validate_only, ..Default::default() }).await?;
    for action in [api::BatchAction::Build, api::BatchAction::CancelBuild, api::BatchAction::Delete] {
        let targets = vec![target(&id()), target(&cancellable), target(&id())];
        let action = action.into();
        let batch = api::BatchImagesRequest { action, targets, validate_only, ..Default::default() };
        assert_eq!(images.batch_images(batch).await?.into_inner().results.len(), 3);
    }
    let snapshot = api::SnapshotWorkspaceRequest {
        source_image_id: id(),
        worker: "w1".to_owned(),
        container: "workspace".to_owned(),
        creator: "alice".to_owned(),
        image: Some(image("S", "")),
        validate_only,
        ..Default::default()
    };
    admin.images.clone().snapshot_workspace(snapshot).await?;

    let grant = Some(grant_of("bob", vec![api::Permission::View.into()]));
    let grant = api::GrantAccessRequest { image_id: id(), grant, validate_only, ..Default::default() };
    access.grant_access(grant).await?;
    let revoke = api::RevokeAccessRequest {
        image_id: id(),
        grantee: revoked_from("bob"),
        validate_only,
        ..Default::default()
    };
    access.revoke_access(revoke).await?;
    let name = || "absent".to_owned();
    let drain = api::DrainWorkerRequest { name: name(), validate_only, ..Default::default() };
    assert_eq!(refused(admin.workers.clone().drain_worker(drain).await).1, "WORKER_NOT_FOUND");
    let resume = api::ResumeWorkerRequest { name: name(), validate_only, ..Default::default() };
    assert_eq!(refused(admin.workers.clone().resume_worker(resume).await).1, "WORKER_NOT_FOUND");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preview_waits_for_nobody_who_writes() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    alice.cancel(&created.id).await?;
    let (pending, _) = alice.create(image("B", "FROM scratch")).await?;

    let writer = service.database().hold_writer().await?;
    let mut waiting = tokio::spawn({
        let (alice, id) = (alice.clone(), created.id.clone());
        async move { alice.build(&id).await }
    });
    let ids = [created.id.as_str(), pending.id.as_str()];
    tokio::time::timeout(LIMIT, preview_everything(&service, ids)).await??;
    assert!(!waiting.is_finished(), "whoever writes waits for who writes");
    writer.release().await?;
    let built = tokio::time::timeout(LIMIT, &mut waiting).await???;
    assert_eq!(built.number, 2, "nothing came of the previews");
    assert_eq!(alice.list().await?.len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_to_an_invisible_image_takes_no_transaction() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, mallory) = (service.builder("alice"), service.builder("mallory"));
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    let delete = api::DeleteImageRequest {
        id: alice.create(image("B", "FROM scratch")).await?.0.id,
        request_id: "gone".to_owned(),
        ..Default::default()
    };
    alice.images.clone().delete_image(delete.clone()).await?;
    let batch = |request_id: &str, ids: &[&str]| api::BatchImagesRequest {
        action: api::BatchAction::Delete.into(),
        targets: ids.iter().map(|id| target(id)).collect(),
        request_id: request_id.to_owned(),
        ..Default::default()
    };
    let gone = batch("batch", &[&alice.create(image("C", "FROM scratch")).await?.0.id]);
    let first = alice.images.clone().batch_images(gone.clone()).await?.into_inner();

    let writer = service.database().hold_writer().await?;
    let answers = async {
        let id = created.id.as_str();
        for code in [
            refused(mallory.build(id).await).0,
            refused(mallory.cancel(id).await).0,
            refused(mallory.delete(id).await).0,
            refused(mallory.grant(id, "mallory", &[api::Permission::View]).await).0,
            refused(mallory.revoke(id, "bob").await).0,
        ] {
            assert_eq!(code, Code::NotFound);
        }
        let unseen = batch("", &[id, "nonsense", &uuid::Uuid::now_v7().to_string()]);
        let rows = mallory.images.clone().batch_images(unseen).await?.into_inner().results;
        let codes = rows.into_iter().map(|row| match row.result {
            Some(api::batch_result::Result::Error(error)) => Code::from(error.code),
            other => panic!("{other:?} is no error"),
        });
        let expected = [Code::NotFound, Code::InvalidArgument, Code::NotFound];
        assert_eq!(codes.collect::<Vec<_>>(), expected);
        // A repeated request gets its first answer, although the image is gone.
        alice.images.clone().delete_image(delete.clone()).await?;
        assert_eq!(alice.images.clone().batch_images(gone).await?.into_inner(), first);
        let other = api::DeleteImageRequest { etag: "0".to_owned(), ..delete };
        assert_eq!(refused(alice.images.clone().delete_image(other).await).1, "REQUEST_ID_REUSED");
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(LIMIT, answers).await??;
    writer.release().await?;
    alice.delete(&created.id).await?;
    Ok(())
}

/// Sends `TRAILER_TEST_PREVIEWS` previews.
#[tokio::test(flavor = "multi_thread")]
async fn previews_of_large_batches_hold_up_nobody() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-call-rate", "0"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let mut targets = Vec::new();
    for i in 0..100 {
        let (created, _) = alice.create(image(&format!("Image {i}"), "FROM scratch")).await?;
        targets.extend(vec![target(&created.id); 10]);
    }
    let request = api::BatchImagesRequest {
        action: api::BatchAction::CancelBuild.into(),
        targets,
        validate_only: true,
        ..Default::default()
    };
    let begun = Instant::now();
    let mut previews = JoinSet::new();
    for _ in 0..number("TRAILER_TEST_PREVIEWS", 100) {
        let (mut client, request) = (alice.images.clone(), request.clone());
        previews.spawn(async move { client.batch_images(request).await });
    }
    let mut beside = Vec::new();
    while let Some(done) = previews.join_next().await {
        assert_eq!(done??.into_inner().results.len(), 1_000);
        let begun = Instant::now();
        bob.list().await?;
        beside.push(begun.elapsed());
    }
    beside.sort();
    let (count, median) = (beside.len(), beside[beside.len() / 2]);
    eprintln!("{count} previews of 1,000 rows in {:?}; a list beside them in {median:?}", begun.elapsed());
    assert!(median < Duration::from_secs(1), "{beside:?}");
    Ok(())
}
