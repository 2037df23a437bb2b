//! Fair queueing: requesters take turns.

use std::collections::BTreeMap;

use proto::{
    dispatch::{Failed, FailureKind, Hello, Started, report_event::Event},
    images::{self as api, BuildState, PendingReason},
};

use crate::{
    actor::{Actor, hello},
    client::{Client, image},
    stack::Service,
};

/// Creates images, each with a queued first build, and returns the builds.
async fn queue(client: &Client, name: &str, count: usize) -> anyhow::Result<Vec<String>> {
    let mut builds = Vec::with_capacity(count);
    for i in 0..count {
        let (_, build) = client.create(image(&format!("{name} {i}"), "FROM scratch")).await?;
        builds.push(build.id);
    }
    Ok(builds)
}

/// Takes the next build, fails it, and returns its id.
async fn take(actor: &mut Actor) -> anyhow::Result<String> {
    let (_, attempt) = actor.assignment().await?;
    let failed =
        Failed { kind: FailureKind::User.into(), message: "it is wrong".to_owned(), ..Failed::default() };
    actor.report(&attempt, 1, vec![Event::Started(Started {}), Event::Failed(failed)]).await;
    actor.acknowledged().await?;
    Ok(attempt.build_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_with_many_builds_delays_others_by_one_build() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let many = queue(&alice, "Many", 500).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    for build in &many[..7] {
        assert_eq!(&take(&mut actor).await?, build, "the oldest of one requester goes first");
    }
    let single = queue(&bob, "Single", 1).await?.remove(0);
    // One build may have been claimed before this one was queued, and one may be in the same round.
    let mut taken = Vec::new();
    while taken.last() != Some(&single) {
        anyhow::ensure!(taken.len() < 3, "{taken:?} were taken before {single}");
        taken.push(take(&mut actor).await?);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_takes_turns_in_the_order_that_it_reports() -> anyhow::Result<()> {
    const EACH: usize = 4;
    let service = Service::start().await?;
    let mut owners = BTreeMap::new();
    for owner in ["alice", "bob", "carol"] {
        for build in queue(&service.builder(owner), owner, EACH).await? {
            owners.insert(build, owner);
        }
    }
    let mut reported = BTreeMap::new();
    for (build, owner) in &owners {
        reported.insert(service.builder(owner).get_build(build).await?.queue_position, build.clone());
    }
    assert_eq!(reported.keys().copied().collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    // A restarted service still knows whose turn it is.
    let service = service.restart().await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let mut taken = Vec::new();
    for _ in 0..owners.len() {
        taken.push(take(&mut actor).await?);
    }
    assert_eq!(taken, reported.into_values().collect::<Vec<_>>());
    for round in taken.chunks(3) {
        assert_eq!(round.iter().map(|build| owners[build]).collect::<Vec<_>>(), ["alice", "bob", "carol"]);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_returning_caller_does_not_overtake_waiting_ones() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let waiting = queue(&alice, "Waiting", 6).await?;
    queue(&bob, "Again", 1).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let mut of_alice = 0;
    for i in 0..8 {
        // Bob's next build is queued before a slot is free.
        queue(&bob, &format!("Again {i}"), 1).await?;
        of_alice += usize::from(waiting.contains(&take(&mut actor).await?));
    }
    assert!(of_alice >= 4, "alice had {of_alice} of 8 turns");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_that_no_free_worker_can_take_block_nobody() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let mut pinned = Vec::new();
    for i in 0..5 {
        let mut draft = image(&format!("Pinned {i}"), "FROM scratch");
        draft.config.get_or_insert_default().worker = "elsewhere".to_owned();
        pinned.push(alice.create(draft).await?.1.id);
    }
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    let free = queue(&bob, "Free", 2).await?;
    for build in free {
        assert_eq!(take(&mut actor).await?, build);
    }
    let build = alice.get_build(&pinned[0]).await?;
    assert_eq!(
        (build.state(), build.pending_reason()),
        (BuildState::Queued, PendingReason::NoSuitableWorker)
    );
    let mut elsewhere = Actor::connect(&service, hello("elsewhere", &[])).await?;
    for build in &pinned {
        assert_eq!(&take(&mut elsewhere).await?, build);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn why_a_build_waits_is_reported_by_the_nearest_of_all_workers() -> anyhow::Result<()> {
    const GONE: usize = 1_000;
    let service = Service::start().await?;
    for number in 0..GONE {
        Actor::greet(&service, hello(&format!("gone-{number:03}"), &[])).await?;
    }
    let mut own = hello("the-last", &[]);
    own.labels.insert("its".to_owned(), "own".to_owned());
    let mut last = Actor::connect(&service, own).await?;
    let alice = service.builder("alice");
    let mut draft = image("Its own", "FROM scratch");
    draft.config.get_or_insert_default().worker_labels.insert("its".to_owned(), "own".to_owned());
    let (_, first) = alice.create(draft.clone()).await?;
    assert_eq!(last.assignment().await?.1.build_id, first.id);
    let (_, second) = alice.create(draft).await?;
    assert_eq!(second.pending_reason(), PendingReason::AllSlotsTaken);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_was_cancelled_in_the_queue_has_used_no_turn() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    for i in 0..5 {
        let (created, _) = alice.create(image(&format!("Given up {i}"), "FROM scratch")).await?;
        let request = api::CancelBuildRequest { id: created.id, ..Default::default() };
        alice.images.clone().cancel_build(request).await?;
    }
    let first = queue(&alice, "Wanted", 1).await?;
    let later = queue(&bob, "Later", 2).await?;
    let mut actor = Actor::connect(&service, hello("w1", &[])).await?;
    assert_eq!(take(&mut actor).await?, first[0]);
    assert_eq!(take(&mut actor).await?, later[0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_with_enough_running_builds_waits_and_holds_up_nobody() -> anyhow::Result<()> {
    let service = Service::start_with(&["--max-running-builds", "2"]).await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    let mut many = queue(&alice, "Many", 100).await?.into_iter();
    let single = queue(&bob, "Single", 1).await?.remove(0);
    let mut actor = Actor::connect(&service, Hello { slots: 8, ..hello("w1", &[]) }).await?;
    let mut assigned = BTreeMap::new();
    for _ in 0..3 {
        let (_, attempt) = actor.assignment().await?;
        assigned.insert(attempt.build_id.clone(), attempt);
    }
    let first: Vec<String> = many.by_ref().take(2).collect();
    for build in first.iter().chain([&single]) {
        anyhow::ensure!(assigned.contains_key(build), "{build} is not among {assigned:?}");
    }
    let next = many.next().expect("one of a hundred");
    let waiting = alice.get_build(&next).await?;
    assert_eq!(
        (waiting.state(), waiting.pending_reason()),
        (BuildState::Queued, PendingReason::RunningLimit)
    );
    // One that ends makes room for one.
    let failed =
        Failed { kind: FailureKind::User.into(), message: "it is wrong".to_owned(), ..Failed::default() };
    actor.report(&assigned[&first[0]], 1, vec![Event::Started(Started {}), Event::Failed(failed)]).await;
    actor.acknowledged().await?;
    assert_eq!(actor.assignment().await?.1.build_id, next);
    let later = queue(&bob, "Later", 1).await?.remove(0);
    assert_eq!(actor.assignment().await?.1.build_id, later, "it overtakes all that wait for their requester");
    Ok(())
}
