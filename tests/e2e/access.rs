//! Authentication of callers, and visibility of records.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use image_service::Role;
use proto::images::{
    self as api, ListWorkersRequest, UploadContextRequest, UploadContextStart, WatchBuildRequest,
    WatchImagesRequest, upload_context_request::Part,
};
use tonic::{Code, Status};

use crate::{
    answers::{refused, without_ids},
    client::{Client, image},
    eventually::eventually_true,
    fake_engine::FakeEngine,
    stack::{LIMIT, Service, Worker},
};

fn pair(code: Code, reason: &str) -> (Code, String) {
    (code, reason.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_learns_who_it_is() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let everything = [Role::Service, Role::Builder, Role::Admin];
    for (roles, pools, expected_roles, expected_pools, may_create) in [
        (&[][..], &[][..], &[][..], &["default"][..], false),
        (&[Role::Service], &[], &["service"], &["default"], false),
        (&[Role::Builder], &["b", "a"], &["builder"], &["a", "b"], true),
        (&[Role::Admin], &[], &["admin"], &["default"], true),
        (&everything, &["a"], &["admin", "builder", "service"], &["a"], true),
    ] {
        let client = service.client(&service.token_in("alice", roles, pools));
        let known = client.access.clone().who_am_i(api::WhoAmIRequest {}).await?.into_inner();
        assert_eq!(known.subject, "alice");
        assert_eq!(
            (known.roles.as_slice(), known.pools.as_slice()),
            (&strings(expected_roles)[..], &strings(expected_pools)[..])
        );
        assert_eq!(known.may_create, may_create, "{known:?}");
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
        let life = known.expire_time.context("an expiry")?.seconds - now;
        assert!((3_000..=3_606).contains(&life), "{life} s");
        let created = client.create(image("Tools", "FROM scratch")).await;
        assert_eq!(created.is_ok(), may_create, "{created:?}");
    }
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    let answer = worker.access.clone().who_am_i(api::WhoAmIRequest {}).await;
    assert_eq!(refused(answer), pair(Code::PermissionDenied, "WORKER_TOKEN"));
    Ok(())
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_tokens_of_this_service_are_accepted() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let other = Service::start().await?;
    let expired = service.token_for("alice", &[Role::Admin], Duration::ZERO);
    let valid = service.token("alice", &[Role::Admin]);
    let (body, _) = valid.rsplit_once('.').expect("three parts");
    let claims = valid.split('.').nth(1).expect("claims");
    let unsigned = format!("eyJhbGciOiJub25lIn0.{claims}.");
    for (token, expected) in [
        ("", "TOKEN_MISSING"),
        ("nonsense", "TOKEN_INVALID"),
        (body, "TOKEN_INVALID"),
        (&unsigned, "TOKEN_INVALID"),
        (&other.token("alice", &[Role::Admin]), "TOKEN_INVALID"),
    ] {
        assert_eq!(
            refused(service.client(token).list().await),
            pair(Code::Unauthenticated, expected),
            "{token}"
        );
    }
    let expired = service.client(&expired);
    // A token is valid until the end of its last second.
    eventually_true("the token expires", async || Ok(expired.list().await.is_err())).await?;
    assert_eq!(refused(expired.list().await), pair(Code::Unauthenticated, "TOKEN_EXPIRED"));
    assert!(service.client(&valid).list().await.is_ok());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_token_is_good_for_its_api_alone() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    assert_eq!(refused(worker.list().await), pair(Code::PermissionDenied, "WORKER_TOKEN"));
    assert_eq!(
        refused(worker.create(image("A", "FROM scratch")).await),
        pair(Code::PermissionDenied, "WORKER_TOKEN")
    );
    for roles in [&[][..], &[Role::Builder], &[Role::Admin]] {
        let client = service.client(&service.token("alice", roles));
        let hello = tokio_stream::pending::<proto::dispatch::ConnectRequest>();
        let answer = client.dispatch.clone().connect(hello).await;
        assert_eq!(refused(answer.map(|_| ())), pair(Code::PermissionDenied, "ROLE_MISSING"));
    }
    let nobody = service.client(&service.token("alice", &[]));
    assert_eq!(
        refused(nobody.create(image("A", "FROM scratch")).await),
        pair(Code::PermissionDenied, "ROLE_MISSING")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invisible_image_does_not_exist_for_the_caller() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mallory = service.builder("mallory");
    let admin = service.client(&service.token("root", &[Role::Admin]));
    let (created, build) = alice.create(image("Private", "FROM scratch")).await?;
    let missing = uuid::Uuid::now_v7().to_string();

    for (seen, absent) in [
        (mallory.get(&created.id).await.err(), mallory.get(&missing).await.err()),
        (mallory.build(&created.id).await.err(), mallory.build(&missing).await.err()),
        (mallory.cancel(&created.id).await.err(), mallory.cancel(&missing).await.err()),
        (mallory.delete(&created.id).await.err(), mallory.delete(&missing).await.err()),
        (mallory.get_build(&build.id).await.err(), mallory.get_build(&missing).await.err()),
        (mallory.history(&build.id, 0).await.err(), mallory.history(&missing, 0).await.err()),
        (list_builds(&mallory, &created.id).await.err(), list_builds(&mallory, &missing).await.err()),
    ] {
        let (seen, absent) = (seen.expect("refused"), absent.expect("refused"));
        assert_eq!(seen.code(), Code::NotFound);
        let words = |status: &Status| [status.message().as_bytes(), status.details()].map(without_ids);
        assert_eq!((seen.code(), words(&seen)), (absent.code(), words(&absent)));
    }
    assert_eq!(mallory.list().await?, []);
    assert_eq!(admin.list().await?.len(), 1);
    assert_eq!(admin.get_build(&build.id).await?.requested_by, "alice");
    admin.delete(&created.id).await?;
    Ok(())
}

async fn list_builds(client: &Client, image: &str) -> Result<(), Status> {
    let request = api::ListBuildsRequest { image_id: image.to_owned(), ..api::ListBuildsRequest::default() };
    client.builds.clone().list_builds(request).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_with_their_token() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (_, build) = service.builder("alice").create(image("A", "FROM scratch")).await?;
    let short = service.token_for("alice", &[Role::Builder], Duration::from_secs(2));
    let client = service.client(&short);
    let images = async {
        let mut stream =
            client.images.clone().watch_images(WatchImagesRequest::default()).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    let builds = async {
        let request = WatchBuildRequest { id: build.id, after_sequence: 0 };
        let mut stream = client.builds.clone().watch_build(request).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    let upload = async {
        let start = UploadContextRequest { part: Some(Part::Start(UploadContextStart::default())) };
        let parts = stream::iter([start]).chain(stream::pending());
        client.contexts.clone().upload_context(parts).await.map(|_| ())
    };
    let all = async { tokio::join!(images, builds, upload) };
    let (images, builds, upload) = tokio::time::timeout(LIMIT, all).await?;
    assert_eq!(refused(images), pair(Code::Unauthenticated, "TOKEN_EXPIRED"));
    assert_eq!(refused(builds), pair(Code::Unauthenticated, "TOKEN_EXPIRED"));
    assert_eq!(refused(upload), pair(Code::Unauthenticated, "TOKEN_EXPIRED"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_sees_the_workers_and_admins_see_more() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let flags = ["--slots", "3", "--labels", "zone=a,disk=ssd"];
    let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags)?;
    let alice = service.client(&service.token("alice", &[]));
    let admin = service.client(&service.token("root", &[Role::Admin]));
    let list = async |client: &Client| {
        let response = client.workers.clone().list_workers(ListWorkersRequest::default()).await?;
        Ok::<_, Status>(response.into_inner().workers)
    };
    let is_online = async || Ok(list(&alice).await?.iter().any(|worker| worker.online));
    eventually_true("the worker is online", is_online).await?;
    let seen = list(&alice).await?.remove(0);
    assert_eq!((seen.name.as_str(), seen.labels.len(), seen.slots), ("w1", 2, 0));
    assert_eq!(seen.engine_version, "");
    let seen = list(&admin).await?.remove(0);
    assert_eq!((seen.slots, seen.slots_taken, seen.engine_version.as_str()), (3, 0, "26.1.5"));
    worker.stop().await?;
    eventually_true("the worker is offline", async || Ok(!is_online().await?)).await
}
