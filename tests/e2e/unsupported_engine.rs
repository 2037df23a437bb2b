//! Workers that are refused for their engine or protocol version, and abilities that are withheld.

use image_service::Role;
use proto::{
    dispatch::{
        Heartbeat, Hello, WithheldAbility, connect_request::Message as ToService,
        connect_response::Message as FromService,
    },
    images::{self as api, BuildState, PendingReason},
};
use tonic::Code;

use crate::{
    actor::{Actor, hello},
    answers::{fields, reason},
    client::{Client, image},
    stack::Service,
};

const TOO_OLD: &str = "Docker Engine 20.10.24 is older than 25.0.2";

fn unsupported(name: &str) -> Hello {
    Hello { unsupported_reason: TOO_OLD.to_owned(), ..hello(name, &[]) }
}

fn admin(service: &Service) -> Client {
    service.client(&service.token("root", &[Role::Admin]))
}

async fn worker(client: &Client, name: &str) -> anyhow::Result<api::Worker> {
    let request = api::ListWorkersRequest::default();
    let workers = client.workers.clone().list_workers(request).await?.into_inner().workers;
    workers.into_iter().find(|worker| worker.name == name).ok_or_else(|| anyhow::anyhow!("no worker {name}"))
}

async fn pending_reason(client: &Client, build: &api::Build) -> anyhow::Result<PendingReason> {
    Ok(client.get_build(&build.id).await?.pending_reason())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsupported_worker_gets_nothing_and_says_why() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (root, alice) = (admin(&service), service.builder("alice"));
    let withheld = WithheldAbility {
        ability: "add-git-directory".to_owned(),
        flaw: "CVE-2026-33748".to_owned(),
        fixed_in: "28.5.3".to_owned(),
    };
    let old = Hello { withheld: vec![withheld], ..unsupported("w1") };
    let mut actor = Actor::connect(&service, old).await?;
    let shown = worker(&root, "w1").await?;
    assert_eq!((shown.online, shown.unsupported_reason.as_str(), shown.protocol_version), (true, TOO_OLD, 1));
    let [withheld] = shown.withheld.as_slice() else { panic!("{shown:?}") };
    assert_eq!(
        [&withheld.ability, &withheld.flaw, &withheld.fixed_in],
        ["add-git-directory", "CVE-2026-33748", "28.5.3"]
    );
    let to_alice = worker(&alice, "w1").await?;
    assert!(to_alice.unsupported_reason.is_empty() && to_alice.withheld.is_empty(), "{to_alice:?}");

    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    for number in 1..=3 {
        actor.say(ToService::Heartbeat(Heartbeat { number, draining: false })).await;
        assert!(matches!(actor.next().await?, FromService::HeartbeatAck(_)), "it gets nothing but answers");
    }
    let waiting = alice.get_build(&build.id).await?;
    assert_eq!(
        (waiting.state(), waiting.pending_reason()),
        (BuildState::Queued, PendingReason::WorkersUnsupported)
    );

    // The worker does not explain why a build waits that it could not take anyway.
    let squashed = image("B", "FROM scratch");
    let config = api::ImageConfig { squash: true, ..squashed.config.clone().unwrap_or_default() };
    let (_, squashed) = alice.create(api::Image { config: Some(config), ..squashed }).await?;
    assert_eq!(pending_reason(&alice, &squashed).await?, PendingReason::NoSuitableWorker);

    // With another engine it takes builds, and nothing of the reason is left.
    drop(actor);
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let shown = worker(&root, "w1").await?;
    assert!(shown.online && shown.unsupported_reason.is_empty() && shown.withheld.is_empty(), "{shown:?}");
    actor.build_next().await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_workers_come_before_unsupported_ones_as_the_reason() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let _old = Actor::connect(&service, unsupported("w1")).await?;
    let mut drains = Actor::connect(&service, hello("w2", &[])).await?;
    drains.say(ToService::Heartbeat(Heartbeat { number: 1, draining: true })).await;
    assert!(matches!(drains.next().await?, FromService::HeartbeatAck(_)));
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    assert_eq!(pending_reason(&alice, &build).await?, PendingReason::WorkersDraining);
    let pinned = image("B", "FROM scratch");
    let config = api::ImageConfig { worker: "w1".to_owned(), ..pinned.config.clone().unwrap_or_default() };
    let (_, pinned) = alice.create(api::Image { config: Some(config), ..pinned }).await?;
    assert_eq!(pending_reason(&alice, &pinned).await?, PendingReason::WorkersUnsupported);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_another_protocol_version_is_recorded_and_refused() -> anyhow::Result<()> {
    const REASON: &str =
        "the worker speaks version 2 of the dispatch protocol; this service speaks version 1";
    let service = Service::start().await?;
    let root = admin(&service);
    // The meaning of another version's fields is unknown.
    let foreign = Hello {
        protocol_version: 2,
        slots: 0,
        instance: String::new(),
        labels: [("zone".to_owned(), "a".to_owned())].into(),
        ..hello("w1", &[])
    };
    for _ in 0..2 {
        let refused = Actor::greet(&service, foreign.clone()).await.err().expect("it is refused");
        assert_eq!(
            (refused.code(), reason(&refused).as_str()),
            (Code::FailedPrecondition, "PROTOCOL_UNSUPPORTED")
        );
        assert_eq!(refused.message(), REASON);
    }
    let shown = worker(&root, "w1").await?;
    assert_eq!((shown.online, shown.protocol_version), (false, 2));
    assert_eq!((shown.unsupported_reason.as_str(), shown.engine_version.as_str()), (REASON, "none"));
    assert_eq!(shown.labels, foreign.labels);

    let _actor = Actor::connect(&service, hello("w1", &[])).await?;
    let shown = worker(&root, "w1").await?;
    assert_eq!((shown.online, shown.protocol_version, shown.unsupported_reason.as_str()), (true, 1, ""));
    // A process of another version takes nothing from the worker that is connected.
    let refused = Actor::greet(&service, foreign).await.err().expect("it is refused");
    assert_eq!(reason(&refused), "WORKER_CONNECTED");
    assert!(worker(&root, "w1").await?.online);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_worker_is_recorded_under_its_own_name_alone() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (requests, stream) = tokio::sync::mpsc::channel(1);
    let foreign = Hello { protocol_version: 2, ..hello("w2", &[]) };
    requests.send(crate::actor::say(ToService::Hello(foreign))).await?;
    let client = service.client(&service.token("w1", &[Role::Worker]));
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut responses = client.dispatch.clone().connect(stream).await?.into_inner();
    let refused = responses.message().await.expect_err("it is another's name");
    assert_eq!(reason(&refused), "OTHER_WORKER");
    assert!(worker(&admin(&service), "w2").await.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_fields_of_a_worker_are_bounded() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let withheld = |ability: &str, flaw: &str, count: usize| {
        let withheld =
            WithheldAbility { ability: ability.to_owned(), flaw: flaw.to_owned(), ..Default::default() };
        Hello { withheld: vec![withheld; count], ..hello("w1", &[]) }
    };
    let reason = |reason: String| Hello { unsupported_reason: reason, ..hello("w1", &[]) };
    for (bad, field) in [
        (reason("x".repeat(1_025)), "hello.unsupported_reason"),
        (reason("a\nb".to_owned()), "hello.unsupported_reason"),
        (withheld("squash", "a flaw", 65), "hello.withheld"),
        (withheld("squash", "", 1), "hello.withheld"),
        (withheld(&"x".repeat(121), "a flaw", 1), "hello.withheld"),
    ] {
        let refused = Actor::connect(&service, bad).await.err().expect("it is refused");
        assert_eq!((refused.code(), fields(&refused)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    Ok(())
}
