//! Snapshots of running workspaces, on a real engine.

use anyhow::Context as _;
use bollard::{
    Docker,
    exec::{CreateExecOptions, StartExecOptions, StartExecResults},
    models::ContainerCreateBody,
    query_parameters::{
        CreateContainerOptions, InspectContainerOptions, RemoveContainerOptionsBuilder, StartContainerOptions,
    },
};
use futures_util::StreamExt as _;
use image_service::Role;
use proto::images::{
    Build, BuildErrorKind, BuildState, CloneImageRequest, Image, ImageStatus, ResolveImageRequest,
    SnapshotWorkspaceRequest,
};

use crate::{client::image, dockerd::starts_containers, engine_fixture::Real};

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

/// Runs a command in a container and returns its output.
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

async fn remove(docker: &Docker, containers: &[&str]) -> anyhow::Result<()> {
    for container in containers {
        let options = RemoveContainerOptionsBuilder::new().force(true).build();
        docker.remove_container(container, Some(options)).await?;
    }
    Ok(())
}

/// Builds an image to start workspaces from.
async fn built(real: &Real) -> anyhow::Result<Image> {
    let wanted = image(&format!("Source {}", real.run), &real.dockerfile(""));
    let (source, build) = real.alice().create(wanted).await?;
    let finished = real.alice().finished(&build.id).await?;
    anyhow::ensure!(finished.state() == BuildState::Succeeded, "{finished:?}");
    Ok(source)
}

async fn snapshot(real: &Real, source: &str, container: &str) -> anyhow::Result<(Image, Build)> {
    let platform = real.service.client(&real.service.token("platform", &[Role::Service]));
    let request = SnapshotWorkspaceRequest {
        source_image_id: source.to_owned(),
        worker: real.worker(),
        container: container.to_owned(),
        creator: "alice".to_owned(),
        image: Some(Image { name: format!("Snapshot {}", real.run), ..Image::default() }),
        ..SnapshotWorkspaceRequest::default()
    };
    let response = platform.images.clone().snapshot_workspace(request).await?.into_inner();
    Ok((response.image.context("an image")?, response.build.context("a build")?))
}

fn reference(image: &Image) -> String {
    image.reference.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_holds_what_the_workspace_has_changed() -> anyhow::Result<()> {
    if !starts_containers() {
        return Ok(());
    }
    let real = Real::start_with(&["--collect-every", "200ms"]).await?;
    let (docker, alice, source) = (&real.docker, real.alice(), built(&real).await?);
    let workspace = start(docker, &reference(&source)).await?;
    run(docker, &workspace, "echo changed > /etc/changed").await?;

    let (taken, build) = snapshot(&real, &source.id, &workspace).await?;
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
    assert_eq!(resolved.worker, real.worker());
    for name in [&resolved.reference, &reference(&shown)] {
        assert_eq!(&real.image_id(name).await?, &resolved.image_id, "{name}");
    }
    let artifact = shown.artifact.clone().context("an artifact")?;
    assert!(artifact.config_digest.starts_with("sha256:"), "{artifact:?}");
    let made = docker.inspect_image(&resolved.image_id).await?;
    let labels = made.config.and_then(|config| config.labels).context("labels")?;
    assert_eq!(labels.get("trailer.image-id"), Some(&taken.id), "{labels:?}");
    let second = start(docker, &resolved.reference).await?;
    assert_eq!(
        run(docker, &second, "/bin/busybox cat /etc/changed; echo $RUN").await?,
        format!("changed\n{}\n", real.run)
    );

    // A clone of the snapshot starts from it.
    let request = CloneImageRequest { id: taken.id.clone() };
    let form = alice.images.clone().clone_image(request).await?.into_inner().create_image_request;
    let (clone, build) = alice.create(form.and_then(|form| form.image).context("a form")?).await?;
    let finished = alice.finished(&build.id).await?;
    assert_eq!(finished.state(), BuildState::Succeeded, "{finished:?}");
    let third = start(docker, &reference(&clone)).await?;
    assert_eq!(run(docker, &third, "/bin/busybox cat /etc/changed").await?, "changed\n");
    remove(docker, &[&workspace, &second, &third]).await?;

    // Whoever deletes an image takes it from those that are built from it, too.
    alice.delete(&taken.id).await?;
    let again = alice.build(&clone.id).await?;
    let failed = alice.finished(&again.id).await?;
    let error = failed.error.clone().context("an error")?;
    assert_eq!((error.kind(), failed.attempt), (BuildErrorKind::User, 1), "{failed:?}");
    assert!(error.message.contains("not found"), "{error:?}");
    real.clean(&[&reference(&clone), &reference(&shown), &reference(&source)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_of_another_image_is_not_committed() -> anyhow::Result<()> {
    if !starts_containers() {
        return Ok(());
    }
    let real = Real::start().await?;
    let (docker, alice, source) = (&real.docker, real.alice(), built(&real).await?);
    let foreign = start(docker, &real.base()).await?;
    let missing = format!("missing-{}", real.run);
    for (container, expected) in [(&missing, "there is no container"), (&foreign, "does not carry the label")]
    {
        let (taken, build) = snapshot(&real, &source.id, container).await?;
        let failed = alice.finished(&build.id).await?;
        let error = failed.error.clone().context("an error")?;
        assert_eq!((failed.state(), error.kind()), (BuildState::Failed, BuildErrorKind::User), "{failed:?}");
        assert!(error.message.contains(expected), "{error:?}");
        let shown = alice.get(&taken.id).await?;
        assert_eq!((shown.status(), shown.artifact.is_none()), (ImageStatus::Error, true));
    }
    remove(docker, &[&foreign]).await?;
    real.clean(&[&reference(&source)]).await
}
