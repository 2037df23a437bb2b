//! Registries that stumble, refuse connections, have no name or stay silent: the build is retried, and no
//! other build suffers.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use proto::images::{
    Build, BuildErrorKind, BuildState, Image, ImageConfig, PullSource, image_config::Source,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::{
    base_image,
    client::{Client, image, repository_under},
    engine_fixture,
    registry::{DockerConfig, PASSWORD, Registry},
    stack::{Service, Worker},
};

/// A registry that answers 503 for a number of requests and then forwards to a real one.
struct Stumbling {
    addr: SocketAddr,
    left: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Stumbling {
    async fn start(registry: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (addr, left) = (listener.local_addr()?, Arc::new(AtomicUsize::new(0)));
        let counting = Arc::clone(&left);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                connections.spawn(serve(connection, registry, Arc::clone(&counting)));
            }
        });
        Ok(Self { addr, left, task })
    }

    fn stumble(&self, times: usize) {
        self.left.store(times, Ordering::Relaxed);
    }
}

impl Drop for Stumbling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut connection: TcpStream, registry: SocketAddr, left: Arc<AtomicUsize>) {
    const TLS: u8 = 0x16;
    const UNAVAILABLE: &[u8] =
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let mut first = [0];
    // Engines try TLS first, and fall back to plaintext if the registry does not know it.
    let is_tls = matches!(connection.peek(&mut first).await, Ok(1)) && first == [TLS];
    let stumbles = !is_tls
        && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
    if !stumbles {
        if let Ok(mut behind) = TcpStream::connect(registry).await {
            let _ = tokio::io::copy_bidirectional(&mut connection, &mut behind).await;
        }
        return;
    }
    let mut head = [0; 4096];
    let _ = connection.read(&mut head).await;
    let _ = connection.write_all(UNAVAILABLE).await;
    let _ = connection.shutdown().await;
}

/// Returns an address on which nothing listens.
async fn closed() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr()?)
}

#[derive(Copy, Clone, Debug)]
enum Way {
    From,
    Pull,
    Push,
}

struct Setting {
    base: String,
    docker: bollard::Docker,
    run: String,
    service: Service,
    stumbling: Stumbling,
    closed: SocketAddr,
    _registry: Registry,
    _worker: Worker,
    _config: DockerConfig,
}

impl Setting {
    const NO_NAME: &str = "registry.invalid";

    async fn start(slots: &str) -> anyhow::Result<Self> {
        let (docker, docker_host) = engine_fixture::connect().await?;
        let registry = Registry::start().await?;
        let stumbling = Stumbling::start(registry.addr).await?;
        let closed = closed().await?;
        let prefixes: Vec<String> = [
            stumbling.addr.to_string(),
            closed.to_string(),
            Self::NO_NAME.to_owned(),
            "trailer.invalid".to_owned(),
        ]
        .map(|host| format!("--repository-prefix={host}/team/"))
        .into();
        let flags: Vec<&str> = prefixes.iter().map(String::as_str).chain(["--retry-backoff=50ms"]).collect();
        let service = Service::start_with(&flags).await?;
        let config = DockerConfig::with(PASSWORD, &[stumbling.addr])?;
        let run = uuid::Uuid::new_v4().simple().to_string();
        let flags = ["--docker-config", config.path()?, "--slots", slots];
        let worker = Worker::start_at(&service, service.addr, &format!("w-{run}"), &docker_host, &flags)?;
        let base = format!("trailer-test/base-{run}:latest");
        base_image::import(&docker, &base).await?;
        Ok(Self {
            base,
            docker,
            run,
            service,
            stumbling,
            closed,
            _registry: registry,
            _worker: worker,
            _config: config,
        })
    }

    fn alice(&self) -> Client {
        self.service.builder("alice")
    }

    /// Returns the reference of the image that is pushed to the registry at `host`.
    fn pushed(&self, host: &str) -> String {
        repository_under(format!("{host}/team"), "alice", &format!("{}-push:latest", self.run))
    }

    /// Returns an image whose build needs the registry at `host`.
    fn image(&self, way: Way, host: &str) -> Image {
        let reference = format!("{host}/{}-{way:?}", self.run).to_lowercase();
        match way {
            Way::From => image(&format!("From {host}"), &format!("FROM {reference}:1\nENV A=b")),
            Way::Pull => Image {
                name: format!("Pull {host}"),
                config: Some(ImageConfig {
                    source: Some(Source::Pull(PullSource { reference: format!("{reference}:1") })),
                    ..ImageConfig::default()
                }),
                ..Image::default()
            },
            Way::Push => {
                let mut pushed =
                    image(&format!("Push {host}"), &format!("FROM {}\nENV RUN={}", self.base, self.run));
                pushed.repository = self.pushed(host).trim_end_matches(":latest").to_owned();
                if let Some(config) = &mut pushed.config {
                    config.push = true;
                }
                pushed
            }
        }
    }

    async fn build(&self, image: Image) -> anyhow::Result<Build> {
        let alice = self.alice();
        let (_, build) = alice.create(image).await?;
        alice.finished(&build.id).await
    }

    async fn remove(&self, name: &str) {
        let options = bollard::query_parameters::RemoveImageOptionsBuilder::new().force(true).build();
        // The image may not be there.
        let _ = self.docker.remove_image(name, Some(options), None).await;
    }
}

fn assert_infrastructure(build: &Build, what: &str) {
    let error = build.error.clone().unwrap_or_default();
    assert_eq!(
        (build.state(), error.kind(), build.attempt, build.failures),
        (BuildState::Failed, BuildErrorKind::Infrastructure, 3, 3),
        "{what}: {error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_away_is_tried_again_and_is_nobodys_fault_in_the_end() -> anyhow::Result<()> {
    let setting = Setting::start("4").await?;
    let closed = setting.closed.to_string();
    setting.stumbling.stumble(usize::MAX);
    let stumbling = setting.stumbling.addr.to_string();
    for way in [Way::From, Way::Pull, Way::Push] {
        for host in [closed.as_str(), Setting::NO_NAME, stumbling.as_str()] {
            // Engines with a graph driver retry the push themselves for more than a minute.
            if matches!(way, Way::Push) && host == stumbling {
                continue;
            }
            let build = setting.build(setting.image(way, host)).await?;
            assert_infrastructure(&build, &format!("{way:?} {host}"));
        }
    }
    // None of these failures casts doubt on the engine.
    let plain =
        setting.build(image("Plain", &format!("FROM {}\nENV A={}", setting.base, setting.run))).await?;
    assert_eq!((plain.state(), plain.attempt), (BuildState::Succeeded, 1), "{plain:?}");
    setting.remove(&setting.base).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_stumbles_once_costs_an_attempt_at_most() -> anyhow::Result<()> {
    let setting = Setting::start("2").await?;
    let host = setting.stumbling.addr.to_string();
    // The other builds need the image that this one pushes.
    setting.stumbling.stumble(1);
    let pushed = setting.build(setting.image(Way::Push, &host)).await?;
    assert_eq!(pushed.state(), BuildState::Succeeded, "{pushed:?}");
    assert!(pushed.attempt <= 2, "{pushed:?}");
    let artifact = setting.alice().get(&pushed.image_id).await?.artifact.context("an artifact")?;
    for way in [Way::From, Way::Pull] {
        let mut wanted = setting.image(way, &host);
        let reference = setting.pushed(&host);
        let config = wanted.config.as_mut().context("a configuration")?;
        match &mut config.source {
            Some(Source::Pull(pull)) => pull.reference.clone_from(&reference),
            Some(Source::Dockerfile(dockerfile)) => {
                dockerfile.text = format!("FROM {reference}\nENV A={way:?}")
            }
            source => anyhow::bail!("{source:?}"),
        }
        // With all of its names.
        let pushed = setting.docker.inspect_image(&artifact.image_id).await;
        if let Some(id) = pushed.ok().and_then(|image| image.id) {
            setting.remove(&id).await;
        }
        setting.stumbling.stumble(1);
        let build = setting.build(wanted).await?;
        assert_eq!(build.state(), BuildState::Succeeded, "{way:?}: {build:?}");
        assert!(build.attempt <= 2, "{build:?}");
        assert_eq!(setting.stumbling.left.load(Ordering::Relaxed), 0, "{way:?}: it has stumbled");
    }
    setting.remove(&setting.pushed(&host)).await;
    setting.remove(&setting.base).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_image_at_an_address_that_nobody_answers_delays_nobody_else() -> anyhow::Result<()> {
    let setting = Setting::start("2").await?;
    let alice = setting.alice();
    // The registry accepts connections and says nothing.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let from = format!("FROM {}/{}:1\nENV A=b", silent.local_addr()?, setting.run);
    let (stuck, stuck_build) = alice.create(image("Stuck", &from)).await?;
    let _connection = tokio::time::timeout(crate::stack::LIMIT, silent.accept()).await??;
    for i in 0..3 {
        let begun = Instant::now();
        let text = format!("FROM {}\nENV A={}{i}\nRUN echo fine", setting.base, setting.run);
        let build = setting.build(image(&format!("Beside {i}"), &text)).await?;
        assert_eq!((build.state(), build.attempt), (BuildState::Succeeded, 1), "{build:?}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    assert_eq!(alice.get_build(&stuck_build.id).await?.state(), BuildState::Running);
    let begun = Instant::now();
    alice.cancel(&stuck.id).await?;
    let cancelled = alice.finished(&stuck_build.id).await?;
    assert_eq!((cancelled.state(), cancelled.stop_confirmed), (BuildState::Cancelled, true));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    setting.remove(&setting.base).await;
    Ok(())
}
