//! Rolling restarts of all programs under load, unnoticed by clients that retry.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use image_service::Role;
use proto::{
    images::{self as api, BuildState, ImageStatus, watch_images_response::Event},
    watch::{BuildWatch, ImagesWatch, Watched},
};
use rustix::process::Signal;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use crate::{
    answers::{assert_gapless, states},
    client::{Client, client, image},
    database::Database,
    fake_engine::{FakeEngine, Gate, Script},
    patience::{create, patiently},
    programs::Catalogue,
    stack::{LIMIT, Service, number},
};

/// Minimum number of builds, unless `TRAILER_TEST_BUILDS` says otherwise.
const BUILDS: u64 = 500;
const CLIENTS: usize = 5;
/// Pause between two builds of a client, so that two processors keep up with this many programs.
const PAUSE: Duration = Duration::from_millis(150);
/// Number of watchers of each kind.
const WATCHERS: usize = 25;

/// A load balancer that passes each connection to a replica that accepts it.
#[derive(Debug)]
struct Balancer {
    addr: SocketAddr,
    _accepting: AbortOnDropHandle<()>,
}

impl Balancer {
    async fn start(replicas: Vec<SocketAddr>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            let mut turn = 0;
            while let Ok((mut client, _)) = listener.accept().await {
                turn += 1;
                let mut order = replicas.clone();
                order.rotate_left(turn % replicas.len());
                connections.spawn(async move {
                    for replica in order {
                        if let Ok(mut server) = TcpStream::connect(replica).await {
                            let _ = client.set_nodelay(true);
                            let _ = server.set_nodelay(true);
                            // Either end may break the connection, and the other end sees that.
                            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                            return;
                        }
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { addr, _accepting: AbortOnDropHandle::new(accepting) })
    }
}

/// Returns an image that matches the engine's script.
fn scripted_image(name: &str) -> api::Image {
    image(name, "FROM scratch\nRUN make")
}

/// Watches all visible images until `expected` of them are built, and returns them.
///
/// `expected` is `usize::MAX` until the number is known.
async fn final_states(
    client: Client,
    mut expected: watch::Receiver<usize>,
) -> Result<BTreeMap<String, api::Image>, Status> {
    let mut known = BTreeMap::new();
    let mut watch = ImagesWatch::new(client.images.clone(), api::WatchImagesRequest::default());
    loop {
        let watched = tokio::select! {
            watched = watch.next() => Some(watched?),
            Ok(()) = expected.changed() => None,
        };
        match watched {
            Some(Watched::Begun) => known.clear(),
            Some(Watched::Event(Event::Image(image) | Event::Changed(image))) => {
                known.insert(image.id.clone(), *image);
            }
            Some(Watched::Event(Event::Removed(removed))) => {
                known.remove(&removed.id);
            }
            Some(Watched::Event(Event::Synced(_) | Event::Bookmark(_))) | None => {}
        }
        let built = known.values().filter(|image| image.status() == ImageStatus::BuildFinished).count();
        if built == *expected.borrow() {
            return Ok(known);
        }
    }
}

/// Returns the number of images whose build has not ended.
async fn unfinished(client: &Client) -> anyhow::Result<i64> {
    let request = api::ListImagesRequest {
        statuses: vec![ImageStatus::BuildPending.into(), ImageStatus::Building.into()],
        include_total_size: true,
        ..Default::default()
    };
    let tries = AtomicUsize::new(0);
    let list = || async { client.images.clone().list_images(request.clone()).await };
    patiently(&tries, list).await?.into_inner().total_size.context("a total size")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_everything_is_noticed_by_nobody() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    if !catalogue.is_shared() {
        return Ok(());
    }
    let count = usize::try_from(number("TRAILER_TEST_BUILDS", BUILDS))?;
    let mut replicas = Vec::new();
    for i in 0..3 {
        replicas.push(catalogue.replica(&format!("replica-{i}"), &[], &["--drain-grace", "5s"]).await?);
    }
    let balancer = Balancer::start(replicas.iter().map(|replica| replica.addr).collect()).await?;
    let engine = FakeEngine::start().await?;
    engine.script(
        Script::new().step("[1/2] FROM scratch").cached().step("[2/2] RUN make").log("made").succeed(),
    );
    // One build runs until all restarts are done.
    let gate = Gate::new();
    engine.on("RUN watched", Script::new().step("[1/1] RUN watched").pause(&gate).log("made").succeed());
    let mut workers = Vec::new();
    for i in 0..6 {
        let (name, flags) = (format!("w{i}"), ["--slots", "4", "--drain-grace", "5s"]);
        workers.push(catalogue.worker(&name, balancer.addr, &engine.docker_host(), &[], &flags).await?);
    }

    // Every client has its own connection, so that all replicas are called.
    let new_client = |subject: &str| catalogue.builder(subject, balancer.addr);
    let (total, expected) = watch::channel(usize::MAX);
    let mut following = JoinSet::new();
    for _ in 0..WATCHERS {
        following.spawn(final_states(new_client("alice"), expected.clone()));
    }
    let tries = Arc::new(AtomicUsize::new(0));
    let all_restarted = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for i in 0..CLIENTS {
        let (client, tries) = (new_client("alice"), Arc::clone(&tries));
        let all_restarted = Arc::clone(&all_restarted);
        clients.spawn(async move {
            let mut builds = Vec::new();
            while builds.len() < count / CLIENTS || !all_restarted.load(Ordering::Relaxed) {
                builds.push(
                    create(&client, scripted_image(&format!("Image {i}-{}", builds.len())), &tries).await?,
                );
                tokio::time::sleep(PAUSE).await;
            }
            Ok::<_, Status>(builds)
        });
    }
    let watched = api::CreateImageRequest {
        image: Some(image("Watched", "FROM scratch\nRUN watched")),
        ..Default::default()
    };
    let created = new_client("bob").images.create_image(watched).await?.into_inner();
    let first = created.build.context("a build")?;
    let mut watching = JoinSet::new();
    for _ in 0..WATCHERS {
        let mut watch = BuildWatch::new(new_client("bob").builds, first.id.clone());
        watching.spawn(async move {
            let mut events = Vec::new();
            while let Some(event) = watch.next().await? {
                events.push(event);
            }
            Ok::<_, Status>(events)
        });
    }

    for (replica, pair) in replicas.iter_mut().zip(workers.chunks_mut(2)) {
        replica.restart().await?;
        for worker in pair {
            worker.restart().await?;
        }
    }
    all_restarted.store(true, Ordering::Relaxed);
    gate.open();
    println!("{} calls were tried again", tries.load(Ordering::Relaxed));

    let mut builds = Vec::new();
    while let Some(done) = clients.join_next().await {
        builds.extend(done?.context("a call failed that was tried again as the manual says")?);
    }
    assert!(builds.len() >= count);
    total.send_replace(builds.len());
    let names: BTreeSet<&str> = builds.iter().map(|(image, _)| image.id.as_str()).collect();
    assert_eq!(names.len(), builds.len(), "what was tried again was done once");
    let alice = new_client("alice");
    let mut known = Vec::new();
    let mut left = unfinished(&alice).await?;
    while known.len() < WATCHERS {
        if let Ok(followed) = tokio::time::timeout(LIMIT, following.join_next()).await {
            known.push(followed.context("a watcher")???);
            continue;
        }
        // However busy the machine is, the backlog must shrink.
        let before = std::mem::replace(&mut left, unfinished(&alice).await?);
        anyhow::ensure!(left < before, "of {before} builds {left} do not end; {} are known", known.len());
    }
    for known in known {
        assert_eq!(known.keys().map(String::as_str).collect::<BTreeSet<_>>(), names);
    }
    for (_, build) in &builds {
        let found = patiently(&tries, || async { alice.get_build(&build.id).await }).await?;
        assert_eq!(found.state(), BuildState::Succeeded, "{found:?}");
        let events = patiently(&tries, || async { alice.history(&build.id, 0).await }).await?;
        assert_gapless(&events, 1);
        let ends = states(&events).into_iter().filter(|state| *state == BuildState::Succeeded).count();
        assert_eq!(ends, 1);
    }
    while let Some(watched) = watching.join_next().await {
        let events = watched??;
        assert_gapless(&events, 1);
        assert_eq!(states(&events).last(), Some(&BuildState::Succeeded));
    }
    assert!(engine.unexpected().is_empty(), "{:?}", engine.unexpected());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_at_another_replica() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    if !catalogue.is_shared() {
        return Ok(());
    }
    let mut first = catalogue.replica("first", &[], &[]).await?;
    let second = catalogue.replica("second", &[], &[]).await?;
    let balancer = Balancer::start(vec![second.addr, first.addr]).await?;
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    engine.script(Script::new().step("[1/1] RUN make").log("one\n").pause(&gate).log("two\n").succeed());
    let _worker = catalogue.worker("w1", balancer.addr, &engine.docker_host(), &[], &[]).await?;
    let alice = client(second.addr, &catalogue.token("alice", Role::Builder));
    let (_, build) = alice.create(image("Moved", "FROM scratch")).await?;
    gate.reached().await;
    let log = catalogue.log("first")?;
    assert!(
        log.contains("a worker connected"),
        "the balancer gives the first connection to the first: {log}"
    );
    first.program.kill()?;
    gate.open();
    let finished = alice.finished(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    assert_eq!(crate::answers::lines(&alice.history(&build.id, 0).await?), ["one", "two"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_starts_on_the_schema_of_the_one_after_it() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let (created, _) = service.builder("alice").create(image("Kept", "FROM scratch")).await?;
    let database = service.end().await?;
    for later in [
        "ALTER TABLE images ADD COLUMN invented_later VARCHAR",
        "INSERT INTO seaql_migrations (version, applied_at) VALUES ('m9999_later', 0)",
    ] {
        database.execute(later).await?;
    }
    let service = Service::start_on(database, &[]).await?;
    let alice = service.builder("alice");
    assert_eq!(alice.get(&created.id).await?.name, "Kept");
    alice.create(image("Another", "FROM scratch")).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_together_share_the_work_of_migrating() -> anyhow::Result<()> {
    let first = Database::create().await?;
    if first.url().is_none() {
        return Ok(());
    }
    let database = Arc::new(first);
    let start = || Service::start_on(Arc::clone(&database), &[]);
    let (first, second, third) = tokio::try_join!(start(), start(), start())?;
    let (created, _) = first.builder("alice").create(image("Shared", "FROM scratch")).await?;
    for replica in [second, third] {
        assert_eq!(replica.builder("alice").get(&created.id).await?.name, "Shared");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_freezes_keeps_the_others_from_nothing_for_long() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    if !catalogue.is_shared() {
        return Ok(());
    }
    let frozen = catalogue.replica("frozen", &[], &[]).await?;
    let other = catalogue.replica("other", &[], &[]).await?;
    let tries = Arc::new(AtomicUsize::new(0));
    // Write all the time, so that the replica freezes in the middle of a write.
    let mut writing = JoinSet::new();
    for i in 0..8 {
        let (client, tries) = (catalogue.builder("alice", frozen.addr), Arc::clone(&tries));
        writing.spawn(async move {
            for j in 0.. {
                if create(&client, scripted_image(&format!("Frozen {i}-{j}")), &tries).await.is_err() {
                    return;
                }
            }
        });
    }
    let bob = catalogue.builder("bob", other.addr);
    create(&bob, scripted_image("Before"), &tries).await?;
    frozen.program.signal(Signal::STOP)?;
    let begun = std::time::Instant::now();
    create(&bob, scripted_image("After"), &tries).await?;
    // Workers stop their builds when no heartbeat has been written for 30 s.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    frozen.program.signal(Signal::CONT)?;
    Ok(())
}
