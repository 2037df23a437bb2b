//! Fresh reads: each sees everything that was answered before it began, by any replica, or is refused.

use std::{sync::Arc, time::Duration};

use fastrand::Rng;
use proto::images::{self as api, BuildState, ImageStatus, ListImagesRequest, Permission};
use sea_orm::{ConnectionTrait as _, Database as Connection, TransactionTrait as _};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    answers::{assert_gapless, lines, refused},
    client::{Client, channel, image},
    eventually::eventually_true,
    fake_engine::{Ended, FakeEngine, Gate, Script, State},
    relay::Relay,
    stack::{LIMIT, Service, Worker},
};

/// Renames an image.
async fn rename(client: &Client, id: &str, name: &str) -> Result<(), Status> {
    let image = api::Image { id: id.to_owned(), name: name.to_owned(), ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["name".to_owned()] });
    let request = api::UpdateImageRequest { image: Some(image), update_mask, ..Default::default() };
    client.images.clone().update_image(request).await.map(|_| ())
}

/// Returns the ids of all images that match a search term.
async fn search(client: &Client, term: &str) -> Result<Vec<String>, Status> {
    let request = ListImagesRequest { search: term.to_owned(), ..Default::default() };
    let page = client.images.clone().list_images(request).await?.into_inner();
    Ok(page.images.into_iter().map(|image| image.id).collect())
}

/// One service and, on Postgres, two more replicas whose database connections stall at random.
struct Replicas {
    services: Vec<Service>,
    relays: Vec<Arc<Relay>>,
}

impl Replicas {
    async fn start() -> anyhow::Result<Self> {
        let mut all = Self { services: vec![Service::start().await?], relays: Vec::new() };
        if let Some(url) = all.services[0].database().url() {
            for _ in 0..2 {
                let relay = Relay::start(&url)?;
                all.services.push(all.services[0].start_replica_at(relay.url()).await?);
                all.relays.push(Arc::new(relay));
            }
        }
        Ok(all)
    }

    fn any(&self, random: &mut Rng) -> &Service {
        &self.services[random.usize(0..self.services.len())]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_sees_what_was_written_through_any_replica() -> anyhow::Result<()> {
    let replicas = Replicas::start().await?;
    let mut random = Rng::with_seed(7);
    let mut stalling = tokio::task::JoinSet::new();
    for relay in &replicas.relays {
        let (relay, mut random) = (Arc::clone(relay), random.fork());
        stalling.spawn(async move {
            loop {
                relay.stall(random.bool());
                tokio::time::sleep(Duration::from_millis(random.u64(1..120))).await;
            }
        });
    }
    for round in 0..40 {
        let alice = |random: &mut Rng| replicas.any(random).builder("alice");
        let bob = |random: &mut Rng| replicas.any(random).builder("bob");
        let created = alice(&mut random).create_template(&format!("Fresh {round}")).await?;
        let id = created.id;
        assert_eq!(alice(&mut random).get(&id).await?.name, created.name, "round {round}");
        assert_eq!(search(&alice(&mut random), &format!("fresh {round}")).await?, [id.as_str()]);

        let name = format!("Renamed {round}");
        rename(&alice(&mut random), &id, &name).await?;
        assert_eq!(alice(&mut random).get(&id).await?.name, name);
        assert_eq!(search(&alice(&mut random), &name).await?, [id.as_str()]);
        assert!(search(&alice(&mut random), &format!("fresh {round}")).await?.is_empty(), "round {round}");

        alice(&mut random).grant(&id, "bob", &[Permission::View]).await?;
        assert_eq!(bob(&mut random).get(&id).await?.name, name);
        alice(&mut random).revoke(&id, "bob").await?;
        let hidden = bob(&mut random).get(&id).await.map_err(|status| status.code());
        assert_eq!(hidden, Err(Code::NotFound), "round {round}");
        assert!(search(&bob(&mut random), &name).await?.is_empty(), "round {round}");

        alice(&mut random).delete(&id).await?;
        let gone = alice(&mut random).get(&id).await.map_err(|status| status.code());
        assert_eq!(gone, Err(Code::NotFound), "round {round}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_nothing_stale_is_answered() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let Some(url) = service.database().url() else {
        return Ok(());
    };
    let relay = Relay::start(&url)?;
    let replica = service.start_replica_at(relay.url()).await?;
    let (alice, bob) = (service.builder("alice"), replica.builder("bob"));
    let (shared, _) = alice.create(image("Shared", "FROM scratch")).await?;
    alice.grant(&shared.id, "bob", &[Permission::View]).await?;
    assert_eq!(bob.get(&shared.id).await?.name, "Shared");

    relay.close(true);
    alice.revoke(&shared.id, "bob").await?;
    for _ in 0..3 {
        let refused = bob.get(&shared.id).await.map_err(|status| status.code());
        assert_eq!(refused, Err(Code::Unavailable));
        let refused = bob.list().await.map_err(|status| status.code());
        assert_eq!(refused, Err(Code::Unavailable));
    }
    relay.close(false);
    eventually_true("the replica is available", async || match bob.get(&shared.id).await {
        Ok(found) => anyhow::bail!("what was revoked is answered: {found:?}"),
        Err(status) if status.code() == Code::Unavailable => Ok(false),
        Err(status) if status.code() == Code::NotFound => Ok(true),
        Err(status) => Err(status.into()),
    })
    .await?;
    alice.grant(&shared.id, "bob", &[Permission::View]).await?;
    assert_eq!(bob.get(&shared.id).await?.name, "Shared");
    Ok(())
}

/// Simulates a large catalogue: a million images take seconds to load.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_that_loads_the_catalogue_for_long_stops_no_build() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let Some(url) = service.database().url() else {
        // Nothing can block reads of a file.
        return Ok(());
    };
    let engine = FakeEngine::start().await?;
    let gate = Gate::new();
    let script = Script::new().step("[1/1] RUN over").log("before\n").pause(&gate).log("after\n");
    engine.on("RUN over", script.succeed());
    let alice = service.builder("alice");
    let one = ["--slots", "1"];
    let _worker = Worker::start_at(&service, service.addr, "w1", &engine.docker_host(), &one)?;
    let (_, running) = alice.create(image("Running", "FROM scratch\nRUN over")).await?;
    gate.reached().await;
    let (waiting, queued) = alice.create(image("Waiting", "FROM scratch")).await?;

    let holder = Connection::connect(&url).await?;
    let lock = holder.begin().await?;
    // Builds do not read grants.
    lock.execute_unprepared("LOCK TABLE grants IN ACCESS EXCLUSIVE MODE").await?;
    let service = service.restart().await?;
    let alice = service.builder("alice");
    let mut health = HealthClient::new(channel(service.addr));
    let mut check = async |name: &str| -> anyhow::Result<ServingStatus> {
        let request = HealthCheckRequest { service: name.to_owned() };
        Ok(health.check(request).await?.into_inner().status())
    };
    gate.open();
    let both =
        |state: &State| state.builds.iter().filter(|build| build.ended == Ended::Succeeded).count() == 2;
    engine.wait_for(both, LIMIT).await?;
    assert_eq!(check("trailer.dispatch.v1.DispatchService").await?, ServingStatus::Serving);
    assert_eq!(check("trailer.images.v1.ImageService").await?, ServingStatus::NotServing);
    let unavailable = refused(alice.get(&waiting.id).await);
    assert_eq!(unavailable, (Code::Unavailable, "CATALOGUE_LOADING".to_owned()));

    lock.rollback().await?;
    eventually_true("it serves", async || {
        Ok(check("trailer.images.v1.ImageService").await? == ServingStatus::Serving)
    })
    .await?;
    for build in [&running, &queued] {
        let finished = alice.finished(&build.id).await?;
        assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 1, 0));
    }
    let events = alice.history(&running.id, 0).await?;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events), ["before", "after"]);
    assert_eq!(alice.get(&waiting.id).await?.status(), ImageStatus::BuildFinished);
    Ok(())
}
