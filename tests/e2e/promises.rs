//! Sentences of the manual about errors, etags and limits that belong to no other subject.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use image_service::Role;
use proto::images::{
    self as api, ImageStatus, UploadContextRequest, UploadContextStart, WatchImagesRequest,
    image_config::Source, render_dockerfile_request::Subject, upload_context_request::Part,
    watch_images_response::Event,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    actor::{Actor, hello},
    answers::{fields, reason, refused},
    client::{Client, grant_of, image, of_source},
    contexts::tar_of,
    eventually::{eventually, eventually_true},
    stack::Service,
};

fn pair(code: Code, reason: &str) -> (Code, String) {
    (code, reason.to_owned())
}

fn violated<T: std::fmt::Debug>(answer: Result<T, Status>) -> Vec<String> {
    fields(&answer.expect_err("it is refused"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_cannot_be_followed_from_an_event_that_it_does_not_have() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let request = api::WatchBuildRequest { id: build.id, after_sequence: 99 };
    let status = alice.builds.clone().watch_build(request).await.expect_err("it has one event");
    assert_eq!((status.code(), reason(&status)), pair(Code::OutOfRange, "SEQUENCE_UNAVAILABLE"));
    let info = status.get_details_error_info().context("an ErrorInfo")?;
    assert_eq!(info.metadata["last_sequence"], "1");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_watch_sends_bookmarks() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let request = WatchImagesRequest::default();
    let mut watch = service.builder("alice").images.watch_images(request).await?.into_inner();
    let mut events = Vec::new();
    for _ in 0..2 {
        let message = tokio::time::timeout(Duration::from_secs(15), watch.message()).await??;
        events.push(message.context("the watch goes on")?);
    }
    assert!(matches!(events[0].event, Some(Event::Synced(_))), "{events:?}");
    assert!(matches!(events[1].event, Some(Event::Bookmark(_))), "{events:?}");
    assert!(!events[1].resume_revision.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_is_not_resumed_with_another_query() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut watch = alice.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
    let after_revision = watch.message().await?.context("it is synced")?.resume_revision;
    let same = WatchImagesRequest { after_revision, ..WatchImagesRequest::default() };
    alice.images.clone().watch_images(same.clone()).await?;
    for other in [
        WatchImagesRequest { search: "a".to_owned(), ..same.clone() },
        WatchImagesRequest { kind: api::ImageKind::Image.into(), ..same.clone() },
        WatchImagesRequest { statuses: vec![ImageStatus::Building.into()], ..same.clone() },
        WatchImagesRequest { enabled: Some(true), ..same.clone() },
        WatchImagesRequest { pulled: Some(false), ..same.clone() },
        WatchImagesRequest { creator: "alice".to_owned(), ..same.clone() },
    ] {
        let refused = alice.images.clone().watch_images(other.clone()).await.map(drop);
        assert_eq!(violated(refused), ["after_revision"], "{other:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_id_is_a_uuid() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let Client { mut images, mut access, .. } = service.builder("alice");
    let bad = || "x".to_owned();
    let enable = api::EnableImageRequest { id: bad(), ..Default::default() };
    assert_eq!(violated(images.enable_image(enable).await), ["id"]);
    let disable = api::DisableImageRequest { id: bad(), ..Default::default() };
    assert_eq!(violated(images.disable_image(disable).await), ["id"]);
    assert_eq!(violated(images.clone_image(api::CloneImageRequest { id: bad() }).await), ["id"]);
    assert_eq!(violated(images.resolve_image(api::ResolveImageRequest { id: bad() }).await), ["id"]);
    let render = api::RenderDockerfileRequest { subject: Some(Subject::Id(bad())) };
    assert_eq!(violated(images.render_dockerfile(render).await), ["id"]);
    let list = api::ListGrantsRequest { image_id: bad(), ..Default::default() };
    assert_eq!(violated(access.list_grants(list).await), ["image_id"]);
    let grant = grant_of("bob\u{202e}", vec![0]);
    let request = api::GrantAccessRequest {
        image_id: bad(),
        grant: Some(grant),
        request_id: "x".repeat(129),
        ..Default::default()
    };
    let found = violated(access.grant_access(request).await);
    let found: BTreeSet<&str> = found.iter().map(String::as_str).collect();
    assert_eq!(found, ["grant.permissions[0]", "grant.subject", "image_id", "request_id"].into());
    let request = api::RevokeAccessRequest { image_id: bad(), grantee: None, ..Default::default() };
    let found = violated(access.revoke_access(request).await);
    assert_eq!(
        found.into_iter().collect::<BTreeSet<_>>(),
        ["grantee".to_owned(), "image_id".to_owned()].into()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_of_a_list_are_its_own() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let Client { mut workers, mut builds, .. } = service.builder("alice");
    let alice = service.builder("alice");
    for name in ["w2", "w1"] {
        Actor::greet(&service, hello(name, &[])).await?;
    }
    let mut names = Vec::new();
    let mut request = api::ListWorkersRequest { page_size: 1, ..Default::default() };
    loop {
        let page = workers.list_workers(request.clone()).await?.into_inner();
        names.extend(page.workers.into_iter().map(|worker| worker.name));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names, ["w1", "w2"]);
    let (one, _) = alice.create(image("One", "FROM scratch")).await?;
    let (other, _) = alice.create(image("Other", "FROM scratch")).await?;
    alice.cancel(&one.id).await?;
    alice.build(&one.id).await?;
    let request = api::ListBuildsRequest { image_id: one.id, page_size: 1, ..Default::default() };
    let page = builds.list_builds(request.clone()).await?.into_inner();
    assert_eq!(page.builds.len(), 1);
    let foreign = api::ListBuildsRequest { image_id: other.id, page_token: page.next_page_token, ..request };
    assert_eq!(violated(builds.list_builds(foreign.clone()).await), ["page_token"]);
    let negative = api::ListBuildsRequest { page_size: -1, page_token: String::new(), ..foreign };
    assert_eq!(violated(builds.list_builds(negative).await), ["page_size"]);
    let workers_token = api::ListWorkersRequest { page_token: "x".to_owned(), ..Default::default() };
    assert_eq!(violated(workers.list_workers(workers_token).await), ["page_token"]);
    Ok(())
}

/// Returns the request for a snapshot of a workspace of alice's that was started from `source`.
fn snapshot_of(source: &api::Image, image: api::Image) -> api::SnapshotWorkspaceRequest {
    api::SnapshotWorkspaceRequest {
        source_image_id: source.id.clone(),
        worker: "w1".to_owned(),
        container: "c".to_owned(),
        creator: "alice".to_owned(),
        image: Some(image),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dockerfile_elsewhere_is_not_rendered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let remote = api::DockerfileSource {
        remote: "https://example.org/context.git".to_owned(),
        ..api::DockerfileSource::default()
    };
    let (created, _) = alice.create(of_source("Remote", Source::Dockerfile(remote))).await?;
    let platform = service.client(&service.token("platform", &[Role::Service]));
    let snapshot = snapshot_of(&created, api::Image { name: "Snapshot".to_owned(), ..Default::default() });
    let snapshot = platform.images.clone().snapshot_workspace(snapshot).await?.into_inner();
    for id in [created.id, snapshot.image.context("an image")?.id] {
        let request = api::RenderDockerfileRequest { subject: Some(Subject::Id(id)) };
        let refused = refused(alice.images.clone().render_dockerfile(request).await);
        assert_eq!(refused, pair(Code::FailedPrecondition, "NO_DOCKERFILE"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_write_that_adds_something_has_a_quota() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-image-bytes", "6000"]).await?;
    let alice = service.builder("alice");
    let (mut created, _) = alice.create(image("A", "FROM scratch")).await?;
    let exceeded = || pair(Code::ResourceExhausted, "CREATOR_QUOTA_EXCEEDED");
    for validate_only in [true, false] {
        created.description = "x".repeat(4_000);
        created.config = image("A", &format!("FROM scratch\n{}", "#".repeat(4_000))).config;
        let update = api::UpdateImageRequest {
            image: Some(created.clone()),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["description".to_owned(), "config".to_owned()],
            }),
            validate_only,
            ..Default::default()
        };
        assert_eq!(refused(alice.images.clone().update_image(update).await), exceeded(), "{validate_only}");
        let platform = service.client(&service.token("platform", &[Role::Service]));
        let long = api::Image { name: "S".to_owned(), description: "x".repeat(4_096), ..Default::default() };
        let snapshot = api::SnapshotWorkspaceRequest { validate_only, ..snapshot_of(&created, long) };
        let refused = refused(platform.images.clone().snapshot_workspace(snapshot).await);
        assert_eq!(refused, exceeded(), "{validate_only}");
    }
    let mut granted = 0;
    let last = loop {
        match alice.grant(&created.id, &format!("{granted:0>200}"), &[api::Permission::View]).await {
            Ok(_) if granted < 1_000 => granted += 1,
            Ok(_) => anyhow::bail!("{granted} grants fit"),
            Err(status) => break status,
        }
    };
    assert_eq!((last.code(), reason(&last)), exceeded());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_can_be_repeated() -> anyhow::Result<()> {
    let service = Service::start().await?;
    Actor::greet(&service, hello("w1", &[])).await?;
    let admin = service.client(&service.token("root", &[Role::Admin]));
    let drain = api::DrainWorkerRequest {
        name: "w1".to_owned(),
        request_id: "drain".to_owned(),
        ..Default::default()
    };
    let resume = api::ResumeWorkerRequest {
        name: "w1".to_owned(),
        request_id: "resume".to_owned(),
        ..Default::default()
    };
    let mut workers = admin.workers.clone();
    let drained = workers.drain_worker(drain.clone()).await?.into_inner();
    workers.resume_worker(resume.clone()).await?;
    assert_eq!(workers.drain_worker(drain.clone()).await?.into_inner(), drained, "the first answer");
    let now = workers.list_workers(api::ListWorkersRequest::default()).await?.into_inner().workers;
    assert!(!now[0].drained, "and nothing more");
    let other = api::ResumeWorkerRequest { request_id: "drain".to_owned(), ..resume.clone() };
    assert_eq!(refused(workers.resume_worker(other).await), pair(Code::InvalidArgument, "REQUEST_ID_REUSED"));
    for id in ["x".repeat(129), "x y".to_owned(), "ä".to_owned()] {
        let bad = api::DrainWorkerRequest { request_id: id, ..drain.clone() };
        assert_eq!(violated(workers.drain_worker(bad).await), ["request_id"]);
    }
    let longest = api::DrainWorkerRequest { request_id: "x".repeat(128), ..drain };
    workers.drain_worker(longest).await?;
    Ok(())
}

/// Begins an upload, and returns its call, which does not end.
fn begin_upload(client: &Client) -> tokio::task::JoinHandle<Result<(), Status>> {
    let mut contexts = client.contexts.clone();
    tokio::spawn(async move {
        let start = UploadContextRequest { part: Some(Part::Start(UploadContextStart::default())) };
        let parts = stream::iter([start]).chain(stream::pending());
        contexts.upload_context(parts).await.map(drop)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_have_places_and_count_as_streams() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-streams", "5"]).await?;
    let mut under_way = Vec::new();
    for caller in ["alice", "bob"] {
        let client = service.builder(caller);
        under_way.extend((0..4).map(|_| (client.clone(), begin_upload(&client))));
    }
    let carol = service.builder("carol");
    let tar = tar_of(&[("file", b"text")])?;
    let refusal = eventually("all eight places are taken", async || {
        // Carol may have had the place of one.
        for (client, upload) in under_way.iter_mut().filter(|(_, upload)| upload.is_finished()) {
            *upload = begin_upload(client);
        }
        Ok(carol.upload("", &tar).await.err())
    })
    .await?;
    assert_eq!((refusal.code(), reason(&refusal)), pair(Code::ResourceExhausted, "TOO_MANY_UPLOADS"));
    assert!(refusal.get_details_retry_info().is_some());
    for (_, upload) in under_way {
        upload.abort();
    }
    eventually_true("there is a place again", async || Ok(carol.upload("", &tar).await.is_ok())).await?;
    // The fifth stream of a caller is its last.
    let mut watches = Vec::new();
    for _ in 0..5 {
        watches.push(carol.images.clone().watch_images(WatchImagesRequest::default()).await?);
    }
    let refusal = refused(carol.upload("", &tar).await);
    assert_eq!(refusal, pair(Code::ResourceExhausted, "TOO_MANY_STREAMS"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_upload_extends_the_retention() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let tar = tar_of(&[("file", b"text")])?;
    let nanos = |taken: &api::UploadContextResponse| {
        taken.expire_time.map(|time| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos))
    };
    let first = alice.upload("", &tar).await?;
    let second = alice.upload("", &tar).await?;
    let named = alice.upload(&first.digest, &[]).await?;
    assert!(
        nanos(&first) < nanos(&second) && nanos(&second) < nanos(&named),
        "{first:?} {second:?} {named:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_effect_changes_no_revision() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, _) = alice.create(image("A", "FROM scratch")).await?;
    alice.revoke(&created.id, "nobody").await?;
    let enable = api::EnableImageRequest { id: created.id.clone(), ..Default::default() };
    alice.images.clone().enable_image(enable).await?;
    assert_eq!(alice.get(&created.id).await?.revision, created.revision);
    // A second cancellation of a build that a worker holds.
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    actor.assignment().await?;
    let first = alice.cancel(&created.id).await?;
    assert!(first.cancel_requested);
    let before = alice.get(&created.id).await?;
    alice.cancel(&created.id).await?;
    assert_eq!(alice.get(&created.id).await?, before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_answers_without_long_texts() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let draft = api::Image { description: "long".to_owned(), ..image("A", "FROM scratch") };
    let (created, _) = alice.create(draft).await?;
    for validate_only in [true, false] {
        let request = api::BatchImagesRequest {
            action: api::BatchAction::Disable.into(),
            targets: vec![api::BatchTarget { id: created.id.clone(), ..Default::default() }],
            validate_only,
            ..Default::default()
        };
        let results = alice.images.clone().batch_images(request).await?.into_inner().results;
        let Some(api::batch_result::Result::Image(shown)) = &results[0].result else {
            anyhow::bail!("{results:?}");
        };
        assert!(shown.description.is_empty() && shown.config.is_none() && !shown.name.is_empty());
    }
    Ok(())
}
