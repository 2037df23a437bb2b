//! Both services in process, on ports of their own, as a deployment starts them: configured by the command line, called over
//! the network.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use clap::Parser as _;
use image_service::{Cli, Command, Role, TokenKeys};
use proto::{
    dispatch::dispatch_service_client::DispatchServiceClient,
    images::{
        self as api, build_service_client::BuildServiceClient, image_service_client::ImageServiceClient,
        worker_service_client::WorkerServiceClient,
    },
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

/// How long anything may take that should take milliseconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A running image-service with a data directory of its own.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) addr: SocketAddr,
    keys: TokenKeys,
    running: Running,
    /// Kept until the last service of the directory is gone.
    directory: std::sync::Arc<TempDir>,
}

/// A running build-worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) addr: SocketAddr,
    running: Running,
    _directory: TempDir,
}

/// A task that ends when it is told to, or dropped.
#[derive(Debug)]
struct Running {
    task: JoinHandle<anyhow::Result<()>>,
    shutdown: CancellationToken,
    _guard: DropGuard,
}

/// A caller with a token.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) images: ImageServiceClient<Caller>,
    pub(crate) builds: BuildServiceClient<Caller>,
    pub(crate) workers: WorkerServiceClient<Caller>,
    pub(crate) dispatch: DispatchServiceClient<Caller>,
}

pub(crate) type Caller = InterceptedService<Channel, Bearer>;

/// Adds a token to every call; none when empty.
#[derive(Clone, Debug)]
pub(crate) struct Bearer(Option<AsciiMetadataValue>);

impl Service {
    /// Starts a service with further flags of `image-service serve`.
    pub(crate) async fn start_with(flags: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(std::sync::Arc::new(tempfile::tempdir()?), "127.0.0.1:0", flags).await
    }

    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    async fn start_in(
        directory: std::sync::Arc<TempDir>,
        listen: &str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let data = directory.path().join("data");
        let data_flag = data.to_str().context("a path in UTF-8")?;
        let fixed = ["image-service", "serve", "--listen", listen, "--data-dir", data_flag];
        let Command::Serve(config) = Cli::try_parse_from(fixed.iter().chain(flags))?.command else {
            anyhow::bail!("the flags are those of another command");
        };
        let bound = image_service::bind(config).await?;
        Ok(Self {
            addr: bound.local_addr()?,
            keys: TokenKeys::open(&data)?,
            running: Running::start(|shutdown| async move { Ok(bound.run(shutdown).await?) }),
            directory,
        })
    }

    /// Shuts it down in order, and starts another on the same data and port.
    pub(crate) async fn restart(self) -> anyhow::Result<Self> {
        let (directory, listen) = (std::sync::Arc::clone(&self.directory), self.addr.to_string());
        self.stop().await?;
        Self::start_in(directory, &listen, &[]).await
    }

    /// Shuts it down in order.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.running.stop().await
    }

    /// Begins the shutdown and does not wait for its end.
    pub(crate) fn begin_shutdown(&self) {
        self.running.shutdown.cancel();
    }

    /// A token of this service.
    pub(crate) fn token(&self, subject: &str, roles: &[Role]) -> String {
        self.token_for(subject, roles, Duration::from_secs(3600))
    }

    pub(crate) fn token_for(&self, subject: &str, roles: &[Role], ttl: Duration) -> String {
        self.keys.mint(subject, roles, ttl).expect("the subject is printable")
    }

    /// A caller that may create images.
    pub(crate) fn builder(&self, subject: &str) -> Client {
        self.client(&self.token(subject, &[Role::Builder]))
    }

    pub(crate) fn client(&self, token: &str) -> Client {
        client(self.addr, token)
    }
}

/// A caller of the service at an address.
pub(crate) fn client(addr: SocketAddr, token: &str) -> Client {
    let channel = channel(addr);
    let value = (!token.is_empty()).then(|| format!("Bearer {token}").parse().expect("tokens are ASCII"));
    let bearer = Bearer(value);
    Client {
        images: ImageServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        builds: BuildServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        workers: WorkerServiceClient::with_interceptor(channel.clone(), bearer.clone()),
        dispatch: DispatchServiceClient::with_interceptor(channel, bearer),
    }
}

/// Connects at the first call.
pub(crate) fn channel(addr: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{addr}")).expect("an address makes a URL").connect_lazy()
}

impl Worker {
    /// Starts a worker of the service that is reached at `server`, on the engine at `docker_host`.
    pub(crate) async fn start_at(
        service: &Service,
        server: SocketAddr,
        name: &str,
        docker_host: &str,
        flags: &[&str],
    ) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let token_file = directory.path().join("token");
        std::fs::write(&token_file, service.token(name, &[Role::Worker]))?;
        let token_flag = token_file.to_str().context("a path in UTF-8")?;
        let server = format!("http://{server}");
        let fixed = [
            "build-worker",
            "--server",
            &server,
            "--token-file",
            token_flag,
            "--name",
            name,
            "--listen",
            "127.0.0.1:0",
            "--docker-host",
            docker_host,
        ];
        let config = build_worker::Config::try_parse_from(fixed.iter().chain(flags))?;
        let bound = build_worker::bind(config).await?;
        Ok(Self {
            addr: bound.local_addr()?,
            running: Running::start(|shutdown| async move { Ok(bound.run(shutdown).await?) }),
            _directory: directory,
        })
    }

    pub(crate) async fn start(service: &Service, name: &str, docker_host: &str) -> anyhow::Result<Self> {
        Self::start_at(service, service.addr, name, docker_host, &[]).await
    }

    /// Shuts it down in order.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.running.stop().await
    }
}

impl Running {
    fn start<F>(run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let shutdown = CancellationToken::new();
        Self { task: tokio::spawn(run(shutdown.clone())), _guard: shutdown.clone().drop_guard(), shutdown }
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        tokio::time::timeout(LIMIT, self.task).await.context("it did not shut down in time")??
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// An image with a hand-written Dockerfile.
pub(crate) fn image(name: &str, dockerfile: &str) -> api::Image {
    let source = api::DockerfileSource { text: dockerfile.to_owned(), files: Vec::new() };
    api::Image {
        name: name.to_owned(),
        config: Some(api::ImageConfig { source: Some(api::image_config::Source::Dockerfile(source)) }),
        ..api::Image::default()
    }
}

impl Client {
    /// Creates an image; answers it with its first build.
    pub(crate) async fn create(&self, image: api::Image) -> Result<(api::Image, api::Build), Status> {
        let request = api::CreateImageRequest { image: Some(image) };
        let response = self.images.clone().create_image(request).await?.into_inner();
        Ok((response.image.expect("an image"), response.build.expect("a build")))
    }

    pub(crate) async fn get(&self, id: &str) -> Result<api::Image, Status> {
        let request = api::GetImageRequest { id: id.to_owned() };
        Ok(self.images.clone().get_image(request).await?.into_inner().image.expect("an image"))
    }

    pub(crate) async fn list(&self) -> Result<Vec<api::Image>, Status> {
        Ok(self.images.clone().list_images(api::ListImagesRequest::default()).await?.into_inner().images)
    }

    pub(crate) async fn build(&self, id: &str) -> Result<api::Build, Status> {
        let request = api::BuildImageRequest { id: id.to_owned() };
        Ok(self.images.clone().build_image(request).await?.into_inner().build.expect("a build"))
    }

    pub(crate) async fn cancel(&self, id: &str) -> Result<api::Build, Status> {
        let request = api::CancelBuildRequest { id: id.to_owned(), build_id: String::new() };
        Ok(self.images.clone().cancel_build(request).await?.into_inner().build.expect("a build"))
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = api::DeleteImageRequest { id: id.to_owned() };
        self.images.clone().delete_image(request).await.map(|_| ())
    }

    pub(crate) async fn get_build(&self, id: &str) -> Result<api::Build, Status> {
        let request = api::GetBuildRequest { id: id.to_owned() };
        Ok(self.builds.clone().get_build(request).await?.into_inner().build.expect("a build"))
    }

    /// Everything that happens in a build after an event, until its end.
    pub(crate) async fn history(&self, build: &str, after: i64) -> Result<Vec<api::BuildEvent>, Status> {
        let request = api::WatchBuildRequest { id: build.to_owned(), after_sequence: after };
        let mut messages = self.builds.clone().watch_build(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(message) = messages.message().await? {
            events.extend(message.events);
        }
        Ok(events)
    }

    /// Waits for the end of a build.
    pub(crate) async fn finished(&self, build: &str) -> anyhow::Result<api::Build> {
        tokio::time::timeout(LIMIT * 3, self.history(build, 0)).await.context("the build did not end")??;
        Ok(self.get_build(build).await?)
    }

    /// Waits until a build fulfils a condition, which it is asked for whenever something happened in it.
    pub(crate) async fn until(
        &self,
        build: &str,
        condition: impl Fn(&api::Build) -> bool,
    ) -> anyhow::Result<api::Build> {
        let waiting = async {
            let request = api::WatchBuildRequest { id: build.to_owned(), after_sequence: 0 };
            let mut messages = self.builds.clone().watch_build(request).await?.into_inner();
            loop {
                let found = self.get_build(build).await?;
                if condition(&found) {
                    return Ok(found);
                }
                anyhow::ensure!(messages.message().await?.is_some(), "the build ended as {found:?}");
            }
        };
        tokio::time::timeout(LIMIT, waiting).await.context("the condition was not met")?
    }
}

/// The lines that were printed, in order.
pub(crate) fn lines(events: &[api::BuildEvent]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| match &event.event {
            Some(api::build_event::Event::LogLine(line)) => Some(line.text.as_str()),
            Some(
                api::build_event::Event::StateChange(_)
                | api::build_event::Event::StepChange(_)
                | api::build_event::Event::LogGap(_),
            )
            | None => None,
        })
        .collect()
}

/// The states that were come into, in order.
pub(crate) fn states(events: &[api::BuildEvent]) -> Vec<api::BuildState> {
    events
        .iter()
        .filter_map(|event| match &event.event {
            Some(api::build_event::Event::StateChange(change)) => Some(change.state()),
            Some(
                api::build_event::Event::LogLine(_)
                | api::build_event::Event::StepChange(_)
                | api::build_event::Event::LogGap(_),
            )
            | None => None,
        })
        .collect()
}

/// Fails unless the events are numbered from `first` without a gap.
pub(crate) fn assert_gapless(events: &[api::BuildEvent], first: i64) {
    let numbers: Vec<i64> = events.iter().map(|event| event.sequence).collect();
    let expected: Vec<i64> = (first..).take(events.len()).collect();
    assert_eq!(numbers, expected);
}

/// The reason of an error, which every error has.
pub(crate) fn reason(status: &Status) -> String {
    use tonic_types::StatusExt as _;
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

/// The fields that an error names.
pub(crate) fn fields(status: &Status) -> Vec<String> {
    use tonic_types::StatusExt as _;
    let violations = status.get_details_bad_request().map(|bad_request| bad_request.field_violations);
    violations.into_iter().flatten().map(|violation| violation.field).collect()
}
