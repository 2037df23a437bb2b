//! Garbage collection of images in the engine.

use std::collections::{BTreeSet, HashMap};

use anyhow::Context as _;
use bollard::{
    Docker,
    models::{ContainerConfig, ContainerCreateBody},
    query_parameters::{
        CommitContainerOptionsBuilder, CreateContainerOptions, ListImagesOptionsBuilder,
        RemoveContainerOptionsBuilder, RemoveImageOptionsBuilder,
    },
};
use image_service::Role;
use proto::{
    dispatch::{FindUnusedImagesRequest, HeldImage},
    images::{self as api, BuildState},
};

use crate::{
    client::image,
    engine_fixture::{Real, list_images},
    eventually::eventually_true,
    fake_engine::FakeEngine,
    stack::{LIMIT, Service, Worker},
};

/// Returns the ids of the images that a worker has made.
async fn made_by(docker: &Docker, worker: &str) -> anyhow::Result<BTreeSet<String>> {
    let filters = HashMap::from([("label", vec![format!("trailer.worker={worker}")])]);
    // Without `all`, images from which people have made others are hidden.
    let options = ListImagesOptionsBuilder::new().all(true).filters(&filters).build();
    Ok(list_images(docker, options).await?.into_iter().map(|image| image.id).collect())
}

async fn until_made(docker: &Docker, worker: &str, expected: &BTreeSet<String>) -> anyhow::Result<()> {
    let mut found = BTreeSet::new();
    eventually_true("the engine holds these images", async || {
        found = made_by(docker, worker).await?;
        Ok(found == *expected)
    })
    .await
    .with_context(|| format!("{found:#?} instead of {expected:#?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_holds_what_records_and_containers_use_and_nothing_else() -> anyhow::Result<()> {
    const IMAGES: usize = 34;
    let real = Real::start_with(&["--collect-every", "500ms", "--slots", "4"]).await?;
    let (docker, alice) = (&real.docker, real.alice());
    let dockerfile = |i: usize, round: u32| real.dockerfile(&format!("ENV IMAGE={i}\nENV ROUND={round}\n"));
    let mut ids = Vec::new();
    let mut builds = Vec::new();
    for i in 0..IMAGES {
        let (created, build) =
            alice.create(image(&format!("Image {i} {}", real.run), &dockerfile(i, 1))).await?;
        ids.push(created.id);
        builds.push(build.id);
    }
    for build in &builds {
        assert_eq!(alice.finished(build).await?.state(), BuildState::Succeeded);
    }
    let artifact = async |id: &str| -> anyhow::Result<String> {
        Ok(alice.get(id).await?.artifact.map(|artifact| artifact.image_id).unwrap_or_default())
    };
    let used = artifact(&ids[0]).await?;
    let body = ContainerCreateBody {
        image: Some(used.clone()),
        cmd: Some(vec!["/bin/sh".to_owned()]),
        ..Default::default()
    };
    let container = docker.create_container(None::<CreateContainerOptions>, body).await?.id;

    // Images that people commit inherit the labels but belong to people; the image that they were made from
    // stays as their parent.
    let mut of_people = BTreeSet::from([used.clone()]);
    for name in [format!("trailer-test/kept-{}", real.run), String::new()] {
        let options = CommitContainerOptionsBuilder::new().container(&container).repo(&name).build();
        of_people.insert(docker.commit_container(options, ContainerConfig::default()).await?.id);
    }

    // Build each image again with a change; every fifth build hangs and is cancelled, and every seventh image
    // is deleted.
    for (i, id) in ids.iter().enumerate() {
        let mut changed = image("", &dockerfile(i, 2));
        if i % 5 == 4 {
            changed = image("", &format!("{}RUN [\"/bin/busybox\", \"sleep\", \"300\"]\n", dockerfile(i, 2)));
        }
        let update = api::UpdateImageRequest {
            image: Some(api::Image { id: id.clone(), ..changed }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["config".to_owned()] }),
            ..Default::default()
        };
        alice.images.clone().update_image(update).await?;
        builds[i] = alice.build(id).await?.id;
        if i % 5 == 4 {
            alice.until(&builds[i], |build| build.state() == BuildState::Running).await?;
            alice.cancel(id).await?;
        }
        if i % 7 == 6 {
            alice.delete(id).await?;
        }
    }
    let mut expected = of_people.clone();
    for (i, (id, build)) in ids.iter().zip(&builds).enumerate() {
        if i % 7 == 6 {
            continue;
        }
        let state = if i % 5 == 4 { BuildState::Cancelled } else { BuildState::Succeeded };
        assert_eq!(alice.finished(build).await?.state(), state);
        expected.insert(artifact(id).await?);
    }
    until_made(docker, &real.worker(), &expected).await?;

    docker
        .remove_container(&container, Some(RemoveContainerOptionsBuilder::new().force(true).build()))
        .await?;
    for id in &ids {
        // Some are already deleted.
        let _ = alice.delete(id).await;
    }
    // On containerd's image store no image depends on another, so the parent may go as well.
    let with_parent = of_people.clone();
    of_people.remove(&used);
    let mut found = BTreeSet::new();
    eventually_true("only what people have made is left", async || {
        found = made_by(docker, &real.worker()).await?;
        Ok(found == with_parent || found == of_people)
    })
    .await
    .with_context(|| format!("{found:#?} instead of {with_parent:#?}"))?;
    for name in of_people.iter().chain([&real.base()]) {
        docker.remove_image(name, Some(RemoveImageOptionsBuilder::new().force(true).build()), None).await?;
    }
    Ok(())
}

/// Does not wait for the scan of all images, which by default runs once a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_image_is_removed_soon_after_its_build() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let engine = FakeEngine::start().await?;
    let _worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let alice = service.builder("alice");
    let artifact = async |image: &str| -> anyhow::Result<String> {
        Ok(alice.get(image).await?.artifact.context("an artifact")?.image_id)
    };
    let (kept, build) = alice.create(image("Kept", "FROM scratch")).await?;
    alice.finished(&build.id).await?;
    let (rebuilt, build) = alice.create(image("Rebuilt", "FROM scratch")).await?;
    alice.finished(&build.id).await?;
    for _ in 0..2 {
        let replaced = artifact(&rebuilt.id).await?;
        alice.finished(&alice.build(&rebuilt.id).await?.id).await?;
        engine.wait_for(|state| state.images.find(&replaced).is_none(), LIMIT).await?;
    }
    for used in [artifact(&kept.id).await?, artifact(&rebuilt.id).await?] {
        engine.wait_for(|state| state.images.find(&used).is_some(), LIMIT).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_no_database_can_hold_names_no_known_image() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let worker = service.client(&service.token("w1", &[Role::Worker]));
    let held = HeldImage {
        image_id: uuid::Uuid::new_v4().to_string(),
        engine_image_id: "sha256:\0".to_owned(),
        names: vec!["a\0:b".to_owned()],
        reference: "\0".to_owned(),
    };
    let removed_engine_image_ids = vec!["\0".to_owned()];
    let request =
        FindUnusedImagesRequest { images: vec![held], removed_engine_image_ids, artifacts: Vec::new() };
    let response = worker.dispatch.clone().find_unused_images(request).await?.into_inner();
    assert!(response.engine_image_ids.is_empty(), "{response:?}");
    Ok(())
}
