//! Pulls and pushes, on a real engine and registries that require a password.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bollard::{
    Docker,
    auth::DockerCredentials,
    query_parameters::{
        CreateImageOptionsBuilder, ListImagesOptionsBuilder, PushImageOptions, RemoveImageOptionsBuilder,
        TagImageOptionsBuilder,
    },
};
use futures_util::{StreamExt as _, TryStreamExt as _};
use proto::images::{
    BuildErrorKind, BuildState, Image, ImageConfig, ImageStatus, PullSource, ResolveImageRequest, StepState,
    UpdateImageRequest, build_event::Event, image_config::Source,
};

use crate::{
    answers::{assert_gapless, lines, states},
    base_image,
    client::{Client, image, repository_under},
    engine_fixture,
    eventually::eventually_true,
    proxy::Proxy,
    registry::{DockerConfig, PASSWORD, Registry, USER},
    stack::{Service, Worker},
};

/// A registry, a proxy in front of it, and a service whose worker has the password for both.
pub(crate) struct Setting {
    pub(crate) docker: Docker,
    pub(crate) registry: Registry,
    proxy: Proxy,
    pub(crate) service: Service,
    _worker: Worker,
    pub(crate) config: DockerConfig,
    pub(crate) run: String,
}

impl Setting {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts with these flags of the worker.
    pub(crate) async fn start_with(flags_of_worker: &[&str]) -> anyhow::Result<Self> {
        let (docker, docker_host) = engine_fixture::connect().await?;
        let registry = Registry::start().await?;
        let proxy = Proxy::start(registry.addr).await?;
        let prefixes = [format!("{}/team/", registry.addr), format!("{}/team/", proxy.addr())];
        let flags = [
            "--repository-prefix",
            &prefixes[0],
            "--repository-prefix",
            &prefixes[1],
            "--retry-backoff=50ms",
        ];
        let service = Service::start_with(&flags).await?;
        let config = DockerConfig::with(PASSWORD, &[registry.addr, proxy.addr()])?;
        let run = uuid::Uuid::new_v4().simple().to_string();
        let flags =
            [&["--docker-config", config.path()?, "--collect-every", "500ms"], flags_of_worker].concat();
        let worker = Worker::start_at(&service, service.addr, &format!("w-{run}"), &docker_host, &flags)?;
        Ok(Self { docker, registry, proxy, service, _worker: worker, config, run })
    }

    pub(crate) fn alice(&self) -> Client {
        self.service.builder("alice")
    }

    pub(crate) fn in_registry(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.addr)
    }

    /// Pushes a small unique image to the registry and returns its digest. None is left in the engine.
    pub(crate) async fn publish_base(&self, name: &str) -> anyhow::Result<String> {
        let names = self.push_base(name).await?;
        let digest = self.digest_in_registry(&names[0]).await?;
        for name in &names {
            self.remove(name).await?;
        }
        Ok(digest)
    }

    /// Pushes a small unique image to the registry and returns the names that it has in the engine.
    async fn push_base(&self, name: &str) -> anyhow::Result<[String; 2]> {
        let local = format!("trailer-test/published-{}:latest", self.run);
        let text = uuid::Uuid::new_v4().to_string();
        base_image::import_with(&self.docker, &local, &text, "").await?;
        let repository = self.in_registry(name);
        let options = TagImageOptionsBuilder::new().repo(&repository).tag("1").build();
        self.docker.tag_image(&local, Some(options)).await?;
        let options = PushImageOptions { tag: Some("1".to_owned()), ..PushImageOptions::default() };
        let mut pushing = self.docker.push_image(&repository, Some(options), Some(credentials()));
        while let Some(progress) = pushing.next().await {
            progress?;
        }
        drop(pushing);
        Ok([format!("{repository}:1"), local])
    }

    async fn digest_in_registry(&self, reference: &str) -> anyhow::Result<String> {
        let found = self.docker.inspect_registry_image(reference, Some(credentials())).await?;
        found.descriptor.digest.context("a digest")
    }

    pub(crate) async fn remove(&self, name: &str) -> anyhow::Result<()> {
        let options = RemoveImageOptionsBuilder::new().force(true).build();
        self.docker.remove_image(name, Some(options), None).await?;
        Ok(())
    }

    async fn is_in_engine(&self, reference: &str) -> bool {
        self.docker.inspect_image(reference).await.is_ok()
    }

    /// Returns an image that is built and pushed to the registry at `at`.
    pub(crate) fn pushed(&self, at: SocketAddr, name: &str, from: &str, instructions: &str) -> Image {
        let mut pushed = image(name, &format!("FROM {from}\nENV RUN={}\n{instructions}", self.run));
        pushed.repository = repository_under(format!("{at}/team"), "alice", name);
        if let Some(config) = &mut pushed.config {
            config.push = true;
        }
        pushed
    }
}

fn credentials() -> DockerCredentials {
    DockerCredentials {
        username: Some(USER.to_owned()),
        password: Some(PASSWORD.to_owned()),
        ..DockerCredentials::default()
    }
}

pub(crate) fn pulled(name: &str, reference: &str) -> Image {
    let source = Source::Pull(PullSource { reference: reference.to_owned() });
    Image {
        name: name.to_owned(),
        config: Some(ImageConfig { source: Some(source), ..ImageConfig::default() }),
        ..Image::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_brings_what_the_registry_has_and_a_rebuild_pulls_again() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let digest = setting.publish_base("base").await?;
    let reference = setting.in_registry("base:1");
    assert!(!setting.is_in_engine(&reference).await);
    let alice = setting.alice();
    let (created, build) = alice.create(pulled("Pulled", &reference)).await?;
    assert!(created.pulled);
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let shown = alice.get(&created.id).await?;
    assert_eq!((shown.status(), shown.pulled), (ImageStatus::BuildFinished, true));
    assert_eq!(shown.reference, reference);
    let artifact = shown.artifact.context("an artifact")?;
    assert_eq!((artifact.repo_digest, artifact.reference), (digest, reference.clone()));
    assert!(artifact.size_bytes > 0);
    let request = ResolveImageRequest { id: created.id.clone() };
    let resolved = alice.images.clone().resolve_image(request).await?.into_inner();
    assert_eq!(
        setting.docker.inspect_image(&resolved.reference).await?.id.as_deref(),
        Some(artifact.image_id.as_str())
    );
    assert!(!setting.is_in_engine(&reference).await, "a pull has set a tag");
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    let expected = [BuildState::Queued, BuildState::Claimed, BuildState::Running, BuildState::Succeeded];
    assert_eq!(states(&events), expected);
    let steps: Vec<(String, StepState)> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::StepChange(step)) => Some((step.name.clone(), step.state())),
            _ => None,
        })
        .collect();
    assert_eq!(steps.first(), Some(&(format!("pull {reference}"), StepState::Started)), "{steps:?}");
    assert_eq!(steps.last(), Some(&(format!("pull {reference}"), StepState::Done)));
    let layer =
        |(name, state): &&(String, StepState)| name.starts_with("layer ") && *state == StepState::Done;
    assert_eq!(steps.iter().filter(layer).count(), 1, "{steps:?}");
    assert!(lines(&events).iter().any(|line| line.starts_with("Digest: sha256:")), "{:?}", lines(&events));

    // The registry has a newer image now, and the engine another one under the same tag.
    let newer = setting.publish_base("base").await?;
    base_image::import(&setting.docker, &reference).await?;
    let own = setting.docker.inspect_image(&reference).await?.id;
    let again = alice.build(&created.id).await?;
    assert_eq!(alice.finished(&again.id).await?.state(), BuildState::Succeeded);
    let latest = alice.get(&created.id).await?.artifact.context("an artifact")?;
    assert_eq!((latest.repo_digest, &latest.build_id), (newer, &again.id));
    assert_eq!(setting.docker.inspect_image(&reference).await?.id, own, "a pull has moved a tag");
    setting.remove(&reference).await?;

    // The engine has names for artifacts that records have, and for no others.
    let builds = async || -> anyhow::Result<Vec<String>> {
        let options = ListImagesOptionsBuilder::new().build();
        let tags = engine_fixture::list_images(&setting.docker, options).await?;
        let tags = tags.into_iter().flat_map(|image| image.repo_tags);
        let of_image = format!("/{}:", created.id);
        Ok(tags.filter_map(|tag| Some(tag.split_once(&of_image)?.1.to_owned())).collect())
    };
    let of_latest = [again.id];
    eventually_true("the name of the replaced artifact goes", async || Ok(builds().await? == of_latest))
        .await?;
    alice.delete(&created.id).await?;
    eventually_true("the name of the last artifact goes", async || Ok(builds().await?.is_empty())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_takes_a_newer_base_only_if_it_asks_for_it() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let alice = setting.alice();
    let base = setting.in_registry("base:1");
    setting.publish_base("base").await?;
    let digest_of_base = async |name: &str, pull_base: bool| -> anyhow::Result<String> {
        let mut wanted = image(name, &format!("FROM {base}\nENV RUN={}", setting.run));
        wanted.config.as_mut().context("a configuration")?.pull_base = pull_base;
        let (created, build) = alice.create(wanted).await?;
        let finished = alice.finished(&build.id).await?;
        anyhow::ensure!(finished.state() == BuildState::Succeeded, "{finished:?}");
        let reference = created.reference.clone();
        let layers = setting.docker.inspect_image(&reference).await?.root_fs.and_then(|fs| fs.layers);
        Ok(layers.context("layers")?.first().context("a layer")?.clone())
    };
    // The engine has the base from here on.
    let options = CreateImageOptionsBuilder::new().from_image(&setting.in_registry("base")).tag("1").build();
    let pulling = setting.docker.create_image(Some(options), None, Some(credentials()));
    pulling.try_collect::<Vec<_>>().await?;
    let first = digest_of_base("First", false).await?;
    let local = setting.docker.inspect_image(&base).await?.id.context("an id")?;
    let [_, newer] = setting.push_base("base").await?;
    let options = TagImageOptionsBuilder::new().repo(&setting.in_registry("base")).tag("1").build();
    setting.docker.tag_image(&local, Some(options)).await?;
    setting.remove(&newer).await?;
    assert_eq!(digest_of_base("Second", false).await?, first);
    assert_ne!(digest_of_base("Third", true).await?, first);
    setting.remove(&base).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_by_a_registry_is_an_error_with_its_reason() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let alice = setting.alice();
    let reference = setting.in_registry("nothing:1");
    let (created, build) = alice.create(pulled("Missing", &reference)).await?;
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!((failed.state(), error.kind(), failed.attempt), (BuildState::Failed, BuildErrorKind::User, 1));
    // The wording depends on the engine's image store.
    assert!(["manifest unknown", "not found"].iter().any(|words| error.message.contains(words)), "{error:?}");
    assert_eq!(error.step, format!("pull {reference}"));
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::Error);

    let missing = image("Missing base", &format!("FROM {reference}"));
    let (_, build) = alice.create(missing).await?;
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!((failed.state(), error.kind(), failed.attempt), (BuildState::Failed, BuildErrorKind::User, 1));
    assert!(error.message.contains("nothing:1"), "{error:?}");

    // A worker without the password.
    setting.publish_base("forbidden").await?;
    let reference = setting.in_registry("forbidden:1");
    let empty = DockerConfig::with(PASSWORD, &[])?;
    let (_, docker_host) = engine_fixture::connect().await?;
    let name = format!("stranger-{}", setting.run);
    let flags = ["--docker-config", empty.path()?];
    let _stranger = Worker::start_at(&setting.service, setting.service.addr, &name, &docker_host, &flags)?;
    let mut forbidden = pulled("Forbidden", &reference);
    if let Some(config) = &mut forbidden.config {
        config.worker.clone_from(&name);
    }
    let (created, build) = alice.create(forbidden).await?;
    let failed = alice.finished(&build.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!((failed.state(), error.kind(), failed.attempt), (BuildState::Failed, BuildErrorKind::User, 1));
    assert!(error.message.contains("no basic auth credentials"), "{error:?}");
    assert!(alice.get(&created.id).await?.status_message.contains("no basic auth credentials"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_built_on_a_private_one_is_pushed_and_verified() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    setting.publish_base("base").await?;
    let base = setting.in_registry("base:1");
    let alice = setting.alice();
    let wanted = setting.pushed(setting.registry.addr, "tools", &base, "RUN echo built > /built");
    let (created, build) = alice.create(wanted).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let artifact = alice.get(&created.id).await?.artifact.context("an artifact")?;
    let reference = created.reference.clone();
    assert_eq!(artifact.repo_digest, setting.digest_in_registry(&reference).await?);
    let events = alice.history(&build.id, 0).await?;
    assert_gapless(&events, 1);
    assert!(
        lines(&events).iter().any(|line| line.contains(&format!("digest: {}", artifact.repo_digest))),
        "{:?}",
        lines(&events)
    );
    for event in &events {
        assert!(!format!("{event:?}").contains(PASSWORD));
    }
    setting.remove(&reference).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_refused_names_its_step_and_gives_the_name_back() -> anyhow::Result<()> {
    const WRONG: &str = "open-barley-0815";
    let setting = Setting::start().await?;
    let alice = setting.alice();
    let base = format!("trailer-test/base-{}:latest", setting.run);
    base_image::import(&setting.docker, &base).await?;
    let wanted = setting.pushed(setting.registry.addr, "refused", &base, "RUN echo first > /built");
    let (mut created, build) = alice.create(wanted).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let reference = created.reference.clone();
    let before = setting.docker.inspect_image(&reference).await?.id;

    // From now on, the password is wrong.
    let wrong = DockerConfig::with(WRONG, &[setting.registry.addr])?;
    std::fs::copy(
        format!("{}/config.json", wrong.path()?),
        format!("{}/config.json", setting.config.path()?),
    )?;
    if let Some(Source::Dockerfile(source)) =
        created.config.as_mut().and_then(|config| config.source.as_mut())
    {
        source.text.push_str("\nRUN echo second > /built");
    }
    created.etag.clear();
    let request = UpdateImageRequest {
        image: Some(created.clone()),
        update_mask: Some(prost_types::FieldMask { paths: vec!["config".to_owned()] }),
        ..UpdateImageRequest::default()
    };
    alice.images.clone().update_image(request).await?;
    let again = alice.build(&created.id).await?;
    let failed = alice.finished(&again.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!((failed.state(), error.kind()), (BuildState::Failed, BuildErrorKind::User), "{failed:?}");
    assert_eq!(error.step, format!("push {reference}"));
    assert_eq!(setting.docker.inspect_image(&reference).await?.id, before);
    let shown = alice.get(&created.id).await?;
    assert_eq!(shown.status(), ImageStatus::Error);
    assert_eq!(shown.artifact.clone().map(|artifact| artifact.image_id), before);
    let responses = format!("{shown:?} {failed:?} {:?}", alice.history(&again.id, 0).await?);
    for secret in [WRONG, PASSWORD] {
        assert!(!responses.contains(secret));
    }
    for name in [&reference, &base] {
        setting.remove(name).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_pull_and_a_push() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    setting.publish_base("stalled").await?;
    let alice = setting.alice();
    setting.proxy.stall(true);
    let reference = format!("{}/stalled:1", setting.proxy.addr());
    let (created, build) = alice.create(pulled("Stalled", &reference)).await?;
    alice.until(&build.id, |build| build.state() == BuildState::Running && build.steps.is_some()).await?;
    let begun = Instant::now();
    alice.cancel(&created.id).await?;
    let cancelled = alice.finished(&build.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(alice.get(&created.id).await?.status(), ImageStatus::BuildCancelled);
    assert!(!setting.is_in_engine(&reference).await);

    let base = format!("trailer-test/base-{}:latest", setting.run);
    base_image::import(&setting.docker, &base).await?;
    let wanted = setting.pushed(setting.proxy.addr(), "halted", &base, "RUN echo built > /built");
    let (created, build) = alice.create(wanted).await?;
    alice.until(&build.id, |build| build.state() == BuildState::Publishing).await?;
    let begun = Instant::now();
    alice.cancel(&created.id).await?;
    let cancelled = alice.finished(&build.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(!setting.is_in_engine(&format!("{}/halted:latest", setting.proxy.addr())).await);
    setting.remove(&base).await
}
