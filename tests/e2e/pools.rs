//! Pools of workers, and what else a worker's token says about it.

use std::collections::BTreeMap;

use image_service::Role;
use proto::{
    dispatch::{
        ArtifactSource, Attempt, DistantBase, Failed, FailureKind, HandedBack, Hello, ResolveSourcesRequest,
        Started, report_event::Event, source::Source,
    },
    images::{self as api, BuildState, PendingReason},
};
use serde_json::json;

use crate::{
    actor::{Actor, hello},
    client::{Client, image, repository_of},
    issuer::{SigningKey, jwks},
    stack::Service,
};

/// Connects as a worker of these pools.
async fn worker(service: &Service, name: &str, pools: &[&str]) -> anyhow::Result<Actor> {
    let token = service.token_in(name, &[Role::Worker], pools);
    Ok(Actor::connect_with(service, &token, hello(name, &[])).await?)
}

async fn listed(client: &Client) -> anyhow::Result<BTreeMap<String, api::Worker>> {
    let response = client.workers.clone().list_workers(api::ListWorkersRequest::default()).await?;
    Ok(response.into_inner().workers.into_iter().map(|worker| (worker.name.clone(), worker)).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_goes_to_a_worker_of_the_requesters_pools() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let builder =
        |name: &str, pools: &[&str]| service.client(&service.token_in(name, &[Role::Builder], pools));
    let (alice, bob, carol) =
        (builder("alice", &["red"]), builder("bob", &["blue", "red"]), service.builder("carol"));
    let pinned = |name: &str, worker: &str| {
        let mut draft = image(name, "FROM scratch");
        draft.config.get_or_insert_default().worker = worker.to_owned();
        draft
    };
    let mut blue = worker(&service, "blue-1", &["blue"]).await?;
    let (_, of_alice) = alice.create(image("Of alice", "FROM scratch")).await?;
    let (_, elsewhere) = alice.create(pinned("Elsewhere", "blue-1")).await?;
    let (_, of_carol) = carol.create(image("Of carol", "FROM scratch")).await?;
    let (_, of_bob) = bob.create(image("Of bob", "FROM scratch")).await?;
    assert_eq!(blue.assignment().await?.1.build_id, of_bob.id);
    for (client, build) in [(&alice, &of_alice), (&alice, &elsewhere), (&carol, &of_carol)] {
        let waiting = client.get_build(&build.id).await?;
        let expected = (BuildState::Queued, PendingReason::NoSuitableWorker);
        assert_eq!((waiting.state(), waiting.pending_reason()), expected, "{}", build.id);
    }
    let mut red = worker(&service, "red-1", &["red", "green"]).await?;
    assert_eq!(red.assignment().await?.1.build_id, of_alice.id);
    let mut common = Actor::connect(&service, hello("common", &[])).await?;
    assert_eq!(common.assignment().await?.1.build_id, of_carol.id);
    let workers = listed(&carol).await?;
    let pools: Vec<&[String]> =
        ["blue-1", "common", "red-1"].iter().map(|name| &*workers[*name].pools).collect();
    assert_eq!(pools, [&["blue"][..], &["default"], &["green", "red"]]);
    assert_eq!(alice.get_build(&elsewhere.id).await?.state(), BuildState::Queued);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_what_its_token_claims_at_most() -> anyhow::Result<()> {
    let key = SigningKey::ed25519("1");
    let file = tempfile::NamedTempFile::new()?.into_temp_path();
    std::fs::write(&file, jwks(&[&key]))?;
    let path = file.to_str().expect("a path in UTF-8");
    let service = Service::start_with(&["--jwks", path, "--pools-claim", "hosts"]).await?;
    let token = |subject: &str, role: &str, more: serde_json::Value| {
        let mut claims = json!({"sub": subject, "exp": 4_000_000_000_u64, "roles": [role]});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        key.token(&claims)
    };
    let alice = service.client(&token("alice", "builder", json!({"hosts": "red"})));
    let labels = [("gpu", "true"), ("zone", "a")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let hello = Hello {
        labels: labels.into(),
        capabilities: vec!["dockerfile".to_owned(), "squash".to_owned()],
        ..hello("w1", &[])
    };
    let claims =
        json!({"hosts": ["red"], "worker_labels": {"zone": "a"}, "worker_capabilities": ["dockerfile"]});
    let mut actor = Actor::connect_with(&service, &token("w1", "worker", claims), hello).await?;
    let shown = &listed(&alice).await?["w1"];
    assert_eq!(shown.labels.iter().collect::<Vec<_>>(), [(&"zone".to_owned(), &"a".to_owned())]);
    assert_eq!(shown.pools, ["red"]);
    let mut wants_gpu = image("Wants a GPU", "FROM scratch");
    wants_gpu.config.get_or_insert_default().worker_labels.insert("gpu".to_owned(), "true".to_owned());
    let mut wants_squash = image("Wants one layer", "FROM scratch");
    wants_squash.config.get_or_insert_default().squash = true;
    for draft in [wants_gpu, wants_squash] {
        let (_, build) = alice.create(draft).await?;
        assert_eq!(alice.get_build(&build.id).await?.pending_reason(), PendingReason::NoSuitableWorker);
    }
    let (_, plain) = alice.create(image("Plain", "FROM scratch")).await?;
    assert_eq!(actor.assignment().await?.1.build_id, plain.id);
    for malformed in
        [json!({"hosts": {"red": true}}), json!({"hosts": null}), json!({"worker_labels": "gpu"})]
    {
        let refused = service.client(&token("alice", "builder", malformed)).list().await;
        assert_eq!(refused.map_err(|status| status.code()).err(), Some(tonic::Code::Unauthenticated));
    }
    Ok(())
}

/// Asks as a worker about an artifact that a build names.
async fn artifact(
    service: &Service,
    worker: &str,
    attempt: &Attempt,
    reference: &str,
) -> anyhow::Result<ArtifactSource> {
    let worker = service.client(&service.token(worker, &[Role::Worker]));
    let request =
        ResolveSourcesRequest { attempt: Some(attempt.clone()), references: vec![reference.to_owned()] };
    let sources = worker.dispatch.clone().resolve_sources(request).await?.into_inner().sources;
    match sources.into_iter().next().and_then(|source| source.source) {
        Some(Source::Artifact(artifact)) => Ok(artifact),
        other => anyhow::bail!("{other:?} is no artifact"),
    }
}

/// Starts an attempt and hands it back for the worker that holds an artifact.
async fn hand_back(actor: &mut Actor, attempt: &Attempt, artifact: &ArtifactSource) -> anyhow::Result<()> {
    let base = DistantBase {
        image_id: artifact.name.clone().unwrap_or_default().image_id,
        worker: artifact.worker.clone(),
    };
    let reason = format!("only the engine of worker {} has it", base.worker);
    let handed_back = Event::HandedBack(HandedBack { reason, base: Some(base) });
    actor.report(attempt, 1, vec![Event::Started(Started {}), handed_back]).await;
    actor.acknowledged().await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_goes_to_the_worker_that_holds_its_base() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let one_slot = |name: &str| Hello { slots: 1, ..hello(name, &[]) };
    let mut holder = Actor::connect(&service, one_slot("holder")).await?;
    let (base, _) = alice.create(image("Base", "FROM scratch")).await?;
    holder.build_next().await?;
    let (_, blocking) = alice.create(image("Blocking", "FROM scratch")).await?;
    let (_, blocker) = holder.assignment().await?;
    assert_eq!(blocker.build_id, blocking.id);

    let mut other = Actor::connect(&service, one_slot("other")).await?;
    let (_, child) = alice.create(image("Child", &format!("FROM {}", repository_of(&base)))).await?;
    let (_, attempt) = other.assignment().await?;
    let found = artifact(&service, "other", &attempt, repository_of(&base)).await?;
    assert_eq!((&*found.worker, found.worker_may_build), ("holder", true));
    hand_back(&mut other, &attempt, &found).await?;
    let waiting = alice.get_build(&child.id).await?;
    assert_eq!(
        (waiting.state(), waiting.pending_reason(), waiting.failures),
        (BuildState::Queued, PendingReason::BaseElsewhere, 0)
    );
    // The other worker gets what is queued behind.
    let (behind, _) = alice.create(image("Behind", "FROM scratch")).await?;
    let (assignment, _) = other.assignment().await?;
    assert_eq!(assignment.image_id, behind.id);
    let failed =
        Failed { kind: FailureKind::User.into(), message: "it is wrong".to_owned(), ..Failed::default() };
    holder.report(&blocker, 1, vec![Event::Started(Started {}), Event::Failed(failed)]).await;
    holder.acknowledged().await?;
    let (_, next) = holder.assignment().await?;
    assert_eq!((next.build_id, next.number), (child.id.clone(), 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_handed_back_only_for_a_worker_that_may_take_it() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let admin = service.client(&service.token_in("root", &[Role::Admin], &["red", "default"]));
    let mut red = worker(&service, "red", &["red"]).await?;
    let mut first = Actor::connect(&service, hello("first", &[])).await?;
    let mut bases = Vec::new();
    for (name, actor) in [("red", &mut red), ("first", &mut first)] {
        let mut draft = image(&format!("On {name}"), "FROM scratch");
        draft.config.get_or_insert_default().worker = name.to_owned();
        let (base, _) = admin.create(draft).await?;
        actor.build_next().await?;
        admin.grant(&base.id, "alice", &[api::Permission::View]).await?;
        bases.push(base);
    }
    let mut second = Actor::connect(&service, Hello { slots: 3, ..hello("second", &[]) }).await?;
    let pulse = second.pulse(false);
    let mut draft = image("Pinned", "FROM scratch");
    draft.config.get_or_insert_default().worker = "second".to_owned();
    alice.create(draft).await?;
    let (_, pinned) = second.assignment().await?;
    for (base, worker) in bases.iter().zip(["red", "first"]) {
        let found = artifact(&service, "second", &pinned, repository_of(base)).await?;
        assert_eq!((&*found.worker, found.worker_may_build), (worker, false), "by the pin");
    }
    drop(first);
    let (_, free) = alice.create(image("Free", "FROM scratch")).await?;
    let (_, attempt) = second.assignment().await?;
    assert_eq!(attempt.build_id, free.id);
    let found = artifact(&service, "second", &attempt, repository_of(&bases[0])).await?;
    assert!(!found.worker_may_build, "by the pool");
    let found = artifact(&service, "second", &attempt, repository_of(&bases[1])).await?;
    assert!(found.worker_may_build);
    hand_back(&mut second, &attempt, &found).await?;
    // There, an image that another worker alone holds is one too many.
    let mut first = Actor::connect(&service, hello("first", &[])).await?;
    let (_, attempt) = first.assignment().await?;
    assert_eq!((&attempt.build_id, attempt.number), (&free.id, 2));
    let mut on_second = image("On second", "FROM scratch");
    on_second.config.get_or_insert_default().worker = "second".to_owned();
    let (on_second, _) = alice.create(on_second).await?;
    // With every heartbeat a grant is repeated.
    drop(pulse);
    second.build_next().await?;
    let found = artifact(&service, "first", &attempt, repository_of(&on_second)).await?;
    assert_eq!((&*found.worker, found.worker_may_build), ("second", false));
    Ok(())
}
