//! Retention of the older builds of an image.

use proto::{
    dispatch::{Failed, FailureKind, Started, report_event::Event},
    images::{self as api, BuildState},
};
use tonic::Code;

use crate::{
    actor::{Actor, hello},
    answers::{assert_gapless, refused},
    client::{Client, image},
    eventually::eventually_true,
    fake_engine::FakeEngine,
    stack::{Service, Worker},
};

async fn numbers(client: &Client, image: &str) -> anyhow::Result<Vec<i64>> {
    let request = api::ListBuildsRequest { image_id: image.to_owned(), ..Default::default() };
    let builds = client.builds.clone().list_builds(request).await?.into_inner().builds;
    Ok(builds.into_iter().map(|build| build.number).collect())
}

async fn until_numbers(client: &Client, image: &str, expected: &[i64]) -> anyhow::Result<()> {
    let what = format!("the builds become {expected:?}");
    eventually_true(&what, async || Ok(numbers(client, image).await? == expected)).await
}

/// Fails the next build.
async fn fail(actor: &mut Actor) -> anyhow::Result<()> {
    let (_, attempt) = actor.assignment().await?;
    let failed =
        Failed { kind: FailureKind::User.into(), message: "it is wrong".to_owned(), ..Failed::default() };
    actor.report(&attempt, 1, vec![Event::Started(Started {}), Event::Failed(failed)]).await;
    actor.acknowledged().await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_nothing_names_goes_at_once() -> anyhow::Result<()> {
    let service = Service::start().await?;
    let alice = service.builder("alice");
    let stored = async || service.database().count("configurations").await;
    let edit = async |id: &str, text: &str| {
        let request = api::UpdateImageRequest {
            image: Some(api::Image { id: id.to_owned(), ..image("", text) }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["config".to_owned()] }),
            ..Default::default()
        };
        alice.images.clone().update_image(request).await
    };
    let template = alice.create_template("Template").await?;
    for text in ["FROM a", "FROM b", "FROM c"] {
        edit(&template.id, text).await?;
        assert_eq!(stored().await?, 1, "{text}");
    }
    // No worker takes the build, which keeps the configuration that it was queued with.
    let (queued, _) = alice.create(image("Queued", "FROM scratch")).await?;
    for text in ["FROM a", "FROM b"] {
        edit(&queued.id, text).await?;
        assert_eq!(stored().await?, 3, "{text}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_builds_are_kept_and_that_of_the_artifact() -> anyhow::Result<()> {
    let service = Service::start_with(&["--retain-builds", "3"]).await?;
    let alice = service.builder("alice");
    let engine = FakeEngine::start().await?;
    let worker = Worker::start(&service, "w1", &engine.docker_host())?;
    let (created, first) = alice.create(image("A", "FROM scratch")).await?;
    assert_eq!(alice.finished(&first.id).await?.state(), BuildState::Succeeded);
    worker.stop().await?;
    let mut actor = Actor::connect(&service, hello("w2", &[])).await?;

    let mut builds = vec![first.id.clone()];
    for i in 2..=6 {
        // Each build has a configuration of its own.
        let changed =
            api::Image { id: created.id.clone(), ..image("A", &format!("FROM scratch\nENV I={i}")) };
        let update = api::UpdateImageRequest {
            image: Some(changed),
            update_mask: Some(prost_types::FieldMask { paths: vec!["config".to_owned()] }),
            ..Default::default()
        };
        alice.images.clone().update_image(update).await?;
        builds.push(alice.build(&created.id).await?.id);
        fail(&mut actor).await?;
        assert_eq!(alice.finished(&builds[i - 1]).await?.state(), BuildState::Failed);
    }
    until_numbers(&alice, &created.id, &[6, 5, 4, 1]).await?;
    for (i, build) in builds.iter().enumerate() {
        let is_kept = [1, 4, 5, 6].contains(&(i + 1));
        if is_kept {
            assert_gapless(&alice.history(build, 0).await?, 1);
        } else {
            assert_eq!(refused(alice.get_build(build).await).0, Code::NotFound);
            assert_eq!(refused(alice.history(build, 0).await).0, Code::NotFound);
        }
    }
    assert_eq!(alice.get(&created.id).await?.artifact.map(|artifact| artifact.build_id), Some(first.id));
    // Builds that ended elsewhere, or under other flags, are found at startup.
    let service = Service::start_on(service.end().await?, &["--retain-builds", "1"]).await?;
    until_numbers(&service.builder("alice"), &created.id, &[6, 1]).await
}
