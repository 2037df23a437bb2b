//! Watches of the catalogue: no gaps, resuming, and a reason at the end.

use std::collections::BTreeMap;

use anyhow::Context as _;
use image_service::Role;
use proto::images::{self as api, ImageStatus, ImageView, WatchImagesRequest, watch_images_response::Event};
use tonic::{Code, Status, Streaming};

use crate::{
    answers::{fields, reason},
    client::{Client, channel, client, image},
    fake_engine::FakeEngine,
    proxy::Proxy,
    stack::{LIMIT, Service, Worker},
};

/// A watch and the images that it has reported.
struct Watcher {
    stream: Streaming<api::WatchImagesResponse>,
    images: BTreeMap<String, api::Image>,
    resume: String,
}

impl Watcher {
    async fn begin(client: &Client, after: &str) -> Result<Self, Status> {
        let request =
            WatchImagesRequest { after_revision: after.to_owned(), ..WatchImagesRequest::default() };
        let stream = client.images.clone().watch_images(request).await?.into_inner();
        Ok(Self { stream, images: BTreeMap::new(), resume: after.to_owned() })
    }

    /// Receives the next message and applies it.
    async fn next(&mut self) -> anyhow::Result<Event> {
        let message = tokio::time::timeout(LIMIT, self.stream.message()).await??;
        let message = message.ok_or_else(|| anyhow::anyhow!("the watch ended without saying why"))?;
        self.resume = message.resume_revision;
        let event = message.event.ok_or_else(|| anyhow::anyhow!("an empty message"))?;
        match &event {
            Event::Image(image) | Event::Changed(image) => {
                self.images.insert(image.id.clone(), (**image).clone());
            }
            Event::Removed(removed) => {
                self.images.remove(&removed.id);
            }
            Event::Synced(_) | Event::Bookmark(_) => {}
        }
        Ok(event)
    }

    async fn until(&mut self, condition: impl Fn(&Self, &Event) -> bool) -> anyhow::Result<()> {
        loop {
            let event = self.next().await?;
            if condition(self, &event) {
                return Ok(());
            }
        }
    }

    async fn synced(&mut self) -> anyhow::Result<()> {
        self.until(|_, event| matches!(event, Event::Synced(_))).await
    }

    fn status(&self, id: &str) -> Option<ImageStatus> {
        self.images.get(id).map(api::Image::status)
    }

    async fn end(mut self) -> Status {
        loop {
            match tokio::time::timeout(LIMIT, self.stream.message()).await.expect("the watch ends in time") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the watch ended without saying why"),
                Err(status) => return status,
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_follows_the_catalogue() -> anyhow::Result<()> {
    let engine = FakeEngine::start().await?;
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (first, _) = alice.create(image("First", "FROM scratch")).await?;
    service.builder("bob").create(image("Not mine", "FROM scratch")).await?;

    let mut watcher = Watcher::begin(&alice, "").await?;
    watcher.synced().await?;
    assert_eq!(watcher.images.keys().collect::<Vec<_>>(), [&first.id]);
    assert!(watcher.images.values().all(|image| image.config.is_none()));

    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    watcher.until(|w, _| w.status(&first.id) == Some(ImageStatus::BuildFinished)).await?;
    let (second, _) = alice.create(image("Second", "FROM scratch")).await?;
    watcher.until(|w, _| w.status(&second.id) == Some(ImageStatus::BuildFinished)).await?;
    alice.delete(&first.id).await?;
    watcher.until(|_, event| matches!(event, Event::Removed(removed) if removed.id == first.id)).await?;
    let listed: BTreeMap<String, api::Image> =
        alice.list().await?.into_iter().map(|image| (image.id.clone(), image)).collect();
    assert_eq!(watcher.images, listed);

    let request = WatchImagesRequest { view: ImageView::Full.into(), ..WatchImagesRequest::default() };
    let full = alice.images.clone().watch_images(request).await?.into_inner().message().await?;
    let Some(Event::Image(full)) = full.and_then(|message| message.event) else {
        anyhow::bail!("no image came");
    };
    assert!(full.config.is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_was_cut_resumes_where_it_was() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let proxy = Proxy::start(service.addr).await?;
    let alice = service.builder("alice");
    let through_proxy = client(proxy.addr(), &service.token("alice", &[Role::Builder]));
    let (kept, _) = alice.create(image("Kept", "FROM scratch")).await?;
    let (gone, _) = alice.create(image("Gone", "FROM scratch")).await?;
    let mut watcher = Watcher::begin(&through_proxy, "").await?;
    watcher.synced().await?;
    proxy.cut();
    alice.cancel(&kept.id).await?;
    alice.delete(&gone.id).await?;
    let (new, _) = alice.create(image("New", "FROM scratch")).await?;

    let images = watcher.images.clone();
    let resume = watcher.resume.clone();
    watcher.end().await;
    let mut watcher = Watcher::begin(&through_proxy, &resume).await?;
    watcher.images = images;
    watcher.synced().await?;
    let mut statuses: Vec<_> =
        watcher.images.values().map(|image| (image.id.as_str(), image.status())).collect();
    statuses.sort_unstable();
    let mut expected =
        [(kept.id.as_str(), ImageStatus::BuildCancelled), (new.id.as_str(), ImageStatus::BuildPending)];
    expected.sort_unstable();
    assert_eq!(statuses, expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_continues_from_a_list() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    for name in ["Old tools", "Other"] {
        alice.create(image(name, "FROM scratch")).await?;
    }
    let search = "tools".to_owned();
    let list =
        api::ListImagesRequest { search: search.clone(), order_by: "name".to_owned(), ..Default::default() };
    let listed = alice.images.clone().list_images(list).await?.into_inner();
    let names: Vec<&str> = listed.images.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, ["Old tools"]);
    alice.create(image("New tools", "FROM scratch")).await?;
    alice.delete(&listed.images[0].id).await?;

    let view = ImageView::Basic.into();
    let after_revision = listed.resume_revision;
    let request = WatchImagesRequest { after_revision, search, view, ..Default::default() };
    let stream = alice.images.clone().watch_images(request).await?.into_inner();
    let mut watcher = Watcher { stream, images: BTreeMap::new(), resume: String::new() };
    let (mut changed, mut removed) = (Vec::new(), Vec::new());
    loop {
        match watcher.next().await? {
            Event::Changed(image) => changed.push(image.name),
            Event::Removed(image) => removed.push(image.id),
            Event::Synced(_) => break,
            event @ (Event::Image(_) | Event::Bookmark(_)) => anyhow::bail!("{event:?}"),
        }
    }
    assert_eq!((changed, removed), (vec!["New tools".to_owned()], vec![listed.images[0].id.clone()]));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_is_good_for_its_query_caller_and_database() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let other_database = Service::start().await?;
    let (alice, bob) = (service.builder("alice"), service.builder("bob"));
    alice.create(image("A", "FROM scratch")).await?;
    let mut watcher = Watcher::begin(&alice, "").await?;
    watcher.synced().await?;
    let resume = watcher.resume;
    let admin = service.client(&service.token("alice", &[Role::Admin]));
    for (client, revision) in [
        (&bob, resume.as_str()),
        (&admin, resume.as_str()),
        (&other_database.builder("alice"), resume.as_str()),
        (&alice, "1"),
        (&alice, "nonsense"),
    ] {
        let refused = Watcher::begin(client, revision).await.err().expect("it is refused");
        assert_eq!(
            (refused.code(), fields(&refused)),
            (Code::InvalidArgument, vec!["after_revision".to_owned()])
        );
    }
    let view = ImageView::Full.into();
    let other_query = WatchImagesRequest { after_revision: resume.clone(), view, ..Default::default() };
    let refused = alice.images.clone().watch_images(other_query).await.expect_err("it is refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(Watcher::begin(&alice, &resume).await.is_ok());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_a_build_that_waits_is_never_silent_for_long() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("Waiting", "FROM scratch")).await?;
    let request = api::WatchBuildRequest { id: build.id, after_sequence: 0 };
    let mut watch = alice.builds.clone().watch_build(request).await?.into_inner();
    let mut messages = Vec::new();
    while messages.len() < 3 {
        let message =
            tokio::time::timeout(LIMIT, watch.message()).await??.context("the build has not ended")?;
        messages.push(message.events.len());
    }
    assert_eq!(messages, [1, 0, 0], "numbers of events by message");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_ends_every_stream_and_shows_in_the_health_checks() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let (_, build) = alice.create(image("A", "FROM scratch")).await?;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel(service.addr));
    let request = tonic_health::pb::HealthCheckRequest::default();
    let mut health = health.watch(request).await?.into_inner();
    let serving = tonic_health::pb::health_check_response::ServingStatus::Serving;
    // The status follows the catalogue, which has only just been loaded.
    let is_serving = async {
        while health.message().await?.context("the watch ended")?.status() != serving {}
        anyhow::Ok(())
    };
    tokio::time::timeout(LIMIT, is_serving).await??;

    let mut watcher = Watcher::begin(&alice, "").await?;
    watcher.synced().await?;
    let resume = watcher.resume.clone();
    let request = api::WatchBuildRequest { id: build.id, after_sequence: 0 };
    let mut histories = Vec::new();
    for _ in 0..50 {
        let mut history = alice.builds.clone().watch_build(request.clone()).await?.into_inner();
        assert!(history.message().await?.is_some());
        histories.push(history);
    }
    service.begin_shutdown();
    let ended = watcher.end().await;
    assert_eq!((ended.code(), reason(&ended).as_str()), (Code::Unavailable, "DRAINING"), "{ended:?}");
    for mut history in histories {
        let ended =
            tokio::time::timeout(LIMIT, history.message()).await?.expect_err("the build has not ended");
        assert_eq!((ended.code(), reason(&ended).as_str()), (Code::Unavailable, "DRAINING"), "{ended:?}");
    }
    let not_serving = tonic_health::pb::health_check_response::ServingStatus::NotServing;
    assert_eq!(health.message().await?.map(|answer| answer.status()), Some(not_serving));
    drop(health);

    let service = service.restart().await?;
    let mut watcher = Watcher::begin(&service.builder("alice"), &resume).await?;
    watcher.synced().await?;
    assert_eq!(watcher.images.len(), 0, "nothing was missed");
    service.stop().await
}
