//! Resuming of streams: for as long as the service retains changes, and never on another history.

use std::{collections::BTreeSet, time::Duration};

use proto::{
    images::{self as api, WatchImagesRequest, watch_images_response::Event},
    watch::{BuildWatch, ImagesWatch, Watched},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    answers::{assert_gapless, lines, reason},
    client::{Client, client, image},
    eventually::eventually,
    fake_engine::{FakeEngine, Gate, Script},
    proxy::Proxy,
    stack::{LIMIT, Service, Worker},
};

/// Watches until the initial state is complete, and returns the resume token.
async fn synced(client: &Client) -> anyhow::Result<String> {
    let mut watch = ImagesWatch::new(client.images.clone(), WatchImagesRequest::default());
    loop {
        let watched = tokio::time::timeout(LIMIT, watch.next()).await??;
        if matches!(watched, Watched::Event(Event::Synced(_))) {
            return Ok(watch.resume_revision().to_owned());
        }
    }
}

async fn resume(client: &Client, after_revision: &str) -> Result<Event, Status> {
    let request = WatchImagesRequest { after_revision: after_revision.to_owned(), ..Default::default() };
    let mut stream = client.images.clone().watch_images(request).await?.into_inner();
    let message = tokio::time::timeout(LIMIT, stream.message()).await.expect("it answers in time")?;
    Ok(message.and_then(|message| message.event).expect("an event"))
}

/// Returns the oldest revision that the refusal names.
fn too_old(answer: Result<Event, Status>) -> i64 {
    let status = answer.expect_err("it is refused");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "REVISION_UNAVAILABLE"));
    let info = status.get_details_error_info().expect("a reason");
    info.metadata["oldest_revision"].parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_revision_cannot_be_resumed_from() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retain-changes", "1s"]).await?;
    let alice = service.builder("alice");
    let (first, _) = alice.create(image("A", "FROM scratch")).await?;
    let after_first = synced(&alice).await?;
    let (second, _) = alice.create(image("B", "FROM scratch")).await?;
    let Event::Changed(changed) = resume(&alice, &after_first).await? else {
        panic!("what was created since is sent");
    };
    assert_eq!(changed.id, second.id);
    let oldest = eventually("the changes are compacted", async || {
        let answer = resume(&alice, &after_first).await;
        Ok(answer.is_err().then(|| too_old(answer)))
    })
    .await?;
    assert_eq!(oldest, second.revision, "all of them are compacted");
    // A client that is up to date can resume; any other gets the initial state.
    let latest = synced(&alice).await?;
    assert!(matches!(resume(&alice, &latest).await?, Event::Synced(_)));
    let mut known = BTreeSet::new();
    let mut watch = ImagesWatch::new(
        alice.images.clone(),
        WatchImagesRequest { after_revision: after_first, ..Default::default() },
    );
    loop {
        match tokio::time::timeout(LIMIT, watch.next()).await?? {
            Watched::Event(Event::Image(image)) => {
                known.insert(image.id);
            }
            Watched::Event(Event::Synced(_)) => break,
            Watched::Begun | Watched::Event(_) => {}
        }
    }
    assert_eq!(known, [first.id, second.id].into());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_is_another_history() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    alice.create(image("A", "FROM scratch")).await?;
    let before_backup = synced(&alice).await?;
    let database = service.end().await?;
    let backup = database.back_up().await?;

    let service = Service::start_on(database, &[]).await?;
    let alice = service.builder("alice");
    assert!(matches!(resume(&alice, &before_backup).await?, Event::Synced(_)), "a restart changes nothing");
    alice.create(image("B", "FROM scratch")).await?;
    let after_backup = synced(&alice).await?;
    alice.create(image("C", "FROM scratch")).await?;
    let later = synced(&alice).await?;
    service.end().await?;

    let service = Service::start_on(backup, &[]).await?;
    let alice = service.builder("alice");
    assert!(matches!(resume(&alice, &before_backup).await?, Event::Synced(_)), "this much is the same");
    too_old(resume(&alice, &after_backup).await);
    // Other changes take the same numbers.
    alice.create(image("D", "FROM scratch")).await?;
    too_old(resume(&alice, &after_backup).await);
    alice.create(image("E", "FROM scratch")).await?;
    too_old(resume(&alice, &after_backup).await);
    too_old(resume(&alice, &later).await);
    assert!(matches!(resume(&alice, &before_backup).await?, Event::Changed(_)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_that_is_cut_gets_every_line_once() -> anyhow::Result<()> {
    const LINES: usize = 200_000;
    const CUTS: usize = 10;
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(
        Script::new()
            .step("[1/1] RUN talk")
            .logs(LINES / 2, |i| format!("line {i}\n"))
            .pause(&gate)
            .logs(LINES / 2, |i| format!("line {}\n", LINES / 2 + i))
            .succeed(),
    );
    let service = Service::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let proxy = Proxy::start(service.addr).await?;
    let slow = client(proxy.addr(), &service.token("alice", &[image_service::Role::Builder]));
    let (_, build) = service.builder("alice").create(image("Talk", "FROM scratch\nRUN talk")).await?;
    let mut watch = BuildWatch::new(slow.builds.clone(), build.id);
    let mut events = Vec::new();
    let mut cuts = 0;
    loop {
        let next = tokio::time::timeout(LIMIT, watch.next()).await??;
        let Some(event) = next else {
            break;
        };
        events.push(event);
        if cuts < CUTS && events.len() > (cuts + 1) * LINES / (CUTS + 1) {
            // Cut within messages, too. The build waits at its gate until the third cut.
            cuts += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
            proxy.cut();
            if cuts == 3 {
                gate.open();
            }
        }
    }
    assert_eq!(cuts, CUTS);
    assert_gapless(&events, 1);
    let expected: Vec<String> = (0..LINES).map(|i| format!("line {i}")).collect();
    let received = lines(&events);
    assert_eq!(received.len(), LINES);
    assert!(received.iter().zip(&expected).all(|(line, expected)| line == expected), "in order");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_streams_end_when_the_service_does() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut streams = tokio::task::JoinSet::new();
    let open = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    for i in 0..1_000 {
        // A connection carries at most a thousand streams, and clients have more than one connection.
        let client = if i % 100 == 0 { service.builder("alice") } else { alice.clone() };
        let (build, open) = (build.id.clone(), std::sync::Arc::clone(&open));
        streams.spawn(async move {
            if i % 2 == 0 {
                let request = WatchImagesRequest::default();
                let mut stream = client.images.clone().watch_images(request).await?.into_inner();
                while let Some(message) = stream.message().await? {
                    if matches!(message.event, Some(Event::Synced(_))) {
                        open.add_permits(1);
                    }
                }
            } else {
                let request = api::WatchBuildRequest { id: build, after_sequence: 0 };
                let mut stream = client.builds.clone().watch_build(request).await?.into_inner();
                stream.message().await?;
                open.add_permits(1);
                while stream.message().await?.is_some() {}
            }
            Ok::<(), Status>(())
        });
    }
    tokio::time::timeout(LIMIT, open.acquire_many(1_000)).await??.forget();
    let begun = tokio::time::Instant::now();
    service.begin_shutdown();
    while let Some(ended) = streams.join_next().await {
        let status = ended?.expect_err("it says why it ends");
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "DRAINING"));
    }
    assert!(begun.elapsed() < LIMIT);
    service.stop().await
}
