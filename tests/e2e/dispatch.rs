//! The dispatch protocol: reports, fencing, grants and leases, with a worker played by the test.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use proto::{
    dispatch::{
        Attempt, Built, ConnectRequest, Failed, FailureKind, HandedBack, Heartbeat, Hello, Line, Report,
        ReportEvent, Started, Stopped, Succeeded, connect_request::Message as ToService,
        connect_response::Message as FromService, report_event::Event,
    },
    images::{BuildErrorKind, BuildState, ImageStatus},
};
use tonic::Code;

use crate::{
    actor::{Actor, IMAGE_ID, hello, say},
    answers::{assert_gapless, fields, lines, reason},
    client::{image, repository},
    fake_engine::FakeEngine,
    stack::{LIMIT, Service, Worker},
};

const SHORT_LEASE: [&str; 10] = [
    "--heartbeat",
    "200ms",
    "--offline-after",
    "2s",
    "--stop-after",
    "4s",
    "--stop-timeout",
    "1s",
    "--lease",
    "6s",
];

fn started() -> Event {
    Event::Started(Started {})
}

fn line(text: &str) -> Event {
    Event::Line(Line { step: -1, text: text.to_owned(), ..Line::default() })
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
        (assignment.reference, assignment.image_id),
        (format!("{}:latest", repository("alice", "a")), created.id.clone())
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
    let config_digest = format!("sha256:{}", "0a".repeat(32));
    let succeeded = Event::Succeeded(Succeeded {
        image_id: IMAGE_ID.to_owned(),
        size_bytes: 7,
        config_digest: config_digest.clone(),
        ..Default::default()
    });
    actor.report(&attempt, 7, vec![succeeded.clone()]).await;
    assert_eq!(actor.acknowledged().await?, 7);
    actor.report(&attempt, 7, vec![succeeded]).await;
    assert_eq!(actor.acknowledged().await?, 7, "an acknowledgement that was lost is given again");
    actor.report(&attempt, 8, vec![failed(FailureKind::User)]).await;
    assert!(matches!(actor.next().await?, FromService::Drop(_)), "a final state is never left");

    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["one", "two", "three", "four"]);
    let listed = alice.list().await?.pop().and_then(|image| image.artifact).unwrap_or_default();
    assert_eq!((listed.size_bytes, &listed.config_digest), (7, &config_digest));
    assert_eq!(alice.get(&created.id).await?.artifact, Some(listed));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_attempt_is_refused() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retry-backoff", "0"]).await?;
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
    // Until the stop is confirmed, every heartbeat is answered with the cancel again.
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
async fn a_grant_is_repeated_until_it_is_used() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![started(), Event::Built(Built {})]).await;
    for number in 1..=3 {
        loop {
            if let FromService::PublishGrant(grant) = actor.next().await? {
                assert_eq!(grant.attempt, Some(attempt.clone()));
                break;
            }
        }
        actor.say(ToService::Heartbeat(Heartbeat { number, draining: false })).await;
    }
    let image_id = IMAGE_ID.to_owned();
    actor.report(&attempt, 3, vec![Event::Succeeded(Succeeded { image_id, ..Succeeded::default() })]).await;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_handed_back_counts_no_failure() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = actor.assignment().await?;
    let handed_back = Event::HandedBack(HandedBack { reason: "no room".to_owned(), base: None });
    actor.report(&attempt, 1, vec![handed_back]).await;
    assert_eq!(actor.acknowledged().await?, 1);
    // The same worker does not get the build again before its next heartbeat, but other workers do.
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
    let service = Service::start_with(&SHORT_LEASE).await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut silent = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, attempt) = silent.assignment().await?;
    silent.report(&attempt, 1, vec![started()]).await;
    assert_eq!(silent.acknowledged().await?, 1);

    let engine = FakeEngine::start().await?;
    let _worker = Worker::start(&service, "w2", &engine.docker_host())?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 2, 1));
    assert_eq!(finished.worker, "w2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_lives_and_does_not_begin_loses_its_build_at_no_cost() -> anyhow::Result<()> {
    const HEARTBEAT: Duration = Duration::from_millis(100);
    let service = Service::start_with(&SHORT_LEASE).await?;
    let alice = service.builder("alice");
    let begun = Instant::now();
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut mute = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, first) = mute.assignment().await?;
    let mut is_dropped = false;
    let again = async {
        for number in 1.. {
            mute.say(ToService::Heartbeat(Heartbeat { number, draining: false })).await;
            let received = tokio::time::timeout(HEARTBEAT, mute.next()).await;
            match received {
                Ok(Ok(FromService::Drop(dropped))) => is_dropped |= dropped.attempt == Some(first.clone()),
                Ok(Ok(FromService::Assignment(again))) => return Ok(again.attempt),
                Ok(Ok(_)) => tokio::time::sleep(HEARTBEAT).await,
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(None)
    };
    let again = tokio::time::timeout(LIMIT, again).await??.context("an attempt")?;
    assert!(is_dropped);
    assert!(begun.elapsed() >= Duration::from_secs(6), "{:?}", begun.elapsed());
    assert_eq!((again.build_id, again.number), (build.id.clone(), 2));
    assert_eq!(alice.get_build(&build.id).await?.failures, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_messages_end_the_connection_and_name_the_field() -> anyhow::Result<()> {
    let service = Service::start().await?;
    for (bad, field) in [
        (Hello { slots: 0, ..hello("w1", &[]) }, "hello.slots"),
        (Hello { instance: String::new(), ..hello("w1", &[]) }, "hello.instance"),
        (hello("w1", &[Attempt::default()]), "hello.holds.build_id"),
        (
            hello("w1", &[Attempt { build_id: uuid::Uuid::now_v7().to_string(), number: 0 }]),
            "hello.holds.number",
        ),
    ] {
        let refused = Actor::connect(&service, bad).await.err().expect("it is refused");
        assert_eq!((refused.code(), fields(&refused)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    let attempt = Attempt { build_id: uuid::Uuid::now_v7().to_string(), number: 1 };
    let digests = |image_id: &str, repo_digest: &str, config_digest: &str| {
        let [image_id, repo_digest, config_digest] =
            [image_id, repo_digest, config_digest].map(str::to_owned);
        let succeeded = Succeeded { image_id, repo_digest, config_digest, ..Succeeded::default() };
        let events = vec![ReportEvent { time: None, event: Some(Event::Succeeded(succeeded)) }];
        say(ToService::Report(Report { attempt: Some(attempt.clone()), first_sequence: 1, events }))
    };
    for (bad, field) in [
        (ConnectRequest::default(), "message"),
        (say(ToService::Hello(hello("w1", &[]))), "message"),
        (say(ToService::Report(Report::default())), "report.events"),
        (
            say(ToService::Report(Report {
                attempt: Some(attempt.clone()),
                first_sequence: i64::MAX,
                events: vec![ReportEvent::default()],
            })),
            "report.first_sequence",
        ),
        (digests("", "", ""), "report.events.succeeded.image_id"),
        (digests("sha256:0", "", ""), "report.events.succeeded.image_id"),
        (digests(IMAGE_ID, "repository@sha256:0", ""), "report.events.succeeded.repo_digest"),
        (digests(IMAGE_ID, "", "sha256:0A"), "report.events.succeeded.config_digest"),
    ] {
        let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
        actor.requests.send(bad).await?;
        let refused =
            tokio::time::timeout(LIMIT, actor.responses.message()).await?.expect_err("it is refused");
        assert_eq!((refused.code(), fields(&refused)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_alone_takes_nothing_from_a_worker() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let (_, attempt) = actor.assignment().await?;
    // A late `Hello` from before the worker held anything, on a connection that it has given up.
    let _late = Actor::greet(&service, hello("w1", &[])).await?;
    let held = alice.get_build(&build.id).await?;
    assert_eq!((held.state(), held.attempt), (BuildState::Claimed, 1));
    let mut actor = Actor::connect(&service, hello("w1", std::slice::from_ref(&attempt))).await?;
    assert_eq!(actor.welcome.keep.len(), 1, "{:?}", actor.welcome);
    actor.report(&attempt, 1, vec![started()]).await;
    actor.acknowledged().await?;
    // A worker that holds nothing and sends a heartbeat has given the build up.
    let _empty = Actor::connect(&service, hello("w1", &[])).await?;
    let again = alice.get_build(&build.id).await?;
    assert_eq!((again.failures, again.attempt > 1 || again.state() == BuildState::Queued), (1, true));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_has_a_maximum_size_whatever_its_worker_sends() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-log-bytes", "65536"]).await?;
    let alice = service.builder("alice");
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let (_, attempt) = actor.assignment().await?;
    actor.report(&attempt, 1, vec![started()]).await;
    let long = "x".repeat(16 * 1024);
    for sequence in 2..20 {
        actor.report(&attempt, sequence, vec![line(&long)]).await;
    }
    actor.report(&attempt, 20, vec![failed(FailureKind::User)]).await;
    let ended = alice.finished(&build.id).await?;
    assert_eq!(
        (ended.state(), ended.log_bytes, ended.log_truncated),
        (BuildState::Failed, 4 * 16 * 1024, true)
    );
    let gaps = alice.history(&build.id, 0).await?.into_iter().filter(|event| {
        matches!(&event.event, Some(proto::images::build_event::Event::LogGap(gap)) if gap.message.contains("--max-log-bytes"))
    });
    assert_eq!(gaps.count(), 1);
    Ok(())
}
