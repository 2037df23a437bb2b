//! A service and a worker on the real Docker Engine that `tests/run` provides.
//!
//! The base image is made from the host's busybox, so that nothing is pulled. Names are unique to a run, and
//! a test removes everything that it makes in the engine.

use anyhow::Context as _;
use bollard::{
    API_DEFAULT_VERSION, Docker,
    errors::Error,
    models::{ContainerCreateBody, ImageSummary},
    query_parameters::{
        CreateContainerOptionsBuilder, ListImagesOptions, ListImagesOptionsBuilder, LogsOptionsBuilder,
        RemoveContainerOptionsBuilder, RemoveImageOptionsBuilder, StartContainerOptions,
        WaitContainerOptions,
    },
};
use futures_util::StreamExt as _;

use crate::{
    base_image,
    client::Client,
    eventually::eventually,
    stack::{Service, Worker},
};

const SOCKET: &str = "/var/run/docker.sock";

/// A service and a worker on the real engine, with a base image that has a shell.
pub(crate) struct Real {
    pub(crate) docker: Docker,
    /// Unique id of the run, from which names are made.
    pub(crate) run: String,
    pub(crate) service: Service,
    running: Worker,
}

impl Real {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts a service and a worker with additional flags.
    pub(crate) async fn start_with(flags: &[&str]) -> anyhow::Result<Self> {
        let (docker, docker_host) = connect().await?;
        let run = uuid::Uuid::new_v4().simple().to_string();
        let service = Service::start().await?;
        let worker = Worker::start_at(&service, service.addr, &worker_of(&run), &docker_host, flags)?;
        let real = Self { docker, run, service, running: worker };
        base_image::import(&real.docker, &real.base()).await?;
        Ok(real)
    }

    pub(crate) fn base(&self) -> String {
        format!("trailer-test/base-{}:latest", self.run)
    }

    /// Returns the name of the worker.
    pub(crate) fn worker(&self) -> String {
        worker_of(&self.run)
    }

    /// Returns a Dockerfile on the base image.
    ///
    /// The run's id in it keeps the engine's cache out of the test.
    pub(crate) fn dockerfile(&self, instructions: &str) -> String {
        format!("FROM {}\nENV RUN={}\n{instructions}", self.base(), self.run)
    }

    pub(crate) fn alice(&self) -> Client {
        self.service.builder("alice")
    }

    pub(crate) async fn image_id(&self, reference: &str) -> anyhow::Result<String> {
        self.docker.inspect_image(reference).await?.id.context("an id")
    }

    /// Runs an image's command and returns its output.
    pub(crate) async fn run_image(&self, reference: &str) -> anyhow::Result<String> {
        let options =
            CreateContainerOptionsBuilder::new().name(&format!("trailer-test-{}", self.run)).build();
        let body =
            ContainerCreateBody { image: Some(reference.to_owned()), ..ContainerCreateBody::default() };
        let id = self.docker.create_container(Some(options), body).await?.id;
        self.docker.start_container(&id, None::<StartContainerOptions>).await?;
        let mut waiting = self.docker.wait_container(&id, None::<WaitContainerOptions>);
        while let Some(ended) = waiting.next().await {
            ended?;
        }
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).build();
        let mut printed = String::new();
        let mut logs = self.docker.logs(&id, Some(options));
        while let Some(line) = logs.next().await {
            printed.push_str(&line?.to_string());
        }
        let options = RemoveContainerOptionsBuilder::new().force(true).build();
        self.docker.remove_container(&id, Some(options)).await?;
        Ok(printed)
    }

    /// Returns the tags of the engine's images that contain a text.
    pub(crate) async fn tags_with(&self, text: &str) -> anyhow::Result<Vec<String>> {
        let images = list_images(&self.docker, ListImagesOptionsBuilder::new().all(false).build()).await?;
        Ok(images.into_iter().flat_map(|image| image.repo_tags).filter(|tag| tag.contains(text)).collect())
    }

    /// Removes these images and the base image, each with all of its names.
    pub(crate) async fn clean(self, references: &[&str]) -> anyhow::Result<()> {
        let base = self.base();
        let Self { docker, running, .. } = self;
        // It removes names, too.
        running.stop().await?;
        for name in references.iter().copied().chain([base.as_str()]) {
            let id = docker.inspect_image(name).await?.id.context("an id")?;
            let options = RemoveImageOptionsBuilder::new().force(true).build();
            docker.remove_image(&id, Some(options), None).await?;
        }
        Ok(())
    }
}

fn worker_of(run: &str) -> String {
    format!("w-{run}")
}

/// Lists images, with retries.
///
/// On engines with containerd's image store, a list fails if one of the images is removed meanwhile.
pub(crate) async fn list_images(
    docker: &Docker,
    options: ListImagesOptions,
) -> anyhow::Result<Vec<ImageSummary>> {
    eventually("images can be listed", async || match docker.list_images(Some(options.clone())).await {
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
        images => Ok(Some(images?)),
    })
    .await
}

/// Returns the engine that the tests run on and its address.
pub(crate) async fn connect() -> anyhow::Result<(Docker, String)> {
    let docker_host = std::env::var("DOCKER_HOST").unwrap_or_else(|_| format!("unix://{SOCKET}"));
    let docker = match docker_host.strip_prefix("unix://") {
        Some(socket) => Docker::connect_with_unix(socket, 60, API_DEFAULT_VERSION)?,
        None => Docker::connect_with_http(&docker_host, 60, API_DEFAULT_VERSION)?,
    };
    docker.ping().await.context("the tests need a Docker Engine: run them by tests/run")?;
    Ok((docker, docker_host))
}
