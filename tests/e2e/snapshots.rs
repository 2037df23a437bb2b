//! Snapshots of running workspaces, on a real engine.

use anyhow::Context as _;
use bollard::{
    Docker,
    exec::{CreateExecOptions, StartExecOptions, StartExecResults},
    models::ContainerCreateBody,
    query_parameters::{
        CreateContainerOptions, InspectContainerOptions, RemoveContainerOptionsBuilder,
        RemoveImageOptionsBuilder, StartContainerOptions,
    },
};
use futures_util::StreamExt as _;
use image_service::Role;
use proto::images::{
    Build, BuildErrorKind, BuildState, CloneImageRequest, Image, ImageStatus, ResolveImageRequest,
    SnapshotWorkspaceRequest,
};

use crate::{
    base_image,
    client::{Client, image},
    real_engine,
    stack::{Service, Worker},
};

async fn start(docker: &Docker, reference: &str) -> anyhow::Result<String> {
    let body = ContainerCreateBody {
        image: Some(reference.to_owned()),
        cmd: Some(["/bin/busybox", "sleep", "600"].map(str::to_owned).into()),
        ..ContainerCreateBody::default()
    };
    let container = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
    docker.start_container(&container, None::<StartContainerOptions>).await?;
    Ok(container)
}

/// What a command prints in a container.
async fn run(docker: &Docker, container: &str, command: &str) -> anyhow::Result<String> {
    let options = CreateExecOptions {
        cmd: Some(vec!["/bin/sh", "-c", command]),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        ..CreateExecOptions::default()
    };
    let exec = docker.create_exec(container, options).await?.id;
    let StartExecResults::Attached { mut output, .. } =
        docker.start_exec(&exec, None::<StartExecOptions>).await?
    else {
        anyhow::bail!("it is detached");
    };
    let mut printed = String::new();
    while let Some(part) = output.next().await {
        printed.push_str(&part?.to_string());
    }
    Ok(printed)
}

async fn remove(docker: &Docker, containers: &[&str], images: &[&str]) -> anyhow::Result<()> {
    for container in containers {
        let options = RemoveContainerOptionsBuilder::new().force(true).build();
        docker.remove_container(container, Some(options)).await?;
    }
    for image in images {
        let options = RemoveImageOptionsBuilder::new().force(true).build();
        docker.remove_image(image, Some(options), None).await?;
    }
    Ok(())
}

async fn snapshot(
    platform: &Client,
    source: &str,
    worker: &str,
    container: &str,
    name: &str,
) -> anyhow::Result<(Image, Build)> {
    let request = SnapshotWorkspaceRequest {
        source_image_id: source.to_owned(),
        worker: worker.to_owned(),
        container: container.to_owned(),
        creator: "alice".to_owned(),
        image: Some(Image { name: name.to_owned(), ..Image::default() }),
        ..SnapshotWorkspaceRequest::default()
    };
    let response = platform.images.clone().snapshot_workspace(request).await?.into_inner();
    Ok((response.image.context("an image")?, response.build.context("a build")?))
}

fn reference(image: &Image) -> String {
    format!("{}:{}", image.repository, image.tag)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_holds_what_the_workspace_has_changed() -> anyhow::Result<()> {
    let (docker, docker_host) = real_engine::connect().await?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let base = format!("trailer-test/base-{id}:latest");
    base_image::import(&docker, &base).await?;
    let service = Service::start().await?;
    let name = format!("w-{id}");
    let _worker = Worker::start(&service, &name, &docker_host).await?;
    let alice = service.builder("alice");
    let platform = service.client(&service.token("platform", &[Role::Service]));
    let (source, build) =
        alice.create(image(&format!("Source {id}"), &format!("FROM {base}\nENV RUN={id}"))).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    let workspace = start(&docker, &reference(&source)).await?;
    run(&docker, &workspace, "echo changed > /etc/changed").await?;

    let (taken, build) =
        snapshot(&platform, &source.id, &name, &workspace, &format!("Snapshot {id}")).await?;
    assert_eq!(taken.status(), ImageStatus::Snapshotting);
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let state = docker.inspect_container(&workspace, None::<InspectContainerOptions>).await?.state;
    let state = state.context("a state")?;
    assert_eq!((state.running, state.paused), (Some(true), Some(false)));
    let shown = alice.get(&taken.id).await?;
    assert_eq!(shown.status(), ImageStatus::BuildFinished);
    let request = ResolveImageRequest { id: taken.id.clone() };
    let resolved = alice.images.clone().resolve_image(request).await?.into_inner();
    assert_eq!((resolved.reference, resolved.worker), (reference(&shown), name.clone()));
    let made = docker.inspect_image(&resolved.image_id).await?;
    let labels = made.config.and_then(|config| config.labels).context("labels")?;
    assert_eq!(labels.get("trailer.image-id"), Some(&taken.id), "{labels:?}");
    let second = start(&docker, &reference(&shown)).await?;
    assert_eq!(
        run(&docker, &second, "/bin/busybox cat /etc/changed; echo $RUN").await?,
        format!("changed\n{id}\n")
    );

    // And its clone starts from it.
    let request = CloneImageRequest { id: taken.id.clone() };
    let form = alice.images.clone().clone_image(request).await?.into_inner().create_image_request;
    let (clone, build) = alice.create(form.and_then(|form| form.image).context("a form")?).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let third = start(&docker, &reference(&clone)).await?;
    assert_eq!(run(&docker, &third, "/bin/busybox cat /etc/changed").await?, "changed\n");
    let images = [reference(&clone), reference(&shown), reference(&source), base];
    remove(&docker, &[&workspace, &second, &third], &images.each_ref().map(String::as_str)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_workspace_of_the_image_is_not_committed() -> anyhow::Result<()> {
    let (docker, docker_host) = real_engine::connect().await?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let base = format!("trailer-test/base-{id}:latest");
    base_image::import(&docker, &base).await?;
    let service = Service::start().await?;
    let name = format!("w-{id}");
    let _worker = Worker::start(&service, &name, &docker_host).await?;
    let alice = service.builder("alice");
    let platform = service.client(&service.token("platform", &[Role::Service]));
    let (source, build) =
        alice.create(image(&format!("Source {id}"), &format!("FROM {base}\nENV RUN={id}"))).await?;
    assert_eq!(alice.finished(&build.id).await?.state(), BuildState::Succeeded);
    let foreign = start(&docker, &base).await?;
    let missing = format!("missing-{id}");
    for (container, said) in [(&missing, "there is no container"), (&foreign, "does not carry the label")] {
        let (taken, build) = snapshot(&platform, &source.id, &name, container, "Refused").await?;
        let failed = alice.finished(&build.id).await?;
        let error = failed.error.clone().context("an error")?;
        assert_eq!((failed.state(), error.kind()), (BuildState::Failed, BuildErrorKind::User), "{failed:?}");
        assert!(error.message.contains(said), "{error:?}");
        let shown = alice.get(&taken.id).await?;
        assert_eq!((shown.status(), shown.artifact.is_none()), (ImageStatus::Error, true));
    }
    remove(&docker, &[&foreign], &[&reference(&source), &base]).await
}
