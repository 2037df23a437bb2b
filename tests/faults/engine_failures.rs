//! Engines with limited memory, squashed layers, a killed containerd, or a worker killed mid-commit.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use bollard::{
    Docker,
    models::{ContainerCreateBody, ContainerState, ImageInspect},
    query_parameters::{
        CreateContainerOptions, InspectContainerOptions, ListImagesOptionsBuilder, LogsOptionsBuilder,
        StartContainerOptions, WaitContainerOptions,
    },
};
use futures_util::StreamExt as _;
use proto::images::{
    BuildErrorKind, BuildState, Image, ImageConfig, ImageStatus, ResolveImageRequest,
    SnapshotWorkspaceRequest,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    client::image,
    docker_engine::{BASE, Engine, StepProcess},
    dockerd::{has_memory_controller, starts_containers},
    eventually::eventually_true,
    stack::{Service, Worker, counting, directory},
};

/// A control group that limits its processes to 64 MiB of memory. Removed on drop.
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
        remove_groups(&self.path);
    }
}

/// Removes a control group and those below it, all of which are empty.
fn remove_groups(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_over_the_memory_bound_of_builds_fails_and_others_go_on() -> anyhow::Result<()> {
    if !has_memory_controller() {
        return Ok(());
    }
    let directory = directory()?;
    let group = format!("trailer-test-{}", uuid::Uuid::new_v4().simple());
    let _bound = MemoryBound::make(&group)?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let mut engine = Engine::start(directory.path(), "e1").await?;
    let bounded = format!("--cgroup-parent=/{group}");
    let server = service.addr;
    let mut worker = Worker::start_with(directory.path(), &service, server, "w1", &engine, 2, &[&bounded])?;
    let greedy =
        format!("FROM {BASE}\nRUN echo greedy; /bin/busybox dd if=/dev/zero of=/dev/null bs=300M count=1");
    let (shown, build) = alice.create(image("Greedy", &greedy)).await?;
    let failed = alice.finished(&build.id).await?;
    assert_eq!(failed.state(), BuildState::Failed, "{failed:?}");
    let error = failed.error.context("an error")?;
    assert_eq!(error.kind(), BuildErrorKind::User, "{error:?}");
    // The wording depends on whether the engine looks up the reason of an exit.
    let names_the_cause = ["137", "cannot allocate memory"].iter().any(|words| error.message.contains(words));
    assert!(error.step.contains("greedy") && names_the_cause, "{error:?}");
    assert_eq!(failed.attempt, 1, "{error:?}");
    assert_eq!(alice.get(&shown.id).await?.status(), ImageStatus::Error);
    worker.program.require_life()?;
    engine.answers().await?;
    let modest = format!("FROM {BASE}\nRUN /bin/busybox dd if=/dev/zero of=/dev/null bs=3M count=1");
    let (_, build) = alice.create(image("Modest", &modest)).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    assert_eq!(engine.step_processes(), []);
    Ok(())
}

/// Returns the output of a command in a container of an image.
async fn printed(docker: &Docker, reference: &str, command: &str) -> anyhow::Result<String> {
    let body = ContainerCreateBody {
        image: Some(reference.to_owned()),
        entrypoint: Some(["/bin/sh", "-c"].map(str::to_owned).into()),
        cmd: Some(vec![command.to_owned()]),
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
async fn layers_are_squashed_and_the_configuration_stays() -> anyhow::Result<()> {
    const INSTRUCTIONS: &str = "RUN echo one > /one; echo two > /two; /bin/busybox chown 7:8 /two\n\
        RUN /bin/busybox rm /one\n\
        ENV SAID=\"it \\\"costs\\\" 5 \\$\" EMPTY=\"\"\nLABEL of.people=\"a b\"\nWORKDIR /srv\nUSER 7\nEXPOSE 80 53/udp\nVOLUME /data\n\
        STOPSIGNAL SIGINT\nHEALTHCHECK --interval=7s CMD echo $SAID\nENTRYPOINT [\"/bin/sh\", \"-c\"]\nCMD [\"echo $SAID\"]\n\
        ONBUILD RUN echo built";
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let _worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let wanted = |squash: bool| {
        let image = image(&format!("Squashed {squash}"), &format!("FROM {BASE}\n{INSTRUCTIONS}"));
        let config = image.config.clone().map(|config| ImageConfig { squash, ..config });
        Image { config, ..image }
    };
    let mut inspected = Vec::new();
    for squash in [false, true] {
        let (_, build) = alice.create(wanted(squash)).await?;
        let built = alice.finished(&build.id).await?;
        assert_eq!(built.state(), BuildState::Succeeded, "{built:?}");
        let shown = alice.get(&built.image_id).await?;
        let artifact = shown.artifact.context("an artifact")?;
        let reference = shown.reference.clone();
        assert_eq!(engine.image_id(&reference).await.as_ref(), Some(&artifact.image_id));
        assert!(artifact.config_digest.starts_with("sha256:"), "{artifact:?}");
        inspected.push((reference.clone(), engine.docker().inspect_image(&reference).await?));
    }
    let [(_, plain), (reference, squashed)] = &inspected[..] else { anyhow::bail!("two images") };
    let layers =
        |image: &ImageInspect| image.root_fs.as_ref().and_then(|fs| fs.layers.as_ref()).map_or(0, Vec::len);
    // One layer for the working directory, and one for everything else.
    assert!(layers(squashed) <= 2 && layers(plain) > 2, "{} layers of {}", layers(squashed), layers(plain));
    let config = |image: &ImageInspect| {
        let mut config = image.config.clone().unwrap_or_default();
        // These labels name the record.
        config.labels.get_or_insert_default().retain(|label, _| !label.starts_with("trailer."));
        config.exposed_ports.get_or_insert_default().sort();
        config
    };
    assert_eq!(config(squashed), config(plain));
    let left = engine.docker().list_images(Some(ListImagesOptionsBuilder::new().all(true).build())).await?;
    let unnamed: Vec<&str> =
        left.iter().filter(|image| image.repo_tags.is_empty()).map(|image| image.id.as_str()).collect();
    assert_eq!(unnamed, [""; 0], "what was squashed is gone");
    if starts_containers() {
        let command = "/bin/busybox ls /one; /bin/busybox cat /two; /bin/busybox stat -c %u:%g /two";
        let found = printed(engine.docker(), reference, command).await?;
        assert!(found.contains("/one: No such file"), "{found}");
        assert!(["two", "7:8"].iter().all(|expected| found.lines().any(|line| line == *expected)), "{found}");
    }
    Ok(())
}

/// Returns the group of a step's process in a hierarchy that this host shows below `/sys/fs/cgroup`.
fn group_of(process: &StepProcess) -> Option<String> {
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).ok()?;
    groups.lines().find_map(|line| line.strip_prefix("0::")).map(ToOwned::to_owned)
}

/// Checks that a step that the kernel kills for its memory fails the build without a retry.
///
/// `BuildKit` reads the number of such kills from the step's group. If this host has no memory controller of
/// version 2, the test puts the file there.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_is_killed_for_its_memory_has_failed_once() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let _worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let text = format!("FROM {BASE}\nENV UNIQUE={}\nRUN /bin/busybox sleep 300", uuid::Uuid::new_v4());
    let (_, build) = alice.create(image("Greedy", &text)).await?;
    engine.runs("sleep 300").await?;
    let processes = engine.step_processes();
    let process =
        processes.iter().find(|process| process.command.contains("sleep 300")).context("the step")?;
    let group =
        Path::new("/sys/fs/cgroup").join(group_of(process).context("a group")?.trim_start_matches('/'));
    let is_put_there = fs::create_dir_all(&group).is_ok()
        && fs::write(group.join("memory.events"), "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n").is_ok();
    for process in &processes {
        let _ = kill_process(Pid::from_raw(process.pid).context("a process")?, Signal::KILL);
    }
    let failed = alice.finished(&build.id).await?;
    if is_put_there {
        // Removes that file, and then its parent groups, which under version 1 are the engine's own.
        let _ = fs::remove_file(group.join("memory.events"));
        let parents = group.ancestors().take_while(|path| *path != Path::new("/sys/fs/cgroup"));
        parents.for_each(|path| drop(fs::remove_dir(path)));
    }
    let error = failed.error.clone().context("an error")?;
    assert_eq!((failed.state(), failed.attempt, failed.failures), (BuildState::Failed, 1, 0), "{error:?}");
    assert_eq!(error.kind(), BuildErrorKind::User, "{error:?}");
    assert!(error.step.contains("sleep 300"), "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containerd_that_is_killed_fails_no_build_as_its_users_fault() -> anyhow::Result<()> {
    let directory = directory()?;
    let service = Service::start(directory.path(), &["--retry-backoff=1s"]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let _worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (_, running) = alice.create(image("Running", &counting(20, "0.1"))).await?;
    alice.until(&running.id, |build| build.log_bytes > 0).await?;
    engine.kill_containerd()?;
    let mut builds = vec![running.id];
    for i in 0..5 {
        let (_, build) = alice.create(image(&format!("Next {i}"), &counting(1, "0"))).await?;
        builds.push(build.id);
    }
    for build in builds {
        let finished = alice.until(&build, |build| build.finish_time.is_some()).await?;
        assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    }
    assert_eq!(engine.step_processes(), []);
    Ok(())
}

async fn state(docker: &Docker, container: &str) -> anyhow::Result<ContainerState> {
    docker.inspect_container(container, None::<InspectContainerOptions>).await?.state.context("a state")
}

/// Waits until a container is paused, or no longer paused.
async fn until_paused(docker: &Docker, container: &str, paused: bool) -> anyhow::Result<()> {
    let what = format!("paused becomes {paused}");
    eventually_true(&what, async || Ok(state(docker, container).await?.paused == Some(paused))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_while_it_commits_leaves_no_container_paused() -> anyhow::Result<()> {
    if !starts_containers() {
        return Ok(());
    }
    let directory = directory()?;
    let service = Service::start(directory.path(), &[]).await?;
    let alice = service.builder("alice");
    let engine = Engine::start(directory.path(), "e1").await?;
    let docker = engine.docker();
    let mut worker = Worker::start(directory.path(), &service, service.addr, "w1", &engine, 2)?;
    let (source, build) = alice.create(image("Source", &format!("FROM {BASE}\nENV A=b"))).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    // Enough data that the commit takes a while.
    let command = "/bin/busybox dd if=/dev/urandom of=/large bs=1M count=200 2>/dev/null; echo done > /done; \
                   exec /bin/busybox sleep 600";
    let body = ContainerCreateBody {
        image: Some(source.reference.clone()),
        cmd: Some(["/bin/sh", "-c", command].map(str::to_owned).into()),
        network_disabled: Some(true),
        ..ContainerCreateBody::default()
    };
    let container = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
    docker.start_container(&container, None::<StartContainerOptions>).await?;
    eventually_true("the workspace is ready", async || {
        // The process runs `sleep` once the commands before it have ended.
        let pid = state(docker, &container).await?.pid.context("a process")?;
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        Ok(command.contains("sleep") && !command.contains("dd"))
    })
    .await?;

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
    assert_eq!(engine.tags_with("trailer.invalid/attempt/").await?, [""; 0]);
    Ok(())
}
