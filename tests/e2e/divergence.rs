//! An index that diverges from the database, by a failover, a feed that was cut for too long, or a change
//! that was not logged: no answer is false, the index recovers, and the log says what happened.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use proto::{
    images::{self as api, BuildState, Permission, WatchImagesRequest, watch_images_response::Event},
    watch::{ImagesWatch, Watched},
};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    answers::{assert_gapless, lines},
    client::{Caller, Client, channel, image},
    edits::update,
    eventually::{eventually, eventually_true, eventually_within},
    fake_engine::{FakeEngine, Gate, Script},
    programs::{Catalogue, Listening},
    recovery::talk,
    relay::Relay,
    stack::{LIMIT, Service, Worker},
};

const SERVICE: &str = "image-service";

/// Retries a call for as long as the catalogue is unavailable.
async fn answered<T>(call: impl AsyncFn() -> Result<T, Status>) -> anyhow::Result<Result<T, Status>> {
    eventually("the catalogue is available", async || match call().await {
        Err(status) if status.code() == Code::Unavailable => Ok(None),
        answer => Ok(Some(answer)),
    })
    .await
}

/// Returns the name of an image, or `None` if the caller does not see it.
async fn name(client: &Client, id: &str) -> anyhow::Result<Option<String>> {
    match answered(async || client.get(id).await).await? {
        Ok(image) => Ok(Some(image.name)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status.into()),
    }
}

/// Sets the name and the Dockerfile of an image.
async fn edit(client: &Client, id: &str, name: &str, dockerfile: &str) -> Result<api::Image, Status> {
    let edited = api::Image { id: id.to_owned(), ..image(name, dockerfile) };
    update(client, edited, &["name", "config"]).await
}

/// Waits until the catalogue's health check reports `status`.
async fn health(replica: &Listening, status: ServingStatus) -> anyhow::Result<()> {
    let mut health = HealthClient::new(channel(replica.addr));
    let request = HealthCheckRequest { service: "trailer.images.v1.ImageService".to_owned() };
    eventually_true(&format!("health says {status:?}"), async || {
        Ok(health.check(request.clone()).await?.into_inner().status() == status)
    })
    .await
}

/// Waits until a program has logged a line with all of these words.
async fn logged(catalogue: &Catalogue, program: &str, words: &[&str]) -> anyhow::Result<()> {
    /// More than the 20 s for which a database may stall before health tells it.
    const PATIENCE: Duration = Duration::from_secs(60);
    eventually_within(PATIENCE, &format!("{words:?} is in the log"), async || {
        let log = catalogue.log(program)?;
        Ok(log.lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(()))
    })
    .await
    .with_context(|| catalogue.log(program).unwrap_or_default())
}

/// A watch and the image names that it has received.
struct Watcher {
    watch: ImagesWatch<Caller>,
    names: BTreeMap<String, String>,
    is_synced: bool,
}

impl Watcher {
    fn new(client: &Client) -> Self {
        let watch = ImagesWatch::new(client.images.clone(), WatchImagesRequest::default());
        Self { watch, names: BTreeMap::new(), is_synced: false }
    }

    /// Follows the watch until exactly these names are known.
    async fn until(&mut self, names: &[(&str, &str)]) -> anyhow::Result<()> {
        let expected: BTreeMap<String, String> =
            names.iter().map(|(id, name)| ((*id).to_owned(), (*name).to_owned())).collect();
        match tokio::time::timeout(LIMIT, self.follow(&expected)).await {
            Ok(followed) => followed,
            Err(_) => anyhow::bail!("{:?} is known, not {expected:?}", self.names),
        }
    }

    async fn follow(&mut self, expected: &BTreeMap<String, String>) -> anyhow::Result<()> {
        while !self.is_synced || self.names != *expected {
            match self.watch.next().await? {
                Watched::Begun => {
                    self.is_synced = false;
                    self.names.clear();
                }
                Watched::Event(Event::Image(image) | Event::Changed(image)) => {
                    self.names.insert(image.id, image.name);
                }
                Watched::Event(Event::Removed(removed)) => {
                    self.names.remove(&removed.id);
                }
                Watched::Event(Event::Synced(_) | Event::Bookmark(_)) => self.is_synced = true,
            }
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_lost_the_last_changes_is_not_answered_for() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    if !catalogue.is_shared() {
        // A file does not lose committed changes.
        return Ok(());
    }
    let replica = catalogue.replica(SERVICE, &[], &[]).await?;
    health(&replica, ServingStatus::Serving).await?;
    let [alice, bob] = ["alice", "bob"].map(|subject| catalogue.builder(subject, replica.addr));
    let kept = alice.create_template("Kept").await?;
    let saved = catalogue.database().save().await?;
    let lost = alice.create_template("Lost").await?;
    let renamed = edit(&alice, &kept.id, "Renamed", "FROM scratch\nLABEL is=lost").await?;
    alice.grant(&kept.id, "bob", &[Permission::View]).await?;
    assert_eq!(bob.get(&kept.id).await?.config, renamed.config);
    let mut watcher = Watcher::new(&alice);
    watcher.until(&[(&kept.id, "Renamed"), (&lost.id, "Lost")]).await?;

    saved.fail_over().await?;
    for _ in 0..10 {
        assert_eq!(name(&alice, &lost.id).await?, None);
        assert_eq!(name(&alice, &kept.id).await?.as_deref(), Some("Kept"));
        assert_eq!(name(&bob, &kept.id).await?, None);
    }
    watcher.until(&[(&kept.id, "Kept")]).await?;
    logged(&catalogue, SERVICE, &["the database is not the one that was read", "loaded anew"]).await?;
    health(&replica, ServingStatus::Serving).await?;

    // The lost revision numbers are assigned again.
    let another = alice.create_template("Another").await?;
    assert_eq!(alice.get(&another.id).await?.name, "Another");
    let edited = edit(&alice, &kept.id, "Edited", "FROM scratch\nLABEL is=new").await?;
    assert_eq!(edited.config_revision, renamed.config_revision);
    assert_eq!(alice.get(&kept.id).await?.config, edited.config);
    assert_ne!(edited.config, renamed.config);
    watcher.until(&[(&kept.id, "Edited"), (&another.id, "Another")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feed_that_was_cut_until_its_changes_were_forgotten_loads_anew() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    let Some(url) = catalogue.database().url() else {
        // Nothing can be placed between a service and its file.
        return Ok(());
    };
    let relay = Relay::start(&url)?;
    let cut = catalogue.replica_by("cut", relay.url()).await?;
    let other = catalogue.replica("other", &[], &[]).await?;
    for replica in [&cut, &other] {
        health(replica, ServingStatus::Serving).await?;
    }
    let (alice, bob) = (catalogue.builder("alice", other.addr), catalogue.builder("bob", cut.addr));
    let [revoked, shared] = [alice.create_template("Revoked").await?, alice.create_template("Shared").await?];
    for image in [&revoked, &shared] {
        alice.grant(&image.id, "bob", &[Permission::View]).await?;
    }
    let mut watcher = Watcher::new(&bob);
    watcher.until(&[(&revoked.id, "Revoked"), (&shared.id, "Shared")]).await?;

    relay.close(true);
    alice.revoke(&revoked.id, "bob").await?;
    edit(&alice, &shared.id, "Renamed", "FROM scratch").await?;
    let compact = "BEGIN; DELETE FROM changes; \
                  UPDATE catalogue SET compacted_revision = revision, compacted_nonce = nonce; COMMIT";
    catalogue.database().execute(compact).await?;
    let unavailable = bob.get(&revoked.id).await.map_err(|status| status.code());
    assert_eq!(unavailable, Err(Code::Unavailable));
    logged(&catalogue, "cut", &["cannot read the change log"]).await?;
    logged(&catalogue, "cut", &["the catalogue lags behind", "NOT_SERVING"]).await?;
    health(&cut, ServingStatus::NotServing).await?;

    relay.close(false);
    assert_eq!(name(&bob, &revoked.id).await?, None);
    assert_eq!(name(&bob, &shared.id).await?.as_deref(), Some("Renamed"));
    watcher.until(&[(&shared.id, "Renamed")]).await?;
    logged(&catalogue, "cut", &["has compacted changes too early", "loaded anew"]).await?;
    health(&cut, ServingStatus::Serving).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_not_logged_is_found_and_repaired() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    let replica = catalogue.replica(SERVICE, &[], &[]).await?;
    health(&replica, ServingStatus::Serving).await?;
    let [alice, bob] = ["alice", "bob"].map(|subject| catalogue.builder(subject, replica.addr));
    let renamed = alice.create_template("Before").await?;
    let removed = alice.create_template("Removed").await?;
    let revoked = alice.create_template("Revoked").await?;
    alice.grant(&revoked.id, "bob", &[Permission::View]).await?;
    assert_eq!(bob.get(&revoked.id).await?.name, "Revoked");
    let (mut of_alice, mut of_bob) = (Watcher::new(&alice), Watcher::new(&bob));
    of_alice.until(&[(&renamed.id, "Before"), (&removed.id, "Removed"), (&revoked.id, "Revoked")]).await?;
    of_bob.until(&[(&revoked.id, "Revoked")]).await?;
    for planted in [
        "UPDATE images SET name = 'Planted' WHERE name = 'Before'",
        "DELETE FROM images WHERE name = 'Removed'",
        "DELETE FROM grants",
    ] {
        catalogue.database().execute(planted).await?;
    }
    eventually_true("it is repaired", async || {
        Ok(name(&alice, &renamed.id).await?.as_deref() == Some("Planted")
            && name(&alice, &removed.id).await?.is_none()
            && name(&bob, &revoked.id).await?.is_none())
    })
    .await
    .with_context(|| catalogue.log(SERVICE).unwrap_or_default())?;
    let by_term = api::ListImagesRequest { search: "planted".to_owned(), ..Default::default() };
    let found = alice.images.clone().list_images(by_term).await?.into_inner().images;
    assert_eq!(found.into_iter().map(|image| image.id).collect::<Vec<_>>(), [renamed.id.as_str()]);
    of_alice.until(&[(&renamed.id, "Planted"), (&revoked.id, "Revoked")]).await?;
    of_bob.until(&[]).await?;
    for id in [&renamed.id, &removed.id, &revoked.id] {
        logged(&catalogue, SERVICE, &["repaired a difference between the index and the database", id])
            .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_read_takes_no_other_along() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    let mut replica = catalogue.replica(SERVICE, &[], &[]).await?;
    health(&replica, ServingStatus::Serving).await?;
    let alice = catalogue.builder("alice", replica.addr);
    let damaged = alice.create_template("Damaged").await?;
    let other = alice.create_template("Before").await?;
    for planted in [
        "UPDATE configurations SET json = '{' WHERE image IN (SELECT id FROM images WHERE name = 'Damaged')",
        "UPDATE images SET name = 'Planted' WHERE name = 'Before'",
    ] {
        catalogue.database().execute(planted).await?;
    }
    let is_repaired = async || Ok(name(&alice, &other.id).await?.as_deref() == Some("Planted"));
    eventually_true("the other one is repaired", is_repaired)
        .await
        .with_context(|| catalogue.log(SERVICE).unwrap_or_default())?;
    logged(&catalogue, SERVICE, &["cannot be read from the database", &damaged.id]).await?;
    replica.restart().await?;
    health(&replica, ServingStatus::Serving).await?;
    assert_eq!(name(&alice, &other.id).await?.as_deref(), Some("Planted"));
    assert_eq!(name(&alice, &damaged.id).await?, None);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_that_the_log_lacks_are_not_waited_for() -> anyhow::Result<()> {
    let catalogue = Catalogue::create().await?;
    let mut replica = catalogue.replica(SERVICE, &[], &[]).await?;
    health(&replica, ServingStatus::Serving).await?;
    let alice = catalogue.builder("alice", replica.addr);
    let image = alice.create_template("Here").await?;
    for planted in ["UPDATE catalogue SET revision = revision + 1", "UPDATE catalogue SET nonce = nonce + 1"]
    {
        catalogue.database().execute(planted).await?;
        logged(&catalogue, SERVICE, &["loaded anew"]).await?;
        assert_eq!(name(&alice, &image.id).await?.as_deref(), Some("Here"), "{planted}");
    }
    // A backup may have been made without the log.
    catalogue.database().execute("DELETE FROM changes").await?;
    replica.restart().await?;
    health(&replica, ServingStatus::Serving).await?;
    assert_eq!(name(&alice, &image.id).await?.as_deref(), Some("Here"));
    let second = alice.create_template("Second").await?;
    assert_eq!(name(&alice, &second.id).await?.as_deref(), Some("Second"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_whose_last_lines_a_failover_has_lost_is_begun_anew() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let database = Arc::clone(service.database());
    if database.url().is_none() {
        // A file does not lose committed changes.
        return Ok(());
    }
    let engine = FakeEngine::start().await?;
    let gates = [Gate::new(), Gate::new()];
    engine.script(talk(&gates).log("c\n").succeed());
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Talk", "FROM scratch\nRUN talk")).await?;
    gates[0].reached().await;
    alice.until(&build.id, |build| build.log_bytes == 30).await?;
    let saved = database.save().await?;
    gates[0].open();
    gates[1].reached().await;
    alice.until(&build.id, |build| build.log_bytes == 60).await?;
    engine.script(Script::new().step("[1/1] RUN talk").log("once more\n").succeed());

    saved.fail_over().await?;
    gates[1].open();
    let events = answered(async || alice.history(&build.id, 0).await).await??;
    assert_gapless(&events, 1);
    assert_eq!(lines(&events).last(), Some(&"once more"));
    let finished = alice.get_build(&build.id).await?;
    assert_eq!((finished.state(), finished.attempt, finished.failures), (BuildState::Succeeded, 2, 1));
    assert_eq!(engine.running(), 0);
    Ok(())
}
