//! The dispatch protocol, with a worker played by the test, and with the connection of a real one cut.

use std::collections::BTreeSet;

use image_service::Role;
use proto::{
    dispatch::{
        Assignment, Attempt, Built, ConnectRequest, ConnectResponse, Failed, FailureKind, HandedBack,
        Heartbeat, Hello, Line, Report, ReportEvent, Started, Stopped, Succeeded, Welcome,
        connect_request::Message as ToService, connect_response::Message as FromService, report_event::Event,
    },
    images::{BuildErrorKind, BuildState, ImageStatus},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    engine::{Ended, FakeEngine, Gate, Script},
    proxy::Proxy,
    stack::{LIMIT, Service, Worker, assert_gapless, image, lines, reason, states},
};

/// A worker that says what the test makes it say.
struct Actor {
    requests: mpsc::Sender<ConnectRequest>,
    responses: Streaming<ConnectResponse>,
    welcome: Welcome,
}

fn hello(name: &str, holds: &[Attempt]) -> Hello {
    Hello {
        name: name.to_owned(),
        slots: 1,
        engine_version: "none".to_owned(),
        protocol_version: 1,
        holds: holds.to_vec(),
        instance: format!("process of {name}"),
        ..Hello::default()
    }
}

fn say(message: ToService) -> ConnectRequest {
    ConnectRequest { message: Some(message) }
}

impl Actor {
    async fn connect(service: &Service, hello: Hello) -> Result<Self, Status> {
        let (requests, stream) = mpsc::channel(16);
        let client = service.client(&service.token(&hello.name, &[Role::Worker]));
        requests.send(say(ToService::Hello(hello))).await.expect("the stream is held below");
        let mut responses = client.dispatch.clone().connect(ReceiverStream::new(stream)).await?.into_inner();
        let first = responses.message().await?.and_then(|response| response.message);
        let Some(FromService::Welcome(welcome)) = first else {
            panic!("{first:?} is no welcome");
        };
        Ok(Self { requests, responses, welcome })
    }

    async fn say(&self, message: ToService) {
        self.requests.send(say(message)).await.expect("the connection lives");
    }

    async fn report(&self, attempt: &Attempt, first_sequence: i64, events: Vec<Event>) {
        let events = events.into_iter().map(|event| ReportEvent { time: None, event: Some(event) }).collect();
        let report = Report { attempt: Some(attempt.clone()), first_sequence, events };
        self.say(ToService::Report(report)).await;
    }

    async fn next(&mut self) -> anyhow::Result<FromService> {
        let response = tokio::time::timeout(LIMIT, self.responses.message()).await??;
        response.and_then(|response| response.message).ok_or_else(|| anyhow::anyhow!("the connection ended"))
    }

    async fn assignment(&mut self) -> anyhow::Result<(Assignment, Attempt)> {
        let said = self.next().await?;
        let FromService::Assignment(assignment) = said else {
            anyhow::bail!("{said:?} is no assignment");
        };
        let attempt = assignment.attempt.clone().expect("an assignment names its attempt");
        Ok((assignment, attempt))
    }

    async fn acknowledged(&mut self) -> anyhow::Result<i64> {
        let said = self.next().await?;
        let FromService::ReportAck(ack) = said else {
            anyhow::bail!("{said:?} is no acknowledgement");
        };
        Ok(ack.sequence)
    }
}

fn started() -> Event {
    Event::Started(Started {})
}

fn line(text: &str) -> Event {
    Event::Line(Line { step: -1, stderr: false, text: text.to_owned() })
}

fn failed(kind: FailureKind) -> Event {
    Event::Failed(Failed { kind: kind.into(), message: "it broke".to_owned(), ..Failed::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_are_taken_once_and_in_order() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("A", "FROM scratch\n# marker")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (assignment, attempt) = actor.assignment().await?;
    assert_eq!((attempt.build_id.as_str(), attempt.number), (build.id.as_str(), 1));
    assert_eq!(
        (assignment.reference.as_str(), assignment.image_id),
        ("trailer/a:latest", created.id.clone())
    );

    actor.report(&attempt, 1, vec![started(), line("one")]).await;
    assert_eq!(actor.acknowledged().await?, 2);
    actor.report(&attempt, 1, vec![started(), line("one"), line("two")]).await;
    assert_eq!(actor.acknowledged().await?, 3, "what came twice counts once");
    actor.report(&attempt, 5, vec![line("four")]).await;
    assert_eq!(actor.acknowledged().await?, 3, "what is missing is asked for");
    actor.report(&attempt, 4, vec![line("three"), line("four"), Event::Built(Built {})]).await;
    assert!(
        matches!(actor.next().await?, FromService::PublishGrant(grant) if grant.attempt == Some(attempt.clone()))
    );
    assert_eq!(actor.acknowledged().await?, 6);
    let succeeded = Event::Succeeded(Succeeded { image_id: "sha256:0".to_owned(), size_bytes: 7 });
    actor.report(&attempt, 7, vec![succeeded.clone()]).await;
    assert_eq!(actor.acknowledged().await?, 7);
    actor.report(&attempt, 7, vec![succeeded]).await;
    assert_eq!(actor.acknowledged().await?, 7, "an acknowledgement that was lost is given again");
    actor.report(&attempt, 8, vec![failed(FailureKind::User)]).await;
    assert!(matches!(actor.next().await?, FromService::Drop(_)), "a final state is never left");

    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["one", "two", "three", "four"]);
    assert_eq!(alice.get(&created.id).await?.artifact.map(|artifact| artifact.size_bytes), Some(7));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_attempt_is_refused() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut first = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, stale) = first.assignment().await?;
    first.report(&stale, 1, vec![started(), failed(FailureKind::Infrastructure)]).await;
    assert_eq!(first.acknowledged().await?, 2);
    let (_, attempt) = first.assignment().await?;
    assert_eq!((attempt.build_id.as_str(), attempt.number), (build.id.as_str(), 2));
    assert_eq!(alice.get_build(&build.id).await?.failures, 1);

    let mut other = Actor::connect(&service, hello("w2", &[])).await?;
    other.say(ToService::Heartbeat(Heartbeat { number: 1, draining: true })).await;
    assert!(matches!(other.next().await?, FromService::HeartbeatAck(_)));
    for (actor, attempt) in [(&mut first, &stale), (&mut other, &attempt)] {
        actor.report(attempt, 1, vec![started(), line("late")]).await;
        assert!(
            matches!(actor.next().await?, FromService::Drop(drop) if drop.attempt.as_ref() == Some(attempt))
        );
    }
    assert_eq!(alice.get_build(&build.id).await?.state(), BuildState::Claimed);

    for failures in 2..=3 {
        let attempt = Attempt { build_id: build.id.clone(), number: failures };
        first.report(&attempt, 1, vec![started(), failed(FailureKind::Infrastructure)]).await;
        assert_eq!(first.acknowledged().await?, 2);
        if failures < 3 {
            first.assignment().await?;
        }
    }
    let failed = alice.finished(&build.id).await?;
    assert_eq!((failed.state(), failed.failures, failed.attempt), (BuildState::Failed, 3, 3));
    assert_eq!(failed.error.map(|error| error.kind()), Some(BuildErrorKind::Infrastructure));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_is_refused_once_a_cancel_was_requested() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (created, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![started()]).await;
    assert_eq!(actor.acknowledged().await?, 1);
    assert!(alice.cancel(&created.id).await?.cancel_requested);
    assert!(matches!(actor.next().await?, FromService::Cancel(_)));
    actor.report(&attempt, 2, vec![Event::Built(Built {})]).await;
    assert!(matches!(actor.next().await?, FromService::Cancel(_)), "no grant");
    assert_eq!(actor.acknowledged().await?, 2);
    // Until it is confirmed, every heartbeat is answered with the cancel again.
    actor.say(ToService::Heartbeat(Heartbeat { number: 9, draining: false })).await;
    assert!(matches!(actor.next().await?, FromService::HeartbeatAck(ack) if ack.number == 9));
    assert!(matches!(actor.next().await?, FromService::Cancel(_)));
    actor.report(&attempt, 3, vec![Event::Stopped(Stopped { confirmed: true })]).await;
    assert_eq!(actor.acknowledged().await?, 3);
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Cancelled);
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::BuildCancelled);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_handed_back_costs_nothing() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    let handed_back = Event::HandedBack(HandedBack { reason: "no room".to_owned() });
    actor.report(&attempt, 1, vec![handed_back]).await;
    assert_eq!(actor.acknowledged().await?, 1);
    // It is not given to the same worker again before its next heartbeat, but to others.
    let mut other = Actor::connect(&service, hello("w2", &[])).await?;
    let (_, second) = other.assignment().await?;
    assert_eq!(second.number, 2);
    assert_eq!(alice.get_build(&build.id).await?.failures, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_has_one_connection_and_its_process_may_replace_it() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![started(), line("kept")]).await;
    assert_eq!(actor.acknowledged().await?, 2);

    let other = Hello { instance: "another process".to_owned(), ..hello("w1", &[]) };
    let refused = Actor::connect(&service, other).await.err().expect("it is refused");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::AlreadyExists, "WORKER_CONNECTED"));

    let unknown = Attempt { build_id: uuid::Uuid::now_v7().to_string(), number: 1 };
    let again = Actor::connect(&service, hello("w1", &[attempt.clone(), unknown.clone()])).await?;
    let kept = &again.welcome.keep[0];
    assert_eq!((kept.attempt.as_ref(), kept.acknowledged_sequence), (Some(&attempt), 2));
    assert_eq!(again.welcome.drop, [unknown]);
    let ended = loop {
        match tokio::time::timeout(LIMIT, actor.responses.message()).await? {
            Ok(Some(_)) => {}
            Ok(None) => anyhow::bail!("the first connection ended without saying why"),
            Err(status) => break status,
        }
    };
    assert_eq!((ended.code(), reason(&ended).as_str()), (Code::Aborted, "SESSION_LOST"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_comes_back_without_its_build_gives_it_up() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![started(), line("first try")]).await;
    assert_eq!(actor.acknowledged().await?, 2);
    drop(actor);
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    assert_eq!(attempt.number, 2);
    let found = alice.get_build(&build.id).await?;
    assert_eq!((found.failures, found.state()), (1, BuildState::Claimed));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_worker_loses_its_build_when_the_lease_is_over() -> anyhow::Result<()> {
    let times = [
        "--heartbeat",
        "50ms",
        "--offline-after",
        "200ms",
        "--stop-after",
        "300ms",
        "--stop-within",
        "200ms",
    ];
    let flags = [&times[..], &["--lease", "600ms"]].concat();
    let service = Service::start_with(&flags).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut silent = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = silent.assignment().await?;
    silent.report(&attempt, 1, vec![started()]).await;
    assert_eq!(silent.acknowledged().await?, 1);

    let engine = FakeEngine::start().await?;
    let _worker = Worker::start(&service, "w2", &engine.docker_host()).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 2, 1));
    assert_eq!(finished.worker, "w2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_messages_end_the_connection_and_name_the_field() -> anyhow::Result<()> {
    let service = Service::start().await?;
    for (bad, field) in [
        (Hello { protocol_version: 2, ..hello("w1", &[]) }, "hello.protocol_version"),
        (Hello { slots: 0, ..hello("w1", &[]) }, "hello.slots"),
        (Hello { instance: String::new(), ..hello("w1", &[]) }, "hello.instance"),
        (hello("w1", &[Attempt::default()]), "hello.holds.build_id"),
    ] {
        let refused = Actor::connect(&service, bad).await.err().expect("it is refused");
        assert_eq!(
            (refused.code(), crate::stack::fields(&refused)),
            (Code::InvalidArgument, vec![field.to_owned()])
        );
    }
    let attempt = Attempt { build_id: uuid::Uuid::now_v7().to_string(), number: 1 };
    for (bad, field) in [
        (ConnectRequest::default(), "message"),
        (say(ToService::Hello(hello("w1", &[]))), "message"),
        (say(ToService::Report(Report::default())), "report.events"),
        (
            say(ToService::Report(Report {
                attempt: Some(attempt),
                first_sequence: i64::MAX,
                events: vec![ReportEvent::default()],
            })),
            "report.first_sequence",
        ),
    ] {
        let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
        actor.requests.send(bad).await?;
        let refused =
            tokio::time::timeout(LIMIT, actor.responses.message()).await?.expect_err("it is refused");
        assert_eq!(
            (refused.code(), crate::stack::fields(&refused)),
            (Code::InvalidArgument, vec![field.to_owned()])
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_disturbs_no_build() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gates = [Gate::new(), Gate::new(), Gate::new()];
    engine.script(
        Script::new()
            .step("[1/1] RUN talk")
            .logs(500, |i| format!("a {i}\n"))
            .pause(&gates[0])
            .logs(500, |i| format!("b {i}\n"))
            .pause(&gates[1])
            .logs(500, |i| format!("c {i}\n"))
            .pause(&gates[2])
            .succeed(),
    );
    let service = Service::start().await?;
    let proxy = Proxy::start(service.addr).await?;
    let alice = service.builder("alice");
    let _worker = Worker::start_at(&service, proxy.addr(), "w1", &engine.docker_host(), &[]).await?;
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    for (i, gate) in gates.iter().enumerate() {
        gate.reached().await;
        match i {
            0 => proxy.cut(),
            1 => {
                proxy.refuse(true);
                proxy.cut();
            }
            _ => proxy.stall(true),
        }
        gate.open();
        if i == 1 {
            gates[2].reached().await;
            proxy.refuse(false);
        }
    }
    engine.wait_for(|state| state.builds[0].ended == Ended::Succeeded, LIMIT).await?;
    proxy.stall(false);
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    let expected: Vec<String> =
        ["a", "b", "c"].iter().flat_map(|part| (0..500).map(move |i| format!("{part} {i}"))).collect();
    assert_eq!(lines(&events), expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_service_goes_on_with_what_runs() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN talk").log("before\n").pause(&gate).log("after\n").succeed());
    let service = Service::start().await?;
    let proxy = Proxy::start(service.addr).await?;
    let _worker = Worker::start_at(&service, proxy.addr(), "w1", &engine.docker_host(), &[]).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    gate.reached().await;
    proxy.cut();
    let service = service.restart().await?;
    gate.open();
    let alice = service.builder("alice");
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["before", "after"]);
    assert_eq!(states(&events).last(), Some(&BuildState::Succeeded));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_shuts_down_hands_back_what_runs() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN sleep").pause(&gate).hang());
    let service = Service::start().await?;
    let flags = ["--drain-grace", "100ms"];
    let worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &flags).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Sleepy", "FROM scratch\nRUN sleep")).await?;
    gate.reached().await;
    gate.open();
    worker.stop().await?;
    assert_eq!(engine.running(), 0);
    let handed_back = alice.get_build(&build.id).await?;
    assert_eq!((handed_back.state(), handed_back.failures), (BuildState::Queued, 0));
    engine.script(Script::new().step("[1/1] RUN sleep").succeed());
    let _worker = Worker::start(&service, "w2", &engine.docker_host()).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_engine_is_tried_again() -> anyhow::Result<()> {
    for script in [
        Script::new().internal_error(),
        Script::new().step("[1/1] RUN make").log("begun\n").drop_connection(),
        Script::new().step("[1/1] RUN make").fail("write /x: no space left on device"),
    ] {
        let engine = FakeEngine::start().await?;
        engine.script(script);
        let service = Service::start().await?;
        let _worker = Worker::start(&service, "w1", &engine.docker_host()).await?;
        let alice = service.builder("alice");
        let (_, build) = alice.create(image("A", "FROM scratch\nRUN make")).await?;
        let failed = alice.finished(&build.id).await?;
        assert_eq!((failed.state(), failed.attempt, failed.failures), (BuildState::Failed, 3, 3));
        assert_eq!(failed.error.map(|error| error.kind()), Some(BuildErrorKind::Infrastructure));
        let builds = engine.builds();
        assert_eq!(builds.len(), 3);
        for names in [
            builds.iter().map(|build| &build.tag).collect::<BTreeSet<_>>(),
            builds.iter().map(|build| &build.build_id).collect(),
            builds.iter().map(|build| &build.session).collect(),
        ] {
            assert_eq!(names.len(), 3, "every attempt has names of its own: {names:?}");
        }
        // Nothing of a build that is over stays open.
        engine.wait_for(|state| state.sessions == 0, LIMIT).await?;
    }
    Ok(())
}
