//! Engines that are set up in a way of their own: bounded in memory, with experiments; and one whose worker dies while it commits.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use bollard::{
    Docker,
    models::{ContainerCreateBody, ContainerState},
    query_parameters::{
        CreateContainerOptions, InspectContainerOptions, LogsOptionsBuilder, StartContainerOptions,
        WaitContainerOptions,
    },
};
use futures_util::StreamExt as _;
use proto::images::{
    BuildErrorKind, BuildState, Image, ImageConfig, ImageStatus, ResolveImageRequest,
    SnapshotWorkspaceRequest,
};

use crate::{
    client::image,
    engine::{BASE, Engine},
    stack::{LIMIT, Service, Worker, directory},
};

/// A control group that its processes get no more memory from than 64 MiB. Gone when it is dropped.
struct MemoryBound {
    path: PathBuf,
}

impl MemoryBound {
    const BYTES: &str = "67108864";

    fn make(name: &str) -> anyhow::Result<Self> {
        let of_version_1 = Path::new("/sys/fs/cgroup/memory");
        let (parent, limit) = if of_version_1.is_dir() {
            (of_version_1, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let path = parent.join(name);
        fs::create_dir(&path).context("the tests need root: run them by tests/run")?;
        let bound = Self { path };
        fs::write(bound.path.join(limit), Self::BYTES)?;
        Ok(bound)
    }
}

impl Drop for MemoryBound {
    fn drop(&mut self) {
        // What the engine has made below, and then the group; whatever is left is empty.
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&self.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_over_its_engines_memory_bound_fails_and_others_go_on() -> anyhow::Result<()> {
    let directory = directory()?;
    let group = format!("trailer-test-{}", uuid::Uuid::new_v4().simple());
    let _bound = MemoryBound::make(&group)?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let mut engine =
        Engine::start_with(directory.path(), "e1", &[&format!("--cgroup-parent=/{group}")]).await?;
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let greedy =
        format!("FROM {BASE}\nRUN echo greedy; /bin/busybox dd if=/dev/zero of=/dev/null bs=300M count=1");
    let (shown, build) = alice.create(image("Greedy", &greedy)).await?;
    let failed = alice.finished(&build.id).await?;
    assert_eq!(failed.state(), BuildState::Failed, "{failed:?}");
    let error = failed.error.context("an error")?;
    assert_eq!(error.kind(), BuildErrorKind::User, "{error:?}");
    assert!(error.step.contains("greedy") && error.message.contains("137"), "{error:?}");
    assert_eq!(alice.get(&shown.id).await?.status(), ImageStatus::Error);
    worker.program.require_life()?;
    engine.answers().await?;
    let modest = format!("FROM {BASE}\nRUN /bin/busybox dd if=/dev/zero of=/dev/null bs=3M count=1");
    let (_, build) = alice.create(image("Modest", &modest)).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    assert_eq!(engine.step_processes(), []);
    Ok(())
}

/// What a command prints in a container of an image.
async fn printed(docker: &Docker, reference: &str, command: &str) -> anyhow::Result<String> {
    let body = ContainerCreateBody {
        image: Some(reference.to_owned()),
        cmd: Some(["/bin/sh", "-c", command].map(str::to_owned).into()),
        network_disabled: Some(true),
        ..ContainerCreateBody::default()
    };
    let id = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
    docker.start_container(&id, None::<StartContainerOptions>).await?;
    let mut waiting = docker.wait_container(&id, None::<WaitContainerOptions>);
    while let Some(ended) = waiting.next().await {
        ended?;
    }
    let mut logs = docker.logs(&id, Some(LogsOptionsBuilder::new().stdout(true).stderr(true).build()));
    let mut text = String::new();
    while let Some(part) = logs.next().await {
        text.push_str(&part?.to_string());
    }
    Ok(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_squashed_where_the_engine_can() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let plain = Engine::start(directory.path(), "e1").await?;
    let _plain = Worker::start(directory.path(), &service, service.addr, "w1", &plain, 2)?;
    let wanted = |squash| {
        let text = format!("FROM {BASE}\nRUN echo one > /one; echo two > /two\nRUN /bin/busybox rm /one");
        let image = image("Squashed", &text);
        let config = image.config.clone().map(|config| ImageConfig { squash, ..config });
        Image { config, ..image }
    };
    let (_, build) = alice.create(wanted(true)).await?;
    alice.until(&build.id, |build| build.state() == BuildState::Queued).await?;
    let experimental = Engine::start_with(directory.path(), "e2", &["--experimental"]).await?;
    let _able = Worker::start(directory.path(), &service, service.addr, "w2", &experimental, 2)?;
    let squashed = alice.finished(&build.id).await?;
    assert_eq!((squashed.state(), squashed.worker.as_str()), (BuildState::Succeeded, "w2"), "{squashed:?}");
    let shown = alice.get(&squashed.image_id).await?;
    let artifact = shown.artifact.context("an artifact")?;
    let reference = format!("{}:{}", shown.repository, shown.tag);
    assert_eq!(experimental.image_id(&reference).await.as_ref(), Some(&artifact.image_id));
    let layers = |engine: &Engine, id: String| {
        let docker = engine.docker().clone();
        async move {
            let inspected = docker.inspect_image(&id).await?;
            anyhow::Ok(inspected.root_fs.and_then(|fs| fs.layers).unwrap_or_default().len())
        }
    };
    let of_base = layers(&experimental, BASE.to_owned()).await?;
    let of_squashed = layers(&experimental, artifact.image_id).await?;
    assert!(of_squashed <= of_base + 1, "{of_squashed} layers upon {of_base}");
    let found =
        printed(experimental.docker(), &reference, "/bin/busybox ls /one; /bin/busybox cat /two").await?;
    assert!(found.contains("/one: No such file") && found.lines().any(|line| line == "two"), "{found}");
    Ok(())
}

async fn state(docker: &Docker, container: &str) -> anyhow::Result<ContainerState> {
    docker.inspect_container(container, None::<InspectContainerOptions>).await?.state.context("a state")
}

/// Waits until a container is paused, or is not any more.
async fn until_paused(docker: &Docker, container: &str, paused: bool) -> anyhow::Result<()> {
    let waiting = async {
        while state(docker, container).await?.paused != Some(paused) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(LIMIT, waiting).await.with_context(|| format!("paused is never {paused}"))?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_while_it_commits_leaves_no_container_paused() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let docker = engine.docker();
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (source, build) = alice.create(image("Source", &format!("FROM {BASE}\nENV A=b"))).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    // So much to commit that it takes a while.
    let command = "/bin/busybox dd if=/dev/urandom of=/large bs=1M count=200 2>/dev/null; echo done > /done; \
                   exec /bin/busybox sleep 600";
    let body = ContainerCreateBody {
        image: Some(format!("{}:{}", source.repository, source.tag)),
        cmd: Some(["/bin/sh", "-c", command].map(str::to_owned).into()),
        network_disabled: Some(true),
        ..ContainerCreateBody::default()
    };
    let container = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
    docker.start_container(&container, None::<StartContainerOptions>).await?;
    let sleeps = async {
        // The command of its process is the last one's when the others have ended.
        loop {
            let pid = state(docker, &container).await?.pid.context("a process")?;
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command.contains("sleep") && !command.contains("dd") {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, sleeps).await.context("the workspace is not ready")??;

    let request = SnapshotWorkspaceRequest {
        source_image_id: source.id.clone(),
        worker: "w1".to_owned(),
        container: container.clone(),
        creator: "alice".to_owned(),
        image: Some(Image { name: "Snapshot".to_owned(), ..Image::default() }),
        ..SnapshotWorkspaceRequest::default()
    };
    let taken = service.platform().images.clone().snapshot_workspace(request).await?.into_inner();
    let build = taken.build.context("a build")?;
    until_paused(docker, &container, true).await?;
    worker.kill()?;
    until_paused(docker, &container, false).await?;
    assert_eq!(state(docker, &container).await?.running, Some(true));

    worker.start_again()?;
    let again = alice.finished(&build.id).await?;
    assert_eq!((again.state(), again.attempt), (BuildState::Succeeded, 2), "{again:?}");
    assert_eq!(state(docker, &container).await?.paused, Some(false));
    let id = taken.image.context("an image")?.id;
    let resolved = alice.images.clone().resolve_image(ResolveImageRequest { id }).await?.into_inner();
    let found = printed(docker, &resolved.reference, "/bin/busybox cat /done").await?;
    assert_eq!(found, "done\n");
    assert_eq!(engine.tags_with("trailer-attempt/").await?, [""; 0]);
    Ok(())
}
